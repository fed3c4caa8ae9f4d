"""`dynctl up --target ssh` on real hosts: the whole way, and what hosts, links and users do to it."""

from __future__ import annotations

import json
import shutil
import signal
import stat
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.commands import eventually
from tests.cluster.hosts import MACHINE, USER
from tests.cluster.ssh_deployment import Laptop, deployed, under_load

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def laptop(cluster: Cluster, home: Path, token: str) -> Laptop:
    return Laptop(cluster, home, token)


def mine(laptop: Laptop) -> list[str]:
    """Processes of this deployment, wherever they are."""
    return [f"{one.host}: {one.args}" for one in laptop.cluster.processes() if "dynctl" in one.args]


def test_up_on_four_hosts_serves_and_down_leaves_nothing(laptop: Laptop) -> None:
    with deployed(laptop) as told:
        assert told["url"].startswith("http://10.77.0.11:")
        rows = laptop.ps()
        assert {row["node"] for row in rows} == {"n1", "n2", "n3", "n4"}
        assert all(row["ready"] for row in rows)
        assert laptop.dynctl("chat", "--name", laptop.name, "Hello").stdout.strip()
        logs = laptop.dynctl("logs", laptop.name, "aggregated").stdout
        assert all(f"aggregated-{index}.engine" in logs for index in range(4)), "logs of all hosts"
        (listed,) = json.loads(laptop.dynctl("ls", "--json").stdout)
        assert (listed["phase"], listed["ready"], listed["url"]) == ("ready", "4/4", told["url"])
    assert mine(laptop) == []
    assert "stopped" in laptop.dynctl("ls").stdout
    assert "aggregated-3" in laptop.dynctl("logs", laptop.name, "aggregated/3").stdout, "also when it is down"


def test_a_name_that_runs_is_changed_by_another_recipe_when_told_to(laptop: Laptop) -> None:
    with deployed(laptop):
        before = laptop.ps()
        laptop.sets.append("router.mode=round_robin")
        refused = laptop.dynctl(*laptop.up_args(), check=False)
        assert refused.returncode == 2
        assert "--yes" in refused.stderr
        assert laptop.ps() == before
        done = laptop.dynctl(*laptop.up_args("--yes"))
        assert "~ frontend-0: router.mode" in done.stderr
        assert {row["id"] for row in laptop.ps()} == {row["id"] for row in before}
        laptop.up()


def test_a_node_without_power_loses_no_request_and_comes_back_by_up(laptop: Laptop) -> None:
    with deployed(laptop) as told:
        with under_load(told["url"]) as load:
            eventually(lambda: load.outcomes["whole"] > 5, "streams flow", 30.0)
            with laptop.cluster.off("n3"):
                eventually(lambda: not laptop.status()["ready"], "the loss is seen", 20.0)
                reason = laptop.status()["reason"]
                seen = load.outcomes["whole"]
                eventually(lambda: load.outcomes["whole"] > seen + 8, "streams go on", 30.0)
        sys.stdout.write(f"a node without power: {dict(load.outcomes)}; said: {reason}\n")
        assert set(load.outcomes) == {"whole"}
        laptop.up()
        assert {row["node"] for row in laptop.ps() if row["ready"]} == {"n1", "n2", "n3", "n4"}


def test_behind_a_cut_link_nothing_is_started_twice(laptop: Laptop) -> None:
    with deployed(laptop):
        before = {row["id"]: (row["pid"], row["incarnation"]) for row in laptop.ps()}
        with laptop.cluster.partition("n1", "n3"):
            eventually(lambda: not laptop.status()["ready"], "the cut is seen", 20.0)
            lost = [row["id"] for row in laptop.ps() if row["state"] == "lost"]
            assert lost == ["aggregated-2"]
        laptop.await_ready()
        assert {row["id"]: (row["pid"], row["incarnation"]) for row in laptop.ps()} == before


def ready_on(laptop: Laptop, seat: str, node: str) -> bool:
    """Whether a worker is ready there. That it was not in between may be too short to be seen."""
    return (seat, node, "ready") in {(row["id"], row["node"], row["state"]) for row in laptop.ps()}


def test_workers_of_a_lost_node_are_ready_on_a_spare_one(laptop: Laptop) -> None:
    laptop.hosts = ("n1", "n2", "n3", "n4", "head")
    with deployed(laptop) as told:
        assert "head" not in {row["node"] for row in laptop.ps()}
        with under_load(told["url"]) as load:
            eventually(lambda: load.outcomes["whole"] > 5, "streams flow", 30.0)
            with laptop.cluster.off("n3"):
                eventually(lambda: ready_on(laptop, "aggregated-2", "head"), "it is ready elsewhere", 40.0)
        assert set(load.outcomes) == {"whole"}


