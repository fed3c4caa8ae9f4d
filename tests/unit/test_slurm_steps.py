"""Processes as steps: their command lines, the GPUs and variables of what they start, the job's own nodes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from dynctl import procfs
from dynctl.command import Command
from dynctl.deploy.plan import Plan
from dynctl.deploy.planner import build_plan
from dynctl.deploy.seats import RunContext
from dynctl.deploy.slurm_inventory import gpus_by_node
from dynctl.deploy.slurm_size import assumed
from dynctl.errors import LaunchError, SlurmUnreachable
from dynctl.launchers import slurm_fleet
from dynctl.launchers.base import Launch, ProcessHandle, RunRef
from dynctl.launchers.fleet import Ended, Seated
from dynctl.launchers.slurm_client import SlurmClient, StepRow
from dynctl.launchers.slurm_fleet import SlurmFleet, exit_code
from dynctl.launchers.slurm_step import JobSite, step_argv, step_name
from dynctl.recipe.load import load_recipe
from dynctl.worker.step import engine_argv, engine_environment

RUN = RunRef("r-1", Path("/runs/r-1"))
RECIPE = """\
schema: dynctl/v1
name: demo
model: {path: org/model}
backend: BACKEND
target: slurm
roles: {aggregated: {tensor_parallel: 16}}
slurm: {gpus_per_node: 8}
"""


def plan(tmp_path: Path, backend: str, *sets: str) -> Plan:
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE.replace("BACKEND", backend))
    loaded = load_recipe(file, sets, environ={"HOME": str(tmp_path)})
    return build_plan(loaded, assumed(loaded), (), RunContext("r-1", "/runs/r-1", "python"))


def test_a_step_is_pinned_to_its_node_and_shares_it() -> None:
    launch = Launch("decode-0", 3, Command(("python", "-m", "x"), cwd="/runs/r-1"), "n7")
    argv = step_argv(JobSite("9"), launch, RUN)
    assert argv[0] == "srun"
    assert {"--overlap", "--nodes=1", "--ntasks=1", "--nodelist=n7", "--job-name=decode-0.i3"} <= set(argv)
    assert argv[-3:] == ("python", "-m", "x")


def test_a_node_of_another_part_of_the_job_is_reached_in_its_group() -> None:
    launch = Launch("decode-0", 1, Command(("x",)), "n7")
    assert "--het-group=1" in step_argv(JobSite("9", {"n1": 0, "n7": 1}), launch, RUN)


def test_steps_of_one_seat_are_told_apart_by_incarnation() -> None:
    assert step_name("decode-1", 1) != step_name("decode-1", 11) != step_name("decode-11", 1)


@pytest.mark.parametrize(("of_srun", "own"), [(0, 0), (3, 3), (137, -9), (143, -15), (None, None), (-9, -9)])
def test_an_end_by_signal_is_told_as_one(of_srun: int | None, own: int | None) -> None:
    assert exit_code(of_srun) == own


def test_gpus_are_counted_from_those_of_the_step() -> None:
    own = {"DYNCTL_STEP": "1", "CUDA_VISIBLE_DEVICES": "2,3,5,7", "HOME": "/h"}
    env = engine_environment(["vllm"], {"CUDA_VISIBLE_DEVICES": "1,3"}, own)
    assert env["CUDA_VISIBLE_DEVICES"] == "3,7"
    assert engine_argv(["srun", "env", "CUDA_VISIBLE_DEVICES=0,1", "x"], own)[2] == "CUDA_VISIBLE_DEVICES=2,3"


def test_ranks_in_a_follow_up_job_find_it_by_its_number() -> None:
    """What Slurm tells a step that was started from outside the job is about the step's own node."""
    told = {"SLURM_JOB_ID": "9", "SLURM_JOB_NODELIST": "n3", "SLURM_CONF": "/c"}
    own = {"DYNCTL_STEP": "1", "DYNCTL_STEP_JOB": "9", "HOME": "/h", **told}
    assert engine_argv(["srun", "--nodes=2", "x"], own) == ["srun", "--jobid=9", "--nodes=2", "x"]
    assert engine_argv(["x"], own) == ["x"]
    kept = engine_environment(["srun"], {}, own)
    assert {name for name in kept if name.startswith("SLURM")} == {"SLURM_CONF"}
    assert "SLURM_JOB_NODELIST" in engine_environment(["srun"], {}, {"DYNCTL_STEP": "1", **told})


@pytest.mark.parametrize("visible", ["", "0", "GPU-1234"])
def test_gpus_that_the_step_does_not_have_stay_as_planned(visible: str) -> None:
    own = {"DYNCTL_STEP": "1", "CUDA_VISIBLE_DEVICES": visible}
    assert engine_environment(["x"], {"CUDA_VISIBLE_DEVICES": "1"}, own)["CUDA_VISIBLE_DEVICES"] == "1"


