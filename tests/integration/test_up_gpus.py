"""Two deployments on the GPUs of one machine: each takes those that the other leaves, and none are shared."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.deployment import Cli, Deployment, end_all, up, vllm_stand_in

DRIVER = "#!/bin/sh\necho 'GPU 0: NVIDIA H100'\necho 'GPU 1: NVIDIA H100'\n"
"""`nvidia-smi --list-gpus` of a machine with two."""
ENGINE = vllm_stand_in(sys.executable)


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("nvidia-smi", DRIVER), ("engine", ENGINE)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    yield Cli(tmp_path / "home")
    end_all(tmp_path / "home")


def recipe(folder: Path, name: str, replicas: int = 1) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(
        f"""schema: dynctl/v1
name: {name}
model: {{path: "builtin:tiny", served_name: tiny}}
backend: vllm
engine: {{python: {folder}/bin/engine}}
roles: {{aggregated: {{replicas: {replicas}}}}}
frontend: {{port: 0}}
"""
    )
    return path


def gpus(served: Deployment) -> list[int]:
    return [gpu for row in served.workers("aggregated") for gpu in row["gpus"]]


@pytest.mark.timeout(120)
def test_deployments_take_gpus_that_others_leave_and_are_refused_when_none_are_left(
    cli: Cli, tmp_path: Path
) -> None:
    third = recipe(tmp_path, "third")
    with ExitStack() as stack:
        first = stack.enter_context(up(cli, recipe(tmp_path, "first")))
        with up(cli, recipe(tmp_path, "second")) as second:
            assert (gpus(first), gpus(second)) == ([0], [1])
            refused = cli.run("up", str(third), "-d", "-y")
            assert refused.returncode == 4
            assert "too few GPUs are free: 'first' has 0, 'second' has 1 (end it" in refused.stderr
            assert "--share-gpus" in refused.stderr
            assert not list((cli.home / "runs").glob("third*")), "a refused run leaves nothing"
            with up(cli, third, "--share-gpus") as shared:
                assert gpus(shared) == [0]
        wide = cli.run("up", str(recipe(tmp_path, "wide", replicas=2)), "-d", "-y")
        assert wide.returncode == 4
        assert "too few GPUs are free: 'first' has 0 (end it" in wide.stderr
        stack.enter_context(up(cli, third))
