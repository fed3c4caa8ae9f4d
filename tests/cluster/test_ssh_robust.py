"""What goes wrong around a deployment on SSH hosts after it was started: heads, agents, other deployments."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from dynctl.deploy.receive import CALLED_S
from tests.cluster.cluster import Cluster
from tests.cluster.commands import eventually
from tests.cluster.hosts import MACHINE
from tests.cluster.ssh_deployment import UP_S, Laptop, deployed

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def laptop(cluster: Cluster, home: Path, token: str) -> Laptop:
    return Laptop(cluster, home, token)


def agents(laptop: Laptop, host: str) -> list[int]:
    """The agent on this host and its keeper."""
    found = laptop.cluster.processes()
    return sorted(one.pid for one in found if one.host == host and "dynctl.agent" in one.args)


def test_an_agent_that_was_killed_is_back_and_its_workers_were_not_touched(laptop: Laptop) -> None:
    with deployed(laptop):
        before = {row["id"]: (row["pid"], row["incarnation"]) for row in laptop.ps()}
        keeper, agent = agents(laptop, "n2")
        os.kill(agent, signal.SIGKILL)
        eventually(
            lambda: len(agents(laptop, "n2")) == 2 and agent not in agents(laptop, "n2"),
            "there is another agent",
            30.0,
        )
        assert keeper in agents(laptop, "n2")
        laptop.await_ready()
        laptop.dynctl("exec", "n2", "--name", laptop.name, "--", "true")
        assert {row["id"]: (row["pid"], row["incarnation"]) for row in laptop.ps()} == before


def test_an_agent_that_hangs_is_told_of_refused_work_and_started_anew_by_up(laptop: Laptop) -> None:
    with deployed(laptop):
        before = {row["id"]: (row["pid"], row["incarnation"]) for row in laptop.ps()}
        _, hung = agents(laptop, "n3")
        os.kill(hung, signal.SIGSTOP)
        eventually(lambda: laptop.status()["layer"] == "node", "it is told", 20.0)
        told = laptop.status()
        assert told["ready"], "all serves"
        assert re.fullmatch(
            r"n3: its agent does not answer \(\d+ s\); what serves there goes on", told["reason"]
        )
        shown = laptop.dynctl("status", laptop.name).stdout
        assert "starts its agent anew" in shown
        assert "all layers are well" not in shown
        assert "n3: its agent does not answer" in laptop.dynctl("ps", laptop.name).stderr
        for verb in (("restart", "aggregated/2"), ("scale", "aggregated=2")):
            refused = laptop.dynctl(*verb, "--name", laptop.name, check=False, timeout=30.0)
            assert refused.returncode == 8, refused.stderr
            assert "error: n3: aggregated-2 cannot be" in refused.stderr
        laptop.dynctl("restart", "aggregated/1", "--name", laptop.name)
        laptop.up()
        eventually(lambda: laptop.status()["layer"] == "", "all is well", 20.0)
        assert hung not in agents(laptop, "n3")
        laptop.dynctl("restart", "aggregated/2", "--name", laptop.name)
        after = {row["id"]: (row["pid"], row["incarnation"]) for row in laptop.ps()}
        changed = {seat for seat in before if before[seat] != after[seat]}
        assert changed == {"aggregated-1", "aggregated-2"}


SLOW = ("engine.args.fault-slow-start=30",)


@pytest.mark.parametrize(
    ("what", "code"),
    [("dynctl.deploy.receive", 8), ("dynctl.agent", 8), ("dynctl.worker", 8)],
)
def test_a_host_that_drops_while_it_is_being_started_is_one_message_with_a_remedy(
    laptop: Laptop, what: str, code: int
) -> None:
    """`what`: it drops as soon as that runs there."""
    laptop.sets += SLOW
    argv = [str(laptop.cluster.python), "-m", "dynctl.cli.main", *laptop.up_args()]
    with laptop.cluster.spawn_as_user(argv, host=MACHINE, env={"DYNCTL_HOME": str(laptop.home)}) as up:
        try:
            eventually(lambda: runs(laptop, "n3", what), f"{what} on n3", 60.0)
            with laptop.cluster.cut("n3"):
                ended = up.wait(UP_S)
            said = up.said()
        finally:
            laptop.dynctl("down", laptop.name, check=False)
    sys.stdout.write(f"cut with {what}: exit {ended}\n{said}\n")
    assert ended == code, said
    (error,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert error.startswith("error: n3: "), said
    assert error.count("n3") <= 2, "told once, and in the remedy"
    assert error.endswith(")"), "what to do"
    # What waits there for its call is told of the cut by nobody.
    eventually(lambda: not runs(laptop, "n3", "dynctl.deploy.receive"), "nothing is left", CALLED_S + 15.0)


def runs(laptop: Laptop, host: str, what: str) -> bool:
    """Whether a process with these words runs there."""
    return any(one.host == host and what in one.args for one in laptop.cluster.processes())


def test_with_its_head_gone_for_good_the_rest_is_ended_and_the_name_is_free(laptop: Laptop) -> None:
    laptop.up()
    with laptop.cluster.off("n1"):
        refused = laptop.dynctl("down", laptop.name, check=False)
        assert refused.returncode != 0
        assert "--forget" in refused.stderr
        keys = laptop.home / "notes" / laptop.name / "keys.json"
        assert keys.exists()
        told = laptop.dynctl("down", laptop.name, "--forget")
        assert "n1" in told.stderr
        assert "its name is free" in told.stderr
        assert not keys.exists()
        left = [p for p in laptop.cluster.processes() if p.host != "n1" and "dynctl" in p.args]
        assert left == []
        laptop.hosts = ("n2", "n3", "n4")
        with deployed(laptop) as again:
            assert again["url"].startswith("http://10.77.0.12:")


def test_nothing_new_is_put_on_a_node_that_does_not_answer(laptop: Laptop) -> None:
    with deployed(laptop), laptop.cluster.off("n3"):
        eventually(lambda: not laptop.status()["ready"], "the loss is seen", 20.0)
        told = laptop.dynctl("scale", "aggregated=7", "--name", laptop.name, "--no-wait")
        assert "n3: nothing new is started there" in told.stderr
        added = {row["node"] for row in laptop.ps() if row["index"] >= 4}
        assert added
        assert "n3" not in added


def test_a_worker_that_is_added_on_another_host_keeps_off_ports_in_use_there(laptop: Laptop) -> None:
    with deployed(laptop):
        plan = json.loads(next((laptop.there / "runs").glob(f"{laptop.name}-*/plan.json")).read_text())
        used = {port for node in plan["nodes"] for port in node["ports"]}
        block = [port for port in range(max(used) + 1, max(used) + 40)]
        code = (
            "import socket,sys,time\n"
            f"held=[socket.create_server(('0.0.0.0', p)) for p in {block}]\n"
            "print(flush=True); time.sleep(200)"
        )
        argv = [str(laptop.cluster.python), "-c", code]
        busy = [laptop.cluster.spawn_as_user(argv, host=host) for host in ("n2", "n3", "n4")]
        try:
            for one in busy:
                one.__enter__()
            laptop.dynctl("scale", "aggregated=8", "--name", laptop.name)
            rows = laptop.ps()
            assert sum(row["ready"] for row in rows) == 9
            assert all(row["restarts"] == 0 for row in rows)
        finally:
            for one in busy:
                one.__exit__(None, None, None)


def test_a_verb_that_was_meant_for_the_run_before_is_refused(laptop: Laptop) -> None:
    laptop.up()
    note = laptop.home / "notes" / laptop.name / "remote.json"
    before = note.read_text()
    laptop.dynctl("down", laptop.name)
    with deployed(laptop):
        now = note.read_text()
        pids = {row["id"]: row["pid"] for row in laptop.ps()}
        note.write_text(before)  # as another machine has it, on which the first one was started
        for verb in (["scale", "aggregated=5"], ["restart", "aggregated"]):
            refused = laptop.dynctl(*verb, "--name", laptop.name, check=False)
            assert refused.returncode == 2
            assert "is another run by now" in refused.stderr
        note.write_text(now)
        assert {row["id"]: row["pid"] for row in laptop.ps()} == pids


def test_the_limit_of_up_is_for_connecting_too(laptop: Laptop) -> None:
    with laptop.cluster.cut("n4"):
        refused = laptop.dynctl(*laptop.up_args("--timeout", "2s"), check=False)
    assert refused.returncode == 6, refused.stderr
    assert "was not up within 2 s" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert [one.args for one in laptop.cluster.processes() if "dynctl" in one.args] == []