def test_a_worker_behind_a_cut_link_that_was_replaced_ends_when_it_is_back(laptop: Laptop) -> None:
    laptop.hosts = ("n1", "n2", "n3", "n4", "head")
    with deployed(laptop):
        with laptop.cluster.partition("n1", "n3"):
            eventually(lambda: ready_on(laptop, "aggregated-2", "head"), "it is ready elsewhere", 40.0)

        def workers_there() -> list[str]:
            return [
                p.args for p in laptop.cluster.processes() if p.host == "n3" and "dynctl.worker" in p.args
            ]

        eventually(lambda: workers_there() == [], "the one that was replaced has ended", 30.0)
        assert laptop.status()["ready"]


def test_frontends_on_two_hosts_know_of_each_other_and_one_may_lose_power(laptop: Laptop) -> None:
    laptop.sets += ["frontend.replicas=2", "frontend.hosts=[n1, n2]"]
    with deployed(laptop) as told:
        doors = {row["node"]: row["url"] for row in laptop.ps() if row["role"] == "frontend"}
        assert sorted(doors) == ["n1", "n2"]
        assert doors["n1"] == told["url"]
        with under_load(doors["n1"], 4) as stays, under_load(doors["n2"], 4) as goes:
            eventually(lambda: min(stays.outcomes["whole"], goes.outcomes["whole"]) > 3, "both serve", 30.0)
            with laptop.cluster.off("n2"):
                eventually(lambda: not laptop.status()["ready"], "the loss is seen", 20.0)
                goes.over.set()
                seen = stays.outcomes["whole"]
                eventually(lambda: stays.outcomes["whole"] > seen + 5, "the other one serves on", 30.0)
        assert set(stays.outcomes) == {"whole"}


def test_a_dead_process_on_another_host_is_started_again(laptop: Laptop) -> None:
    with deployed(laptop):
        row = next(row for row in laptop.ps() if row["node"] == "n2")
        laptop.cluster.exec("n2", "kill", "-9", str(row["pid"]))
        eventually(
            lambda: any(r["id"] == row["id"] and r["ready"] and r["incarnation"] == 2 for r in laptop.ps()),
            "its next incarnation is ready",
            30.0,
        )


def test_without_its_controller_traffic_goes_on_and_up_starts_another(laptop: Laptop) -> None:
    with deployed(laptop) as told:
        laptop.cluster.exec("n1", "kill", "-9", str(laptop.status()["controller_pid"]))
        with under_load(told["url"], 2) as load:
            eventually(lambda: load.outcomes["whole"] > 3, "traffic goes on", 30.0)
            before = {row["id"]: row["pid"] for row in laptop.ps()}
            helps = laptop.dynctl("status", laptop.name).stdout
            assert (
                "up with the same recipe and inventory, from where it was started, starts a new one" in helps
            )
            said = laptop.dynctl(*laptop.up_args()).stderr
            assert "a new controller takes over what lives" in said
        assert set(load.outcomes) == {"whole"}
        assert {row["id"]: row["pid"] for row in laptop.ps()} == before


def test_a_host_that_is_off_is_one_message_and_nothing_is_started(laptop: Laptop) -> None:
    with laptop.cluster.off("n4"):
        refused = laptop.dynctl(*laptop.up_args(), check=False)
        assert refused.returncode == 8
        assert "n4" in refused.stderr
        assert "Traceback" not in refused.stderr
        assert mine(laptop) == []


