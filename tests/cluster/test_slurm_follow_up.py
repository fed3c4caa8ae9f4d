"""Follow-up jobs on a real Slurm: a node is lost and none is spare, another job gives one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.cluster.commands import eventually
from tests.cluster.gpu_engines import gpu_engines
from tests.cluster.login import Login, served

pytestmark = pytest.mark.timeout(300)


def workers(login: Login) -> dict[str, str]:
    """Node of each worker that is ready."""
    return {r["instance"]: r["node"] for r in login.ps() if r["role"] == "aggregated" and r["ready"]}


def moved(login: Login, before: dict[str, str]) -> bool:
    """Whether aggregated-1 is ready on a node where nobody was before."""
    node = workers(login).get("aggregated-1", "")
    return bool(node) and node not in before.values()


def test_workers_of_a_lost_node_are_ready_on_one_of_a_follow_up_job(login: Login) -> None:
    with served(login, "slurm.no_kill=true", "slurm.nodes=2", "engine.args.speedup=0.1") as url:
        before = workers(login)
        lost = before["aggregated-1"]
        body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 200, "stream": True})
        ask = ["curl", "-sN", "-H", "content-type: application/json", f"{url}/v1/completions", "-d", body]
        with ExitStack() as stack:
            streams = [stack.enter_context(login.cluster.spawn_as_user(ask)) for _ in range(4)]
            eventually(lambda: all("data:" in one.said() for one in streams), "first tokens", 20)
            stack.enter_context(login.cluster.off(lost))
            eventually(lambda: moved(login, before), "ready on a node of another job", 90)
            assert len(login.jobs()) == 2
            assert login.status()["ready"]
            told = login.status()["job"]["follow_ups"]
            assert [(one["state"], one["nodes"]) for one in told] == [
                ("RUNNING", workers(login)["aggregated-1"])
            ]
            assert [one.wait() for one in streams] == [0] * 4
            assert all(one.said().rstrip().endswith("data: [DONE]") for one in streams)
            assert not any('"error"' in one.said() for one in streams)
            events = login.run("events", login.name).stdout
            assert "follow_up.submitted" in events
            assert "follow_up.started" in events
            assert login.run("down", login.name, "--timeout", "5s").returncode == 0
            assert login.jobs() == []


@contextmanager
def others_busy(login: Login) -> Iterator[None]:
    """Nothing is free on the nodes where the deployment is not."""
    login.cluster.sbatch("sleep 600", "-N2", "--exclusive", f"--job-name={login.name}-busy")
    busy = next(job.id for job in login.cluster.squeue() if job.name.endswith("-busy"))
    try:
        login.cluster.await_job(busy, "RUNNING")
        yield
    finally:
        login.cluster.scancel(busy)
        login.cluster.await_job(busy)


def test_one_that_waits_says_why_and_takes_the_lost_node_when_it_is_back(login: Login) -> None:
    with served(login, "slurm.no_kill=true", "slurm.nodes=2"), others_busy(login):
        before = workers(login)
        with login.cluster.off(before["aggregated-1"]):
            eventually(lambda: login.status()["job"]["follow_ups"] != [], "a follow-up job", 60)
            eventually(lambda: "follow_up.pending" in login.run("events", login.name).stdout, "a reason", 60)
            waits = login.status()["job"]["follow_ups"][0]
            assert (waits["state"], bool(waits["reason"])) == ("PENDING", True), waits
            assert "follow-up job" in login.run("status", login.name).stdout
            assert "for 1 node more, job" in login.run("ps", login.name).stderr
            # Long enough for Slurm itself to give the node up.
            lost = before["aggregated-1"]
            eventually(lambda: login.cluster.node_states()[lost].startswith("down"), "given up", 60)
        eventually(lambda: workers(login) == before, "ready on the node that is back", 90)
        assert [one["nodes"] for one in login.status()["job"]["follow_ups"]] == [lost]
        assert login.run("down", login.name, "--timeout", "5s").returncode == 0
        assert [job for job in login.jobs() if job.endswith("RUNNING")] == login.jobs()[:1], "the busy one"


def test_a_killed_controller_knows_lost_nodes_and_the_job_that_waits_for_one_again(login: Login) -> None:
    with served(login, "slurm.no_kill=true", "slurm.nodes=2"):
        before = workers(login)
        lost, head = before["aggregated-1"], before["aggregated-0"]
        with ExitStack() as stack:
            with others_busy(login):
                stack.enter_context(login.cluster.off(lost))
                eventually(lambda: login.status()["job"]["follow_ups"] != [], "a follow-up job", 60)
                jobs = {job.id for job in login.cluster.squeue()}
                killed = login.status()["controller_pid"]
                login.cluster.run_as_user(["kill", "-9", str(killed)], host=head)
                eventually(lambda: login.status()["controller_pid"] not in (0, killed), "another", 30)
                noted = "node.lost"
                eventually(lambda: login.run("events", login.name).stdout.count(noted) == 2, "lost again", 60)
                assert {job.id for job in login.cluster.squeue()} == jobs, "nothing lost, nothing doubled"
            eventually(lambda: moved(login, before), "ready on a node of the job that waited", 90)
            assert {job.id for job in login.cluster.squeue()} < jobs
            assert login.run("down", login.name, "--timeout", "5s").returncode == 0


def test_one_whose_deployment_died_ends_by_itself(login: Login) -> None:
    with served(login, "slurm.no_kill=true", "slurm.nodes=2"):
        before = workers(login)
        with login.cluster.off(before["aggregated-1"]):
            eventually(lambda: moved(login, before), "ready on a node of another job", 90)
            head = before["aggregated-0"]
            # The bracket keeps pgrep from finding the very command that it is a part of.
            found = login.cluster.run_as_user(["pgrep", "-f", "[s]lurm_keeper --run-dir"], host=head).stdout
            login.cluster.run_as_user(["kill", "-9", *found.split()], host=head)
            eventually(lambda: login.jobs() == [], "both jobs ended", 60)


def test_ranks_that_are_one_step_move_together_to_nodes_of_one_job(login: Login) -> None:
    """The node that is lost has ranks only, started by the engine's step: no worker of ours."""
    sets = ("backend=trtllm", "slurm.nodes=2", "slurm.no_kill=true", "slurm.mpi=none")
    with gpu_engines(login, *sets, "roles.aggregated.tensor_parallel=4"):
        (before,) = workers(login).values()
        jobs = login.cluster.squeue()
        nodes = login.cluster.run_as_user(["scontrol", "show", "hostnames", jobs[0].nodes]).stdout.split()
        (lost,) = set(nodes) - {before}
        with login.cluster.off(lost):
            eventually(lambda: workers(login).get("aggregated-0", before) != before, "ready elsewhere", 120)
            assert len(login.jobs()) == 2
            told = login.status()["job"]["follow_ups"]
            (there,) = [one["nodes"] for one in told]
            hosts = login.cluster.run_as_user(["scontrol", "show", "hostnames", there]).stdout.split()
            assert len(hosts) == 2
            assert not set(hosts) & set(nodes)
            assert '"status":"ready"' in login.health()
            assert login.run("down", login.name, "--timeout", "5s").returncode == 0
            assert login.jobs() == []
