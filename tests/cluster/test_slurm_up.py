"""`dynctl up --target slurm` from a login node on a real Slurm: served, looked at, ended, nothing left."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.commands import eventually
from tests.cluster.login import READY_S, Login, served

pytestmark = pytest.mark.timeout(240)


def test_one_command_serves_on_several_nodes_and_one_ends_it(login: Login) -> None:
    url = login.up().stdout.strip()
    assert re.fullmatch(r"http://10\.77\.0\.1[1-4]:\d+", url)
    assert '"status":"ready"' in login.health()
    rows = login.ps()
    workers = [row for row in rows if row["role"] == "aggregated"]
    assert len({row["node"] for row in workers}) == 2
    assert all(row["ready"] for row in rows)
    job = login.status()["job"]
    assert job["state"] == "RUNNING"
    chat = login.run("chat", "--name", login.name, "Hello")
    assert chat.stdout.strip()
    assert "engine.ready" in login.run("logs", login.name, "engine").stdout
    assert "job.started" in login.run("logs", login.name, "controller").stdout
    assert login.run("down", login.name).returncode == 0
    assert login.jobs() == []
    ended = login.status()
    assert ended["phase"] == "stopped"
    assert ended["job"]["state"] == "COMPLETED"


def test_a_killed_sidecar_is_started_again_on_its_node(login: Login) -> None:
    with served(login):
        victim = next(row for row in login.ps() if row["instance"] == "aggregated-1")
        login.cluster.run_as_user(["kill", "-9", str(victim["engine_pid"])], host=victim["node"])
        eventually(
            lambda: (
                [r["restarts"] for r in login.ps() if r["instance"] == "aggregated-1" and r["ready"]] == [1]
            ),
            "started again",
            30,
        )
        assert next(r for r in login.ps() if r["instance"] == "aggregated-1")["node"] == victim["node"]


def test_requests_end_before_their_engine_when_it_goes_down(login: Login) -> None:
    """A signal to a step reaches all its processes: an engine that heard it would cut its streams off."""
    with served(login, "engine.args.speedup=0.1", "engine.args.shutdown-timeout=0") as url:
        body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 40, "stream": True})
        ask = ["curl", "-sN", "-H", "content-type: application/json", f"{url}/v1/completions", "-d", body]
        with login.cluster.spawn_as_user(ask) as stream:
            eventually(lambda: "data:" in stream.said(), "a first token", 20)
            login.run("down", login.name)
            assert stream.wait() == 0
            assert stream.said().rstrip().endswith("data: [DONE]"), stream.said()[-500:]
            assert '"error"' not in stream.said()


def test_a_killed_controller_is_followed_by_another_and_traffic_goes_on(login: Login) -> None:
    with served(login):
        before = login.status()["controller_pid"]
        node = login.cluster.squeue()[0].nodes
        host = next(iter(re.findall(r"n\[?(\d)", node)))
        login.cluster.run_as_user(["kill", "-9", str(before)], host=f"n{host}")
        assert '"status":"ready"' in login.health()
        eventually(lambda: login.status()["controller_pid"] not in (0, before), "another controller", 30)
        eventually(lambda: bool(login.status()["ready"]), "ready", 30)
        assert [row["restarts"] for row in login.ps()] == [0, 0, 0]


def test_a_pending_job_is_seen_and_ended_like_a_running_one(login: Login) -> None:
    waiting = login.up("slurm.sbatch_args.begin=now+1hour", args=("--timeout", "3s"), check=False)
    assert waiting.returncode == 6
    assert "BeginTime" in waiting.stderr
    assert login.jobs() == []
    argv: list[str | Path] = [
        login.cluster.python,
        *("-m", "dynctl.cli.main", "up", "quickstart", "--target", "slurm", "-d"),
        *("--set", f"name={login.name}", "--set", "slurm.sbatch_args.begin=now+1hour"),
    ]
    with login.cluster.spawn_as_user(argv, env={"DYNCTL_HOME": str(login.home)}) as submitted:
        eventually(lambda: "PENDING" in " ".join(login.jobs()), "pending", 30)
        eventually(lambda: login.status()["job"].get("reason") == "BeginTime", "a reason", 30)
        told = login.status()
        assert told["phase"] == "pending"
        shown = login.run("status", login.name).stdout
        assert shown.count("is pending in partition") == 1
        assert "place 1 of 1" in shown
        assert "has no logs yet: job" in login.run("logs", login.name).stderr
        assert "ready 0/2\n" in login.run("ps", login.name).stderr
        assert told["job"]["place"] >= 1
        assert told["job"]["start"]
        assert {row["state"] for row in login.ps()} == {"waiting"}
        assert login.run("logs", login.name).returncode == 0
        assert login.run("down", login.name).returncode == 0
        assert login.jobs() == []
        assert submitted.wait() == 5
        assert "was cancelled" in submitted.said()


@pytest.mark.parametrize(
    ("sets", "code", "told"),
    [
        ("slurm.partition=nope", 4, "Invalid partition name specified (sinfo -s lists the partitions"),
        ("slurm.constraint=nope", 4, "Invalid feature specification"),
        ("slurm.gpus_per_node=99", 3, "slurm.gpus_per_node"),
        ("slurm.gpus_per_node=64", 4, "Requested node configuration is not available"),
        ("slurm.nodelist=nope", 4, "Invalid node name specified"),
        ("slurm.nodes=9", 4, "cannot start in partition gpu: Partition"),
        ("slurm.nodes=40", 4, "cannot start in partition gpu: Partition"),
        ("slurm.time=60", 3, "a time limit of 60 s is too short"),
        ("slurm.sbatch_args.frobnicate=1", 4, "unrecognized option '--frobnicate=1'"),
        ("slurm.sbatch_args.output=x", 3, "'output' cannot be given"),
    ],
)
def test_what_cannot_be_is_told_once_and_leaves_nothing(
    login: Login, sets: str, code: int, told: str
) -> None:
    done = login.up(sets, check=False)
    assert done.returncode == code, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert told in errors[0]
    assert login.jobs() == []


def test_a_time_limit_above_the_partitions_is_not_waited_for(login: Login) -> None:
    done = login.up("slurm.partition=debug", "slurm.time=20m", check=False)
    assert done.returncode == 4
    assert "PartitionTimeLimit" in done.stderr
    assert login.jobs() == []


def test_a_job_that_an_administrator_ends_says_so(login: Login) -> None:
    login.up()
    login.cluster.scancel(login.job())
    eventually(lambda: login.status()["phase"] == "stopped", "stopped", 30)
    told = login.status()
    assert "was cancelled" in told["reason"]
    assert login.run("down", login.name).returncode == 0
    eventually(lambda: login.jobs() == [], "no job", 30)


def test_a_warning_ahead_of_the_time_limit_drains_and_ends(login: Login) -> None:
    with served(login):
        login.cluster.run_as_user(["scancel", "--batch", "--signal=USR1", login.job()])
        eventually(lambda: login.status()["phase"] == "stopped", "stopped", 60)
        assert login.status()["job"]["state"] == "COMPLETED"
        assert "deployment.told_to_end" in login.run("events", login.name).stdout


def test_up_on_a_name_that_runs_as_a_job_changes_what_runs(login: Login) -> None:
    with served(login):
        again = login.up()
        assert f"{login.name} runs with this recipe already" in again.stderr
        refused = login.up("roles.aggregated.replicas=3", check=False)
        assert refused.returncode == 2
        assert "there is nobody to ask" in refused.stderr
        done = login.up("roles.aggregated.replicas=3", args=("--yes",))
        assert "+ aggregated-2" in done.stderr
        assert "done, ready 3/3" in done.stderr
        assert {row["restarts"] for row in login.ps()} == {0}
        assert len(login.jobs()) == 1


def test_slurm_that_does_not_answer_is_not_a_job_that_ended(login: Login) -> None:
    with served(login):
        with login.cluster.slurmctld_down():
            told = login.run("status", login.name)
            assert "ready" in told.stdout.splitlines()[0]
            assert '"status":"ready"' in login.health()
            refused = login.up(check=False)
            assert refused.returncode == 8
            assert "did not answer" in refused.stderr
        eventually(lambda: login.status()["job"]["state"] == "RUNNING", "known again", 60)


def test_an_engine_that_cannot_start_ends_the_job_with_its_own_words(login: Login) -> None:
    done = login.up("engine.args.fault-die-at-start=no such kernel", check=False)
    assert done.returncode == 5
    assert "no such kernel" in done.stderr
    assert login.jobs() == []


def test_the_script_alone_serves_on_the_nodes_it_is_given(login: Login, cluster: Cluster) -> None:
    cluster.run_as_user(["mkdir", "-p", login.home])
    script = Path(__file__).resolve().parents[2] / "slurm" / "serve.sbatch"
    wrapper = login.home / "dynctl"
    text = f'#!/bin/sh\nexec "{cluster.python}" -m dynctl.cli.main "$@"\n'
    cluster.run_as_user(["sh", "-c", 'cat > "$0"; chmod 755 "$0"', wrapper], input=text)
    argv = [
        *("sbatch", "--parsable", f"--job-name={login.name}", "--nodes=2", "--gpus-per-node=1"),
        *(f"--chdir={login.home}", "serve.sbatch", "quickstart", "--set", f"name={login.name}"),
        *("--set", "frontend.port=0"),
    ]
    env = {"DYNCTL": str(wrapper), "DYNCTL_HOME": str(login.home)}
    cluster.run_as_user(["sh", "-c", 'cat > "$0"', login.home / "serve.sbatch"], input=script.read_text())
    job = cluster.run_as_user(argv, env=env, cwd=login.home).stdout.strip()
    log = login.home / f"dynctl-{job}.log"

    def ready() -> bool:
        done = login.run("status", login.name, "--json", check=False)
        return done.returncode == 0 and json.loads(done.stdout)["ready"]

    eventually(ready, f"ready: {log}", READY_S)
    assert '"status":"ready"' in login.health()
    (told,) = [line for line in log.read_text().splitlines() if "deployment.ready" in line]
    assert told.endswith(f"deployment.ready url={login.url()}")
    cluster.scancel(job)
    assert cluster.await_job(job) in ("CANCELLED", "COMPLETED")


def test_prefill_and_decode_in_parts_of_their_own(login: Login) -> None:
    sets = (
        "roles={prefill: {replicas: 1}, decode: {replicas: 1}}",
        "slurm={het: {prefill: {partition: debug}, decode: {gpus_per_node: 2}}, time: 5m}",
    )
    words = [w for one in (f"name={login.name}", "frontend.port=0", *sets) for w in ("--set", one)]
    login.run("up", "quickstart", "--target", "slurm", "-d", *words)
    try:
        rows = {row["role"]: row["node"] for row in login.ps()}
        assert rows["prefill"] != rows["decode"]
        assert len(login.jobs()) == 2
        killed = next(row for row in login.ps() if row["role"] == "decode")
        login.cluster.run_as_user(["kill", "-9", str(killed["engine_pid"])], host=killed["node"])

        def again() -> bool:
            return any(r["role"] == "decode" and r["ready"] and r["restarts"] for r in login.ps())

        eventually(again, "started again in its part of the job", 60)
    finally:
        login.run("down", login.name, "--timeout", "5s", check=False)
    eventually(lambda: login.jobs() == [], "both parts ended", 30)


def test_a_lost_node_costs_its_workers_and_not_the_service(login: Login) -> None:
    with served(login, "slurm.no_kill=true", "slurm.follow_up=false", "slurm.nodes=2"):
        nodes = {row["instance"]: row["node"] for row in login.ps()}
        lost = nodes["aggregated-1"]
        assert lost != nodes["frontend-0"]
        with login.cluster.off(lost):
            eventually(lambda: login.status()["phase"] == "degraded", "degraded", 60)
            body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 4})
            ask = [
                "curl",
                "-s",
                "-H",
                "content-type: application/json",
                f"{login.url()}/v1/completions",
                "-d",
                body,
            ]
            assert '"choices"' in login.cluster.run_as_user(ask).stdout
            assert login.run("down", login.name, "--timeout", "5s").returncode == 0
            assert login.jobs() == []


def test_workers_of_a_lost_node_are_ready_on_a_spare_one(login: Login) -> None:
    with served(login, "slurm.spares=1", "slurm.nodes=2"):
        nodes = {row["instance"]: row["node"] for row in login.ps()}
        lost = nodes["aggregated-1"]
        assert len(set(nodes.values())) == 2
        with login.cluster.off(lost):

            def moved() -> bool:
                rows = {row["instance"]: row for row in login.ps()}
                return (
                    bool(rows["aggregated-1"]["ready"]) and rows["aggregated-1"]["node"] not in nodes.values()
                )

            eventually(moved, "ready on the spare node", 60)
            assert login.status()["ready"]
            assert login.run("down", login.name, "--timeout", "5s").returncode == 0
            assert login.jobs() == []


RESUBMIT = ("slurm.time=10m", "slurm.warning=30", "slurm.resubmit=60")


def test_a_successor_takes_the_name_before_the_old_job_drains(login: Login) -> None:
    with served(login, *RESUBMIT) as url:
        first = login.job()
        login.cluster.run_as_user(["scancel", "--batch", "--signal=USR1", first])
        eventually(lambda: login.job() != first, "another job has the name", 90)
        assert login.url() != url
        assert '"status":"ready"' in login.health(), "the name never means what does not serve"
        assert login.cluster.await_job(first, "COMPLETED", timeout=60) == "COMPLETED"
        assert login.status()["ready"]


def test_down_ends_the_successor_too(login: Login) -> None:
    with served(login, *RESUBMIT):
        login.cluster.run_as_user(["scancel", "--batch", "--signal=USR1", login.job()])
        eventually(lambda: len(login.jobs()) == 2, "a successor", 60)
    eventually(lambda: login.jobs() == [], "both ended", 60)


def test_a_successor_that_slurm_refuses_is_tried_again_while_the_old_job_serves(login: Login) -> None:
    with served(login, *RESUBMIT):
        first = login.job()
        with login.cluster.partition_closed("gpu"):
            login.cluster.run_as_user(["scancel", "--batch", "--signal=USR1", first])
            eventually(lambda: "successor.refused" in login.run("events", login.name).stdout, "refused", 60)
            told = login.run("status", login.name).stdout
            assert "no successor: Slurm refuses the job: " in told
            assert login.status()["phase"] == "ready"
        eventually(lambda: login.job() != first, "another job has the name", 120)
        told = login.run("status", login.name).stdout
        assert "no successor" not in told
        assert login.cluster.await_job(first, "COMPLETED", timeout=60) == "COMPLETED"
