"""A healthy host for tests of doctor's judges, and ways to make it ill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from dynctl.deploy.planner import build_plan
from dynctl.deploy.seats import RunContext
from dynctl.doctor.findings import Level, Verdict
from dynctl.doctor.subject import Subject, Wanted
from dynctl.protocol.hosts import (
    ContainerFacts,
    DiskFacts,
    DynctlFacts,
    EngineFacts,
    GpuFacts,
    HostFacts,
    IbFacts,
    PathFacts,
    PythonFacts,
    ShmFacts,
)
from dynctl.recipe.load import LoadedRecipe, load_recipe
from dynctl.topology.inventory import Host, Inventory

VERSION = "0.1.0"
HOME = "/home/u/.dynctl"
MODEL = "/models/llama"
HOSTS = (Host("n1", "10.0.0.1", 4), Host("n2", "10.0.0.2", 4))
RECIPE = f"""\
schema: dynctl/v1
name: demo
model: {{path: {MODEL}, served_name: llama}}
backend: vllm
engine:
  venv: /opt/vllm
  args: {{max-model-len: 4096}}
roles:
  prefill: {{replicas: 1, tensor_parallel: 4}}
  decode: {{replicas: 1, tensor_parallel: 4}}
frontend: {{port: 8000}}
target: ssh
"""
FLAGS = ["--block-size", "--enable-prefix-caching", "--max-model-len", "--no-enable-prefix-caching"]


def gpu(index: int, **changes: Any) -> GpuFacts:
    made = GpuFacts(index=index, name="NVIDIA H100", memory_mib=81559, used_mib=4, driver="550.54")
    return msgspec.structs.replace(made, **changes)


def healthy(**changes: Any) -> HostFacts:
    facts = HostFacts(
        v=1,
        host="n1",
        user="u",
        uid=1000,
        home="/home/u",
        now=1000.0,
        took_s=0.2,
        python=PythonFacts(path="/usr/bin/python3", version="3.11.2"),
        dynctl=[DynctlFacts(python="/opt/dynctl/bin/python", version=VERSION)],
        gpus=[gpu(index) for index in range(4)],
        gpu_devices=4,
        listening=[22],
        ephemeral=[32768, 60999],
        limits={"nofile": [65536, 65536], "memlock": [-1, -1], "nproc": [4096, 4096]},
        disk={HOME: DiskFacts(free=10**11, total=10**12, fstype="nfs4")},
        shm=ShmFacts(free=10**10, total=10**10),
        paths={MODEL: PathFacts(exists=True, readable=True, is_dir=True, fstype="nfs4", fingerprint="f")},
        model_at=MODEL,
        ib=[IbFacts(device="mlx5_0", port=1, state="ACTIVE", rate="400 Gb/sec", link_layer="InfiniBand")],
        modules={"nvidia_peermem": True, "gdrdrv": False},
        containers=ContainerFacts(),
        engine=EngineFacts(found="/opt/vllm/bin/vllm", version="0.33.0", flags=FLAGS),
    )
    return msgspec.structs.replace(facts, **changes)


def loaded(tmp_path: Path, *sets: str, text: str = RECIPE) -> LoadedRecipe:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    return load_recipe(file, sets, environ={"HOME": str(tmp_path)}, files_here=False)


def wanted(recipe: LoadedRecipe | None, hosts: tuple[Host, ...] = HOSTS, **changes: Any) -> Wanted:
    context = RunContext("r", "/runs/r", "python3")
    plan = build_plan(recipe, Inventory(hosts, "hosts.yaml"), (), context) if recipe else None
    return Wanted(
        **{"version": VERSION, "home": HOME, "loaded": recipe, "plan": plan, "here": False, **changes}
    )


def subject(
    want: Wanted, host: Host = HOSTS[0], *, asked_at: float = 1000.0, within_s: float = 0.1, **facts: Any
) -> Subject:
    return Subject(host, healthy(host=host.name, **facts), want, asked_at, within_s)


def levels(verdicts: list[Verdict]) -> list[Level]:
    return [verdict.level for verdict in verdicts]


def only(verdicts: list[Verdict], level: Level) -> Verdict:
    """The one verdict of that level; all that are no pass must have a remedy."""
    (found,) = [verdict for verdict in verdicts if verdict.level == level]
    assert found.remedy or level not in ("warn", "fail")
    return found
