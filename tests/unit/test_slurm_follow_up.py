"""Follow-up jobs: when one is asked for, used and given back; its script; how steps in it are started."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dynctl.command import Command
from dynctl.controller import slurm_follow_jobs
from dynctl.controller.follow_ups import (
    Act,
    Avoid,
    Forget,
    Lacking,
    Nodes,
    Release,
    Seen,
    Submit,
    Take,
    decide,
)
from dynctl.controller.moving import Lack
from dynctl.controller.slurm_follow_jobs import FollowUpJobs, Ways
from dynctl.controller.slurm_follow_up import SlurmFollowUps
from dynctl.deploy.home import RunDir
from dynctl.deploy.slurm_follow_up import follow_up_script
from dynctl.deploy.slurm_script import JobContext
from dynctl.deploy.slurm_size import Size
from dynctl.errors import LaunchError, RecipeError
from dynctl.launchers.base import Launch, RunRef
from dynctl.launchers.slurm_client import JobRow, SlurmClient
from dynctl.launchers.slurm_follow import FollowUp, load_follow_ups, save_follow_ups
from dynctl.launchers.slurm_job import JobRecord
from dynctl.launchers.slurm_step import JobSite, step_argv
from dynctl.recipe.load import load_recipe

RECIPE = """\
schema: dynctl/v1
name: demo
model: {path: org/model}
backend: vllm
target: slurm
roles: {prefill: {replicas: 1}, decode: {replicas: 4}}
slurm:
  {partition: gpu, account: llm, qos: high, gpus_per_node: 2, no_kill: true, nodelist: "n[1-3]", exclude: n9,
   time: 4h, sbatch_args: {begin: now+1hour, mail-type: END}}