def test_gpus_are_as_planned_where_there_is_no_slurm() -> None:
    own = {"CUDA_VISIBLE_DEVICES": "4,5", "SLURM_JOB_ID": "1"}
    env = engine_environment(["vllm"], {"CUDA_VISIBLE_DEVICES": "0"}, own)
    assert env == {"CUDA_VISIBLE_DEVICES": "0", "SLURM_JOB_ID": "1"}
    assert engine_argv(["srun", "x"], own) == ["srun", "x"]


def test_an_engine_does_not_take_itself_for_a_part_of_an_mpi_job() -> None:
    own = {
        "DYNCTL_STEP": "1",
        "SLURM_PROCID": "0",
        "PMI_RANK": "0",
        "PMIX_ID": "x",
        "SLURM_CONF": "/c",
        "A": "b",
    }
    assert engine_environment(["vllm"], {}, own) == {"DYNCTL_STEP": "1", "SLURM_CONF": "/c", "A": "b"}


def test_an_engine_that_is_a_step_finds_its_job_and_no_old_options() -> None:
    own = {"DYNCTL_STEP": "1", "DYNCTL_STEP_GROUP": "1", "SLURM_JOB_ID": "9", "SLURM_NTASKS": "1"}
    env = engine_environment(["srun"], {}, own)
    assert "SLURM_JOB_ID" in env
    assert "SLURM_NTASKS" not in env
    assert engine_argv(["srun", "x"], own) == ["srun", "--het-group=1", "x"]