def test_a_host_whose_disk_is_full_is_one_message_and_nothing_is_left(laptop: Laptop) -> None:
    laptop.there.mkdir(mode=0o700)
    shutil.chown(laptop.there, USER, USER)
    laptop.cluster.exec("n3", "mount", "-t", "tmpfs", "-o", "size=1m,mode=1777", "tmpfs", str(laptop.there))
    try:
        refused = laptop.dynctl(*laptop.up_args(), check=False)
    finally:
        laptop.cluster.exec("n3", "umount", str(laptop.there))
    assert refused.returncode == 5
    errors = [line for line in refused.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert errors[0].startswith("error: n3:")
    assert "too little space for a run" in errors[0]
    (listed,) = json.loads(laptop.dynctl("ls", "--json").stdout)
    assert listed["phase"] == "stopped"
    assert mine(laptop) == []


def test_a_host_without_dynctl_says_how_to_bring_it_there(laptop: Laptop) -> None:
    laptop.inventory.write_text("")  # made anew below, with another interpreter for one host
    args = laptop.up_args()
    whole = laptop.inventory.read_text()
    text = whole.replace(f"name: n2, python: {laptop.cluster.python}", "name: n2, python: /usr/bin/python3")
    assert text != whole
    path = Path(args[args.index("--inventory") + 1])
    path.write_text(text)
    refused = laptop.dynctl(*args, check=False)
    assert refused.returncode in (5, 8)
    assert "n2" in refused.stderr
    assert "--bootstrap" in refused.stderr
    assert mine(laptop) == []


@pytest.mark.parametrize("moment", [0.5, 1.2, 2.0, 3.0, 4.5])
def test_up_killed_at_any_moment_is_found_and_ended_by_down(laptop: Laptop, moment: float) -> None:
    argv = [str(laptop.cluster.python), "-m", "dynctl.cli.main", *laptop.up_args()]
    env = {"DYNCTL_HOME": str(laptop.home)}
    with laptop.cluster.spawn_as_user(argv, host=MACHINE, env=env) as started:
        time.sleep(moment)  # the moment is what is varied here
        started.signal(signal.SIGKILL)
    laptop.dynctl("down", laptop.name, check=False)
    eventually(lambda: mine(laptop) == [], "nothing is left", 20.0)


def test_two_ups_of_a_name_at_once_end_as_one_deployment_that_down_ends(laptop: Laptop) -> None:
    args = laptop.up_args()
    with ThreadPoolExecutor(2) as both:
        first, second = both.map(lambda _: laptop.dynctl(*args, check=False), range(2))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert first.stdout == second.stdout
    assert len(laptop.ps()) == 5
    laptop.dynctl("down", laptop.name)
    assert mine(laptop) == []


def test_the_note_of_what_one_head_looks_after_is_not_lost_to_another(laptop: Laptop) -> None:
    with deployed(laptop):
        before = laptop.ps()
        laptop.hosts = ("n2", "n3")
        refused = laptop.dynctl(*laptop.up_args(), check=False)
        assert refused.returncode == 2
        assert "is looked after from n1, not from n2" in refused.stderr
        assert laptop.ps() == before


def test_down_tells_of_a_host_it_could_not_reach_and_ends_it_later(laptop: Laptop) -> None:
    laptop.up()
    with laptop.cluster.cut("n2"):
        refused = laptop.dynctl("down", laptop.name, check=False)
        assert refused.returncode != 0
        assert "may be left on n2" in refused.stderr
    laptop.dynctl("down", laptop.name)
    assert mine(laptop) == []


def test_another_user_of_a_host_can_neither_read_nor_talk(laptop: Laptop) -> None:
    with deployed(laptop):
        peek = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "ls", "-R", str(laptop.there)]
        done = laptop.cluster.exec("n1", *peek, check=False)
        assert done.returncode != 0
        listening = laptop.cluster.exec("n2", "ss", "-Hltn").stdout
        ours = [line.split()[3] for line in listening.splitlines()]
        ours = [address for address in ours if 20_000 <= int(address.rpartition(":")[2]) < 32_768]
        assert len(ours) > 3
        assert all(address.startswith(("127.0.0.1:", "10.77.0.12:")) for address in ours), ours


def test_secrets_are_on_no_command_line(laptop: Laptop) -> None:
    with deployed(laptop):
        plans = list((laptop.there / "runs").glob(f"{laptop.name}-*/keys.json"))
        secret = json.loads(plans[0].read_text())
        shown = "\n".join(one.args for one in laptop.cluster.processes())
        assert not any(str(value) in shown for value in secret.values() if len(str(value)) > 20)


def test_ps_asks_the_controller_itself_and_goes_by_ssh_where_it_cannot(laptop: Laptop) -> None:
    no_ssh = {"DYNCTL_SSH_CONFIG": "/nonexistent"}

    def ps(env: dict[str, str]) -> int:
        args = ("ps", laptop.name, "--json")
        return laptop.cluster.dynctl(*args, home=laptop.home, host=MACHINE, env=env, check=False).returncode

    note = laptop.home / "notes" / laptop.name
    with deployed(laptop):
        assert stat.S_IMODE((note / "keys.json").stat().st_mode) == 0o600
        assert ps(no_ssh) == 0
        (note / "keys.json").unlink()
        assert ps(no_ssh) != 0
        assert ps({}) == 0
    assert not (note / "keys.json").exists()
