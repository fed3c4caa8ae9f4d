"""A deployment whose engines need GPUs, on nodes with make-believe ones: what runs in the "container" is a
simulated engine (`stand_in_apptainer`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.login import READY_S, Login

STAND_IN = Path(__file__).with_name("stand_in_apptainer.py")

LAUNCH = '#!/bin/sh\n[ "$SLURM_PROCID" = 0 ] && exec "$@"\nexec sleep 86400\n'
"""Starts ranks of one engine, of which the first serves."""


@dataclass(frozen=True)
class Engines:
    """`image`, beside which each engine leaves a note of how it was called; `up` is what started them."""

    image: Path
    up: list[str]


@contextmanager
def gpu_engines(login: Login, *sets: str) -> Iterator[Engines]:
    """Engines of two GPUs each, one on a node of two, unless told otherwise. Ready, and ended afterwards."""
    cluster, top = login.cluster, login.home.parent
    program, image = top / "bin" / "apptainer", top / "engine.sif"
    cluster.run_as_user(["mkdir", "-p", program.parent, top / "data"])
    cluster.run_as_user(["touch", image])
    text = f"#!{cluster.python}\n{STAND_IN.read_text()}"
    cluster.run_as_user(["sh", "-c", 'cat > "$0"; chmod 755 "$0"', program], input=text)
    starter = program.with_name("trtllm-llmapi-launch")
    cluster.run_as_user(["sh", "-c", 'cat > "$0"; chmod 755 "$0"', starter], input=LAUNCH)
    ask = "from dynctl.engines.mocker import assets_dir; print(assets_dir())"
    model = cluster.run_as_user([cluster.python, "-c", ask]).stdout.strip()
    given = (
        *(f"name={login.name}", "frontend.port=0", "slurm.nodes=1", "slurm.gpus_per_node=2"),
        *("backend=vllm", f"model.path={model}", "router.mode=round_robin"),
        *("roles.aggregated.replicas=1", "roles.aggregated.tensor_parallel=2"),
        *(f"engine.container={image}", f"engine.mounts=[{top}/data:/data:ro]", *sets),
    )
    words = [word for one in given for word in ("--set", one)]
    path = f"{program.parent}:{cluster.user_env()['PATH']}"
    up = ["up", "quickstart", "--target", "slurm", "-d", *words]
    cluster.dynctl(*up, home=login.home, env={"PATH": path}, timeout=READY_S)
    try:
        yield Engines(image, up)
    finally:
        login.run("down", login.name, "--timeout", "5s", check=False)