def test_mpi_ranks_are_one_step_over_their_nodes(tmp_path: Path) -> None:
    argv = plan(tmp_path, "trtllm").process("aggregated-0/engine").command.argv
    assert argv[0] == "srun"
    assert {"--mpi=pmix", "--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "--overlap"} <= set(argv)
    assert "--nodelist=node-0,node-1" in argv
    ranks = argv[argv.index("env") :]
    assert ranks[1:4] == ("CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7", "trtllm-llmapi-launch", "trtllm-serve")
    assert "mpirun" not in argv


def test_a_pyxis_container_is_opened_around_the_engine_alone(tmp_path: Path) -> None:
    sets = (
        "engine.container=nvcr.io#nvidia/engine:1",
        "engine.runtime=pyxis",
        "engine.mounts=[/data:/data:ro]",
        "engine.env.HF_TOKEN=secret",
        "engine.env.HF_HOME=/hf",
    )
    made = plan(tmp_path, "trtllm", *sets)
    engine = made.process("aggregated-0/engine").command
    assert "--container-image=nvcr.io#nvidia/engine:1" in engine.argv
    assert "--container-mounts=/data:/data:ro,/runs/r-1:/runs/r-1,/hf:/hf" in engine.argv
    assert "apptainer" not in engine.argv
    assert not any("secret" in word for word in engine.argv), "other users can read command lines"
    assert engine.env["HF_TOKEN"] == "secret"
    assert not any("container" in word for word in made.process("aggregated-0").command.argv)


def test_apptainer_mounts_what_it_is_told(tmp_path: Path) -> None:
    sets = ("engine.container=/i.sif", "engine.mounts=[/data:/data:ro]", "roles.aggregated.tensor_parallel=8")
    argv = plan(tmp_path, "trtllm", *sets).process("aggregated-0/engine").command.argv
    assert argv[:6] == ("apptainer", "exec", "--nv", "--bind", "/data:/data:ro", "/i.sif")


def test_gpus_of_each_node_are_those_the_job_was_given() -> None:
    detail = (
        "JobId=2 JobName=x JOB_GRES=gpu:6   Nodes=n[1-2] CPU_IDs=0 Mem=500 GRES=gpu:3(IDX:0-2) "
        "Nodes=n5 CPU_IDs=0-1 Mem=0 GRES=gpu:a100:1(IDX:3),shard:4(0/4) Nodes=n6 CPU_IDs=0 Mem=0 GRES= X=1"
    )
    lists = {"n[1-2]": ["n1", "n2"], "n5": ["n5"], "n6": ["n6"]}
    assert gpus_by_node(detail, lists.__getitem__) == {"n1": 3, "n2": 3, "n5": 1}


async def test_nothing_is_started_on_a_node_that_is_given_back_until_it_is_given_again(
    tmp_path: Path,
) -> None:
    fleet = SlurmFleet(SlurmClient(), JobSite("7"), RunRef("r", tmp_path))
    fleet.join(["n5", "n6"], "8", ())
    fleet.part("8", (), ["n6"], "nothing runs on its nodes")
    assert [(news.node, news.reachable) for news in fleet.news()] == [("n6", False)]
    assert set(await fleet.room()) == {"n5", "n6"}, "nor is anything new placed where it was busy"
    with pytest.raises(LaunchError, match="n5 has been given back: nothing runs on its nodes"):
        await fleet.start(Launch("decode-0", 1, Command(("true",)), "n5"))
    assert [(news.node, news.reachable) for news in fleet.news()] == [("n5", False)]
    fleet.join(["n5", "n6"], "9", ["n5"])
    assert await fleet.room() == {}
    assert [(news.node, news.reachable) for news in fleet.news()] == [("n5", True)]


async def test_a_new_controller_starts_nothing_on_a_node_of_a_follow_up_job_that_ended_before_it(
    tmp_path: Path,
) -> None:
    fleet = SlurmFleet(SlurmClient(), JobSite("7"), RunRef("r", tmp_path), ["n2"])
    assert set(await fleet.room()) == {"n2"}
    with pytest.raises(LaunchError, match="in no job of the deployment any more"):
        await fleet.start(Launch("decode-0", 1, Command(("true",)), "n2"))
    fleet.join(["n2"], "9", ())
    assert await fleet.room() == {}


@dataclass(frozen=True)
class Given(SlurmClient):
    """Instead of Slurm: the nodes that our jobs have; None: it does not answer."""

    nodes_now: list[str] | None = field(default_factory=list)

    def nodes_of(self, job_ids: str) -> list[str]:
        if self.nodes_now is None:
            raise SlurmUnreachable("no answer")
        return self.nodes_now


def ended_srun() -> ProcessHandle:
    """One that has ended: nobody is its parent here any more."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return ProcessHandle(done.pid, 1, done.pid)


async def ends(fleet: SlurmFleet, *seats: Seated) -> list[Ended]:
    """What has ended, as soon as anything is told."""
    async with asyncio.timeout(10.0):
        while True:
            if told := fleet.ended(seats):
                return told
            await asyncio.sleep(0.01)


async def test_a_job_that_was_cancelled_is_told_before_what_ended_with_it(tmp_path: Path) -> None:
    """Else its engines would be started again there, and fail, and be given up for that."""
    fleet = SlurmFleet(Given(nodes_now=["n1"]), JobSite("7"), RunRef("r", tmp_path))
    fleet.join(["n5"], "8", ())
    other, own = Seated("decode-1", 1, "n5", ended_srun()), Seated("decode-0", 1, "n1", ended_srun())
    assert [one.seat for one in fleet.ended([own, other])] == ["decode-0"], "of its own job: at once"
    assert [one.seat for one in await ends(fleet, other)] == ["decode-1"]
    (news,) = fleet.news()
    assert (news.node, news.reachable, news.why) == ("n5", False, "job 8, which gave it, has ended")
    await asyncio.sleep(0.1)
    assert fleet.ended([]) == [], "each end is told once"
    await fleet.close()


@dataclass(frozen=True)
class Listed(SlurmClient):
    """Instead of Slurm: steps by name, and what was sent to them."""

    names: list[str] = field(default_factory=list)
    sent: list[tuple[str, str]] = field(default_factory=list)

    def steps(self, job_id: str) -> list[StepRow]:
        return [StepRow(f"7.{name}", "n1", name) for name in self.names]

    def signal(self, target: str, signum: str, *, batch: bool = False) -> None:
        self.sent.append((target, signum))
        if signum == "KILL":
            self.names.remove(target.removeprefix("7."))


async def test_a_step_whose_sidecar_became_another_seats_is_found_by_its_former_name(tmp_path: Path) -> None:
    slurm = Listed(names=["prefill-2.i1", "prefill-2.i2", "decode-0.i1"])
    fleet = SlurmFleet(slurm, JobSite("7"), RunRef("r", tmp_path))
    own = procfs.stat(os.getpid())  # stands for `srun`: it lives
    assert own is not None
    became = Seated("decode-2", 1, "n1", ProcessHandle(own.pid, own.start_ticks, 0), ("prefill-2", 1))
    assert fleet.ended([became]) == []
    assert await fleet.lives(became)
    assert not await fleet.lives(replace(became, started=None)), "nobody was started as that"
    assert await fleet.signal(became, signal.SIGTERM)
    assert slurm.sent == [("7.prefill-2.i1", "URG")]

    # Whoever has its former name now is another, and ends alone.
    assert await fleet.clear("n1", "prefill-2", 2, 5.0) == []
    assert slurm.names == ["prefill-2.i1", "decode-0.i1"]
    assert await fleet.clear("n1", "decode-2", 1, 5.0) == []
    assert slurm.names == ["decode-0.i1"]


async def test_a_step_goes_by_its_own_name_again_once_nobody_has_it(tmp_path: Path) -> None:
    slurm = Listed(names=["prefill-2.i1"])
    fleet = SlurmFleet(slurm, JobSite("7"), RunRef("r", tmp_path))
    fleet.ended([Seated("decode-2", 1, "n1", ended_srun(), ("prefill-2", 1))])
    fleet.ended([])
    assert await fleet.clear("n1", "prefill-2", 1, 5.0) == []
    assert slurm.names == []


@pytest.mark.parametrize("nodes", [["n1", "n5"], None])
async def test_an_end_in_a_job_that_lives_or_is_not_known_of_is_one_of_its_own(
    tmp_path: Path, nodes: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_fleet, "JUDGED_S", 0.1)
    fleet = SlurmFleet(Given(nodes_now=nodes), JobSite("7"), RunRef("r", tmp_path))
    fleet.join(["n5"], "8", ())
    seated = Seated("decode-1", 1, "n5", ended_srun())
    assert [one.seat for one in await ends(fleet, seated)] == ["decode-1"]
    assert fleet.news() == []
    await fleet.close()
