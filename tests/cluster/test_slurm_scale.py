"""`dynctl scale` beyond the nodes of a job, on a real Slurm: other jobs bring more, and are given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.cluster.commands import eventually
from tests.cluster.gpu_engines import gpu_engines
from tests.cluster.login import Login

pytestmark = pytest.mark.timeout(300)


def workers(login: Login) -> dict[str, str]:
    """Node of each worker that is ready."""
    return {r["instance"]: r["node"] for r in login.ps() if r["role"] != "frontend" and r["ready"]}


def test_replicas_without_room_come_with_a_job_and_it_goes_with_them(login: Login) -> None:
    with gpu_engines(login):
        assert len(login.jobs()) == 1
        done = login.run("scale", "aggregated=3", "--name", login.name)
        assert "aggregated-1 awaits a node" in done.stderr
        assert "done, ready 3/3" in done.stderr
        nodes = workers(login)
        assert len(set(nodes.values())) == 3, nodes
        assert len(login.jobs()) == 3
        told = login.status()
        assert told["ready"]
        assert [one["state"] for one in told["job"]["follow_ups"]] == ["RUNNING"] * 2
        assert '"status":"ready"' in login.health()
        login.run("scale", "aggregated=2", "--name", login.name)
        eventually(lambda: len(login.jobs()) == 2, "the job of aggregated-2 is cancelled", 30)
        assert set(workers(login)) == {"aggregated-0", "aggregated-1"}
        login.run("scale", "aggregated=1", "--name", login.name)
        eventually(lambda: len(login.jobs()) == 1, "none but its own", 30)
        events = login.run("events", login.name).stdout
        assert events.count("follow_up.released") == 2
        assert "node.lost" not in events, "a node that is given back is not lost"
        assert login.run("down", login.name).returncode == 0
        assert login.jobs() == []


@contextmanager
def others_busy(login: Login, nodes: int = 3) -> Iterator[None]:
    """Nothing is free on the nodes where the deployment is not."""
    login.cluster.sbatch(
        "sleep 600", f"-N{nodes}", "--exclusive", "--time=10", f"--job-name={login.name}-busy"
    )
    busy = next(job.id for job in login.cluster.squeue() if job.name.endswith("-busy"))
    try:
        login.cluster.await_job(busy, "RUNNING")
        yield
    finally:
        login.cluster.scancel(busy)
        login.cluster.await_job(busy)


def own_jobs(login: Login) -> list[str]:
    """States of the deployment's jobs."""
    jobs = [job for job in login.cluster.squeue() if login.name in job.name]
    return sorted(job.state for job in jobs if not job.name.endswith("-busy"))


def test_one_that_waits_says_why_and_is_cancelled_when_it_is_wanted_no_more(login: Login) -> None:
    with gpu_engines(login):
        with others_busy(login):
            begun = login.run("scale", "aggregated=2", "--name", login.name, "--no-wait")
            assert "begun, ready 1/2" in begun.stderr
            eventually(lambda: login.status()["job"]["follow_ups"] != [], "a job", 30)
            eventually(lambda: "follow_up.pending" in login.run("events", login.name).stdout, "a reason", 30)
            eventually(lambda: login.status()["job"]["follow_ups"][0]["start"], "an estimated start", 60)
            told = login.status()
            assert (told["phase"], told["ready"]) == ("ready", True), "it serves as before"
            assert told["changing"] == "aggregated-1 awaits a node"
            (waits,) = told["job"]["follow_ups"]
            assert (waits["state"], bool(waits["reason"])) == ("PENDING", True)
            shown = login.run("ps", login.name).stderr
            assert f"for 1 node more, job {waits['id']} is pending in partition gpu: " in shown
            start = f"estimated start {waits['start'][:10]}"  # the controller looks every few seconds
            eventually(lambda: start in login.run("ps", login.name).stderr, "the same start in ps", 60)
            (row,) = [row for row in login.ps() if row["instance"] == "aggregated-1"]
            assert (row["state"], row["node"], row["ready"]) == ("waiting", "node+1", False)
            login.run("scale", "aggregated=1", "--name", login.name)
            eventually(lambda: own_jobs(login) == ["RUNNING"], "cancelled", 30)
            login.run("scale", "aggregated=2", "--name", login.name, "--no-wait")
            eventually(lambda: own_jobs(login) == ["PENDING", "RUNNING"], "another one", 30)
        eventually(lambda: len(set(workers(login).values())) == 2, "ready once nodes are free", 60)
        assert login.status()["changing"] == ""


