"""`dynctl profile` and `dynctl compare` by SSH and on Slurm: layouts measured at once, nothing left."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dynctl.profiler.outcome import FILE, load
from tests.cluster.cluster import Cluster
from tests.cluster.commands import eventually
from tests.cluster.hosts import MACHINE
from tests.cluster.login import Login
from tests.cluster.ssh_deployment import Laptop
from tests.perf.laws import write_law, write_recipe

pytestmark = pytest.mark.timeout(240)

SLA = "ttft=2s,itl=150ms,percentile=p50"
ASKED = ("--isl", "600", "--osl", "40", "--sla", SLA, "--rate", "3")
TIME = ("--gpus", "3", "--budget", "80s", "--json")
LOAD = ("--rate", "5", "--requests", "40", "--isl", "200", "--osl", "20", "--sla", SLA)
RUN_S = 150.0

Held = dict[str, set[str]]
"""What each of the deployments that run now holds: hosts, or GPUs of nodes."""


@pytest.fixture
def recipe(home: Path) -> Path:
    """A recipe with a law for one GPU and one for two, which the test user can read on all hosts."""
    path = write_recipe(home.parent)
    for one in (path, *(write_law(home.parent, size) for size in (1, 2))):
        one.chmod(0o644)
    return path


@pytest.fixture
def laptop(cluster: Cluster, home: Path, token: str) -> Laptop:
    return Laptop(cluster, home, token, hosts=("n1", "n2", "n3"), gpus=1)


def hosts_of_engines(cluster: Cluster) -> Held:
    """The hosts of each deployment's engines."""
    found: Held = {}
    for one in cluster.processes():
        if "dynctl.mocker" in one.args and (run := run_of(one.pid)):
            found.setdefault(run, set()).add(one.host)
    return found


def run_of(pid: int) -> str:
    """The run that a process belongs to; "" when it has ended."""
    try:
        environ = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    return next((one for one in environ if one.startswith("DYNCTL_RUN=")), "")


def gpus_of_jobs(cluster: Cluster) -> Held:
    """The GPUs that Slurm has given to each job that runs, as node:index."""
    found: Held = {}
    for job in cluster.squeue():
        told = cluster.run_as_user(["scontrol", "show", "job", "-d", job.id], check=False).stdout
        for node, ids in re.findall(r"Nodes=(\S+) .*GRES=gpu[^(]*\(IDX:([\d,-]+)\)", told):
            found.setdefault(job.id, set()).update(f"{node}:{index}" for index in indices(ids))
    return found


def indices(text: str) -> list[int]:
    """The numbers in 0-1,3."""
    ends = [part.partition("-") for part in text.split(",")]
    return [number for low, _, high in ends for number in range(int(low), int(high or low) + 1)]


def measured(
    cluster: Cluster, host: str, home: Path, args: tuple[str | Path, ...], held: Callable[[Cluster], Held]
) -> Held:
    """`dynctl profile` to its end; what it held when two layouts were first there at once."""
    argv: list[str | Path] = [cluster.python, "-m", "dynctl.cli.main", "profile", *args, *ASKED, *TIME]
    seen: Held = {}

    def two() -> bool:
        now = held(cluster)
        seen.update(now if len(now) == 2 else {})
        return bool(seen) or run.process.poll() is not None

    with cluster.spawn_as_user(argv, host=host, env={"DYNCTL_HOME": str(home)}) as run:
        eventually(two, "two layouts at once", 90.0)
        code = run.wait(RUN_S)
        assert code == 0, run.said()
        assert len(seen) == 2, run.said()
    return seen


def check(out: Path, seen: Held) -> None:
    """Two layouts measured, each on GPUs of its own, and the choice tried."""
    told = load(out / FILE)
    assert sorted(run.layout.label for run in told.layouts) == ["TP1", "TP2"]
    assert all(run.fitted and run.prefill and run.decode for run in told.layouts), told.layouts
    assert told.rounds
    assert told.rounds[-1].requests
    first, second = seen.values()
    assert first, seen
    assert second, seen
    assert not first & second
    assert not list((out / "candidates").iterdir())
    assert (out / "recipe.yaml").is_file()


def test_by_ssh_layouts_are_measured_at_once_on_hosts_of_their_own(laptop: Laptop, recipe: Path) -> None:
    out = laptop.home.parent / "out"
    where = ("--target", "ssh", "--inventory", laptop.inventory, "--out", out)
    seen = measured(laptop.cluster, MACHINE, laptop.home, (recipe, *where), hosts_of_engines)
    check(out, seen)
    folders = [laptop.there / name for name in ("runs", "nodes", "deployments")]
    kept = [one.name for folder in folders if folder.is_dir() for one in folder.iterdir()]
    assert not [name for name in kept if "profile-" in name], "what ended well is kept on no host"


def test_on_slurm_layouts_are_measured_at_once_in_jobs_with_gpus_of_their_own(
    login: Login, recipe: Path
) -> None:
    out = login.home.parent / "out"
    where = ("--target", "slurm", "--set", "slurm.gpus_per_node=2", "--out", out)
    seen = measured(login.cluster, "head", login.home, (recipe, *where), gpus_of_jobs)
    check(out, seen)
    assert login.cluster.squeue() == []


def test_by_ssh_two_recipes_are_compared(laptop: Laptop, recipe: Path) -> None:
    text = recipe.read_text().replace("{port: 0}", "{port: 0, host: 0.0.0.0}")
    recipe.write_text(text)
    slower = recipe.with_name("slower.yaml")
    slower.write_text(text.replace("name: cluster", "name: slower").replace("law-tp{tensor}", "law-tp3"))
    write_law(laptop.home.parent, 3, slower=6.0).chmod(0o644)
    slower.chmod(0o644)
    where = ("--target", "ssh", "--inventory", str(laptop.inventory))
    done = laptop.dynctl("compare", str(recipe), str(slower), *LOAD, *where, "--json", timeout=RUN_S)
    told = json.loads(done.stdout)
    rows = {row["name"]: row for row in told["rows"]}
    assert rows["TPOT p50"]["better"] == "a", done.stdout


def test_on_slurm_two_recipes_are_compared(login: Login, recipe: Path) -> None:
    other = write_recipe(login.home.parent, "other")
    other.chmod(0o644)
    done = login.run("compare", str(recipe), str(other), *LOAD, "--target", "slurm", "--json", timeout=RUN_S)
    told = json.loads(done.stdout)
    assert told["verdict"]
    assert login.cluster.squeue() == []
