"""Engines in containers on a real Slurm, with a stand-in for apptainer: its contract, whose GPUs they see."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cluster.commands import eventually
from tests.cluster.login import READY_S, Login

STAND_IN = Path(__file__).with_name("stand_in_apptainer.py")
pytestmark = pytest.mark.timeout(240)


def test_containers_on_one_node_get_the_gpus_of_the_plan_each_its_own(login: Login) -> None:
    """Their steps overlap, so that none waits for another: Slurm gives each all that the job has there."""
    cluster, top = login.cluster, login.home.parent
    program, image = top / "bin" / "apptainer", top / "engine.sif"
    cluster.run_as_user(["mkdir", "-p", program.parent, top / "data"])
    cluster.run_as_user(["touch", image])
    text = f"#!{cluster.python}\n{STAND_IN.read_text()}"
    cluster.run_as_user(["sh", "-c", 'cat > "$0"; chmod 755 "$0"', program], input=text)
    ask = "from dynctl.engines.mocker import assets_dir; print(assets_dir())"
    model = cluster.run_as_user([cluster.python, "-c", ask]).stdout.strip()
    sets = (
        *(f"name={login.name}", "frontend.port=0", "slurm.nodes=1", "slurm.gpus_per_node=4"),
        *("backend=vllm", f"model.path={model}", "router.mode=round_robin"),
        *("roles.aggregated.replicas=2", "roles.aggregated.tensor_parallel=2"),
        *(f"engine.container={image}", f"engine.mounts=[{top}/data:/data:ro]"),
    )
    words = [word for one in sets for word in ("--set", one)]
    path = f"{program.parent}:{cluster.user_env()['PATH']}"
    up = ["up", "quickstart", "--target", "slurm", "-d", *words]
    cluster.dynctl(*up, home=login.home, env={"PATH": path}, timeout=READY_S)
    try:
        assert '"status":"ready"' in login.health()
        notes = cluster.run_as_user(["sh", "-c", f"cat {image}.*; echo"]).stdout
        calls = [json.loads("{" + part) for part in notes.strip().split("{") if part]
        assert sorted(call["gpus"] for call in calls) == ["0,1", "2,3"]
        assert all(call["argv"][:4] == ["exec", "--nv", "--bind", f"{top}/data:/data:ro"] for call in calls)
        assert not any(call["slurm"] for call in calls), "an engine must not take itself for a step"
    finally:
        login.run("down", login.name, "--timeout", "5s", check=False)
    eventually(lambda: login.jobs() == [], "no job", 30)
