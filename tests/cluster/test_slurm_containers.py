"""Engines in containers on a real Slurm, with a stand-in for apptainer: its contract, whose GPUs they see."""

from __future__ import annotations

import json

import pytest

from tests.cluster.commands import eventually
from tests.cluster.gpu_engines import gpu_engines
from tests.cluster.login import Login

pytestmark = pytest.mark.timeout(240)


def test_containers_on_one_node_get_the_gpus_of_the_plan_each_its_own(login: Login) -> None:
    """Their steps overlap, so that none waits for another: Slurm gives each all that the job has there."""
    sets = ("slurm.gpus_per_node=4", "roles.aggregated.replicas=2")
    with gpu_engines(login, *sets) as started:
        data = f"{login.home.parent}/data"
        assert '"status":"ready"' in login.health()
        notes = login.cluster.run_as_user(["sh", "-c", f"cat {started.image}.*; echo"]).stdout
        calls = [json.loads("{" + part) for part in notes.strip().split("{") if part]
        assert sorted(call["gpus"] for call in calls) == ["0,1", "2,3"]
        assert all(call["argv"][:4] == ["exec", "--nv", "--bind", f"{data}:/data:ro"] for call in calls)
        assert not any(call["slurm"] for call in calls), "an engine must not take itself for a step"
    eventually(lambda: login.jobs() == [], "no job", 30)