"""
STARTED = "2026-11-28T08:00:00"


def follow_up(*nodes: str, part: int = 0, avoid: tuple[str, ...] = ()) -> FollowUp:
    job = JobRecord(job_id="8", name="demo-1.follow-1", submitted_at=0.0)
    return FollowUp(job=job, wanted=1, part=part, nodes=nodes, avoid=avoid, started=STARTED if nodes else "")


def row(state: str, **more: str) -> JobRow:
    return JobRow(**{"id": "8", "name": "demo-1.follow-1", "state": state, "start": STARTED, **more})  # type: ignore[arg-type]


def acts(
    lacking: dict[int, int], one: FollowUp | None = None, seen: JobRow | None = None, **nodes: list[str]
) -> list[Act]:
    wanted = [Lacking(part, count) for part, count in lacking.items()]
    return decide(
        wanted, [Seen(one, seen, fresh=True, waited_s=60.0)] if one is not None else [], Nodes(**nodes)
    )


def test_one_is_asked_for_once_and_not_again_while_it_waits() -> None:
    assert acts({0: 1}) == [Submit(0, 1)]
    assert acts({0: 1}, follow_up(), None) == [], "submitted, and not listed yet"
    assert acts({0: 1}, follow_up(), row("PENDING")) == []
    assert acts({0: 3}, follow_up(), row("PENDING")) == [Submit(0, 2)], "two more nodes were lost"
    assert acts({1: 1}, follow_up(part=0), row("PENDING")) == [
        Release(follow_up(), "it is no longer needed"),
        Submit(1, 1),
    ]


def test_one_that_runs_is_used_and_its_idle_nodes_count() -> None:
    assert acts({0: 1}, follow_up(), row("RUNNING")) == [Take(follow_up(), row("RUNNING"))]
    assert acts({0: 1}, follow_up(), row("CONFIGURING")) == []
    assert acts({0: 1}, follow_up("n5"), row("RUNNING")) == [], "workers are about to be moved there"
    assert acts({0: 1}, follow_up("n5"), row("RUNNING"), used=["n5"]) == [Submit(0, 1)]
    assert acts({0: 1}, follow_up("n5"), row("RUNNING"), lost=["n5"]) == [Submit(0, 1)]


def test_one_that_nobody_needs_is_given_back() -> None:
    assert [type(act) for act in acts({}, follow_up(), row("PENDING"))] == [Release]
    assert [type(act) for act in acts({}, follow_up("n5"), row("RUNNING"))] == [Release]
    assert acts({}, follow_up("n5"), row("RUNNING"), used=["n5"]) == []


def test_one_that_has_ended_or_will_never_start_is_told_with_the_reason() -> None:
    (over, again) = acts({0: 1}, follow_up("n5"), row("NODE_FAIL", nodes="n5"), used=["n5"])
    assert isinstance(over, Forget)
    assert over.why == "job 8 on n5 lost a node"
    assert again == Submit(0, 1)
    (never, _) = acts({0: 1}, follow_up(), row("PENDING", reason="PartitionTimeLimit"))
    assert isinstance(never, Release)
    assert never.failed
    assert "PartitionTimeLimit" in never.why


def test_one_that_slurm_has_started_anew_is_not_the_one_that_was_used() -> None:
    """Its nodes may be others now, and what ran on the ones before has been ended."""
    for now in (row("PENDING"), row("RUNNING", start="2026-11-28T09:00:00")):
        (act,) = acts({}, follow_up("n5"), now, used=["n5"])
        assert isinstance(act, Release)
        assert act.failed


def test_one_that_waits_may_have_the_lost_node_once_that_is_back() -> None:
    waits, back = follow_up(avoid=("n1", "n2")), row("PENDING")
    assert acts({0: 1}, waits, back, lost=["n2"], returned=["n2"]) == [Avoid(waits, back, ("n1",))]
    assert acts({0: 1}, waits, back, lost=["n2"]) == []


def test_its_script_asks_for_nodes_of_the_same_kind_and_starts_nothing(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE)
    loaded = load_recipe(file, environ={"HOME": str(tmp_path)})
    context = JobContext("demo-1.follow-1", "/runs/demo-1", "/py", "/home")
    text = follow_up_script(loaded, context, 0, Size(2, 2), {"n2", "n1"}, 3600.0)
    lines = text.splitlines()
    wanted = {"job-name=demo-1.follow-1", "partition=gpu", "account=llm", "qos=high", "nodes=2", "no-kill"}
    wanted |= {"gpus-per-node=2", "time=0-01:00:00", "exclude=n9,n1,n2", "mail-type=END", "no-requeue"}
    assert wanted <= {line.removeprefix("#SBATCH --") for line in lines}
    assert not any(
        word in text for word in ("nodelist", "begin=", "--signal", "controller.log", "slurm_keeper")
    )
    assert lines[-1] == "exec /py -u -m dynctl.controller.slurm_holder --run-dir /runs/demo-1"
    with pytest.raises(RecipeError, match="too short"):
        follow_up_script(loaded, context, 0, Size(1, 2), (), 90.0)


def test_a_step_in_another_job_sees_nothing_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
    monkeypatch.setenv("SLURM_CONF", "/c")
    site = JobSite("7", {"n1": 0, "n2": 1}, ("7", "8"), {"n5": "9", "n2": "10"})
    assert site.jobs == "7,8,9,10"
    argv = step_argv(site, Launch("decode-0", 1, Command(("x",)), "n5"), RunRef("r", Path("/r")))
    assert argv[1:3] == ("--jobid=9", "--overlap")
    assert site.way_to("n1") == ("--het-group=0",)
    assert site.way_to("n2") == ("--jobid=10",), "it came back in another job"
    assert "SLURM_JOB_NODELIST" in site.withheld("n5")
    assert "SLURM_CONF" not in site.withheld("n5")
    assert "SLURM_JOB_NODELIST" not in site.withheld("n1")


def test_what_is_kept_of_them_is_read_again(tmp_path: Path) -> None:
    assert load_follow_ups(tmp_path) == []
    save_follow_ups(tmp_path, [follow_up("n5", avoid=("n1",))])
    assert load_follow_ups(tmp_path) == [follow_up("n5", avoid=("n1",))]


def grows(job: str, *nodes: str, waited_s: float = 30.0, **more: str) -> Seen:
    """A job for one more replica."""
    record = JobRecord(job_id=job, name=f"demo-1.follow-{job}", submitted_at=0.0)
    made = FollowUp(job=record, wanted=1, nodes=nodes, started=STARTED if nodes else "", grows=True)
    state = "RUNNING" if nodes else "PENDING"
    return Seen(made, row(**{"id": job, "state": state, **more}), waited_s=waited_s)


def test_each_set_of_nodes_that_is_of_use_by_itself_is_a_job_of_its_own() -> None:
    more = [Lacking(0, 1, grows=True), Lacking(0, 2, grows=True), Lacking(0, 1)]
    assert decide(more, [], Nodes()) == [
        Submit(0, 1),
        Submit(0, 1, grows=True),
        Submit(0, 2, grows=True),
    ]
    assert decide(more, [grows("8")], Nodes()) == [Submit(0, 1, grows=True), Submit(0, 2, grows=True)]


def test_of_more_than_is_wanted_those_that_wait_go_first_and_none_in_use() -> None:
    runs, idle, waits = grows("8", "n5"), grows("9", "n6"), grows("10")
    used = Nodes(used=["n5"])
    assert decide([], [waits, idle, runs], used) == [
        Release(idle.follow_up, "nothing runs on its nodes"),
        Release(waits.follow_up, "it is no longer needed"),
    ]
    more = [Lacking(0, 1, grows=True)]
    assert decide(more, [waits, idle, runs], used) == [Release(waits.follow_up, "it is no longer needed")]


def test_one_that_waits_too_long_for_more_replicas_is_given_up_but_never_one_for_a_lost_node() -> None:
    more = [Lacking(0, 1, grows=True)]
    late = grows("8", waited_s=61.0, reason="Resources")
    assert decide(more, [grows("8", waited_s=59.0)], Nodes(), 60.0) == []
    assert decide(more, [late], Nodes(), 0.0) == [], "without a limit"
    (given_up, _) = decide(more, [late], Nodes(), 60.0)
    assert isinstance(given_up, Release)
    assert given_up.failed
    assert "Resources" in given_up.why
    assert "slurm.grow_within, 60 s" in given_up.why
    waits = Seen(follow_up(), row("PENDING"), waited_s=9999.0)
    assert decide([Lacking(0, 1)], [waits], Nodes(), 60.0) == []


def test_one_that_waits_keeps_off_nodes_that_another_has_got() -> None:
    """Two jobs on one node would each count its GPUs from 0."""
    waits = grows("9")
    acts_now = decide([Lacking(0, 1, grows=True)], [waits, grows("8", "n5")], Nodes(used=["n5"]))
    assert acts_now == [Avoid(waits.follow_up, waits.row, ("n5",))]  # type: ignore[arg-type]


def test_nodes_that_must_be_of_one_job_are_not_made_up_of_several() -> None:
    whole = [Lacking(0, 2, whole=True)]
    assert decide(whole, [], Nodes()) == [Submit(0, 2)]
    assert Submit(0, 2) in decide(whole, [grows("8"), grows("9")], Nodes())
    assert decide([*whole, Lacking(0, 1)], [], Nodes()) == [Submit(0, 2), Submit(0, 1)]


def test_the_next_job_waits_until_it_is_known_which_nodes_the_one_before_gets() -> None:
    more = [Lacking(0, 1, grows=True), Lacking(0, 1, grows=True)]
    assert decide(more, [grows("8", waited_s=1.0)], Nodes()) == [], "Slurm has not looked at it"
    waits = grows("8", waited_s=1.0, reason="Resources")
    assert decide(more, [waits], Nodes()) == [Submit(0, 1, grows=True)]
    started = Seen(waits.follow_up, row("CONFIGURING", nodes="n5"), waited_s=1.0)
    assert decide(more, [started], Nodes()) == [Submit(0, 1, grows=True)], "it is known which to avoid"
    assert decide(more, [grows("8", waited_s=11.0)], Nodes()) == [Submit(0, 1, grows=True)]


def test_a_job_whose_node_is_dead_is_told_of_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `srun` says of it is several lines."""

    def dead(*args: object) -> None:
        raise LaunchError("it failed on one of n5:\n  srun: Job step created\n  srun: error: n5: No route")

    (tmp_path / "recipe.lock.yaml").write_text(RECIPE)
    monkeypatch.setattr(slurm_follow_jobs, "run_on", dead)
    monkeypatch.setattr(slurm_follow_jobs, "hosts_of_job", lambda *args: ())
    client: Any = SimpleNamespace(hostnames=lambda nodes: [nodes])
    with pytest.raises(LaunchError) as raised:
        FollowUpJobs(ways_of(tmp_path, client), [follow_up()]).take(
            lacking("n2"), follow_up(), row("RUNNING", nodes="n5")
        )
    assert raised.value.message == (
        "job 8 was given n5, where nothing can be started: srun: error: n5: No route"
    )


async def test_why_a_job_did_not_help_is_told_while_a_node_is_lacking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FollowUpJobs, "forget", lambda *args: None)
    more = SlurmFollowUps(ways_of(tmp_path, SlurmClient()), [follow_up()])
    lack = more._lack = lacking("node+1")
    await more._let_go(lack, "follow_up.released", Release(follow_up(), "job 8 was given n5", failed=True))
    assert more.told() == "job 8 was given n5: another job is asked for"
    more._lack = lacking()
    assert more.told() == "", "nothing is lacking any more"


def ways_of(tmp_path: Path, client: SlurmClient) -> Ways:
    """Ways of a deployment in job 7 on n1."""
    fleet: Any = SimpleNamespace(part=lambda *args: None)
    return Ways(RunDir(tmp_path), client, fleet, JobSite("7"), ["n1"], lambda *args: None)


def lacking(*nodes: str) -> Lack:
    """These nodes are lacking."""
    plan: Any = SimpleNamespace()
    return Lack(frozenset(nodes), frozenset(), frozenset({"n1"}), plan)