def test_one_that_waits_too_long_is_given_up_with_one_message(login: Login) -> None:
    with gpu_engines(login, "slurm.grow_within=4"), others_busy(login):
        done = login.run("scale", "aggregated=2", "--name", login.name, check=False)
        assert done.returncode == 4, done.stderr
        (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert "longer than slurm.grow_within, 4 s; it stays at aggregated=1" in error
        told = login.status()
        assert (told["counts"], told["phase"], told["changing"]) == ("1/1", "ready", "")
        assert "aggregated=2: job " in told["declined"]
        assert own_jobs(login) == ["RUNNING"]
        assert '"status":"ready"' in login.health()


def test_one_that_slurm_refuses_is_given_up_with_its_words(login: Login) -> None:
    with gpu_engines(login):
        with login.cluster.partition_closed("gpu"):
            done = login.run("scale", "aggregated=2", "--name", login.name, check=False)
        assert done.returncode == 4, done.stderr
        (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert "aggregated=2: Slurm refuses the job: " in error
        assert "it stays at aggregated=1" in error
        assert (login.status()["counts"], login.status()["phase"]) == ("1/1", "ready")
        again = login.run("scale", "aggregated=2", "--name", login.name)
        assert "done, ready 2/2" in again.stderr
        assert login.status()["declined"] == ""


def test_down_ends_the_jobs_that_run_and_that_wait(login: Login) -> None:
    with gpu_engines(login):
        login.run("scale", "aggregated=2", "--name", login.name)
        with others_busy(login, 2):
            login.run("scale", "aggregated=3", "--name", login.name, "--no-wait")
            eventually(lambda: own_jobs(login) == ["PENDING", "RUNNING", "RUNNING"], "one waits", 30)
            assert login.run("down", login.name).returncode == 0
            assert own_jobs(login) == []


def kill_controller(login: Login) -> None:
    """SIGKILL, and until another one answers."""
    before = login.status()["controller_pid"]
    head = next(row["node"] for row in login.ps() if row["role"] == "frontend")
    login.cluster.run_as_user(["kill", "-9", str(before)], host=head)
    eventually(lambda: login.status()["controller_pid"] not in (0, before), "another controller", 30)


def test_a_killed_controller_finds_the_jobs_that_run_and_that_wait_again(login: Login) -> None:
    with gpu_engines(login):
        login.run("scale", "aggregated=2", "--name", login.name)
        with others_busy(login, 2):
            login.run("scale", "aggregated=3", "--name", login.name, "--no-wait")
            eventually(lambda: own_jobs(login) == ["PENDING", "RUNNING", "RUNNING"], "one waits", 30)
            before = {job.id for job in login.cluster.squeue()}
            kill_controller(login)
            eventually(lambda: login.status()["ready"], "ready", 30)
            eventually(lambda: "for 1 node more" in login.run("ps", login.name).stderr, "looked at", 30)
            assert {job.id for job in login.cluster.squeue()} == before, "nothing lost, nothing doubled"
            assert {row["restarts"] for row in login.ps()} == {0}
        eventually(lambda: len(set(workers(login).values())) == 3, "ready on the third node", 60)
        assert own_jobs(login) == ["RUNNING"] * 3


def test_parts_of_a_job_grow_each_by_nodes_of_its_own_kind(login: Login) -> None:
    sets = (
        "roles={prefill: {replicas: 1, tensor_parallel: 2}, decode: {replicas: 1, tensor_parallel: 4}}",
        "slurm={het: {prefill: {gpus_per_node: 2}, decode: {gpus_per_node: 4}}, time: 10m, comment: grows}",
    )
    with gpu_engines(login, *sets):
        before = {job.id for job in login.cluster.squeue()}
        done = login.run("scale", "decode=2", "--name", login.name)
        assert "done, ready 2/2D 1/1P" in done.stderr
        (more,) = {job.id for job in login.cluster.squeue()} - before
        asked = login.cluster.run_as_user(["scontrol", "show", "job", more]).stdout
        assert "gres:gpu:4" in asked
        kill_controller(login)
        eventually(lambda: login.status()["ready"], "ready", 30)
        assert {row["restarts"] for row in login.ps()} == {0}
        login.run("scale", "decode=1", "prefill=2", "--name", login.name)
        eventually(lambda: more not in {job.id for job in login.cluster.squeue()}, "given back", 90)
        assert len(set(workers(login).values())) == 3


def test_up_with_more_replicas_on_a_name_that_runs_asks_for_nodes_too(login: Login) -> None:
    with gpu_engines(login) as started:
        more = ("--set", "roles.aggregated.replicas=2", "--set", "slurm.nodes=2", "--yes")
        done = login.run(*started.up, *more)
        assert "+ aggregated-1" in done.stderr
        assert "done, ready 2/2" in done.stderr
        assert len(set(workers(login).values())) == 2
        assert {row["restarts"] for row in login.ps()} == {0}
        back = login.run("rollback", login.name, "--yes")
        assert "- aggregated-1" in back.stderr
        eventually(lambda: own_jobs(login) == ["RUNNING"], "given back", 30)


def test_a_node_of_such_a_job_that_is_lost_is_made_up_for_by_another_job(login: Login) -> None:
    with gpu_engines(login):
        login.run("scale", "aggregated=2", "--name", login.name)
        lost = workers(login)["aggregated-1"]
        with login.cluster.off(lost):
            there = {"", lost}
            eventually(lambda: workers(login).get("aggregated-1", "") not in there, "ready elsewhere", 90)
            assert login.status()["ready"]
            eventually(lambda: len(login.status()["job"]["follow_ups"]) == 1, "the other is given back", 60)
            assert login.run("down", login.name, "--timeout", "5s").returncode == 0


def test_a_successor_has_as_many_nodes_as_the_deployment_has_grown_to(login: Login) -> None:
    with gpu_engines(login, "slurm.time=10m", "slurm.warning=30", "slurm.resubmit=60"):
        login.run("scale", "aggregated=2", "--name", login.name)
        first = login.job()
        login.cluster.run_as_user(["scancel", "--batch", "--signal=USR1", first])
        eventually(lambda: login.job() != first, "another job has the name", 90)
        assert login.status()["ready"]
        assert len(set(workers(login).values())) == 2
        eventually(lambda: own_jobs(login) == ["RUNNING"], "the old ones ended", 60)


def test_the_planner_grows_beyond_the_job_within_its_budget(login: Login) -> None:
    rules = "planner={load_interval: 1, max_gpus: 4, roles: {aggregated: {min_replicas: 2}}}"
    with gpu_engines(login, "sla={ttft: 1}", rules):
        eventually(lambda: len(set(workers(login).values())) == 2, "a second replica on another node", 60)
        assert len(login.status()["job"]["follow_ups"]) == 1
        assert "planner.scaled" in login.run("events", login.name).stdout


def test_a_new_controller_places_nothing_on_a_node_whose_job_ended_before_it(login: Login) -> None:
    with gpu_engines(login):
        own = {job.id for job in login.cluster.squeue()}
        login.run("scale", "aggregated=2", "--name", login.name)
        lost = workers(login)["aggregated-1"]
        (more,) = {job.id for job in login.cluster.squeue()} - own
        login.cluster.scancel(more)
        there = {"", lost}
        eventually(lambda: workers(login).get("aggregated-1", "") not in there, "ready elsewhere", 90)
        kill_controller(login)
        done = login.run("scale", "aggregated=3", "--name", login.name)
        assert "done, ready 3/3" in done.stderr
        assert len(set(workers(login).values())) == 3
        assert "node configuration is not available" not in login.run("events", login.name).stdout
