"""Engines as steps of their own beside their sidecars: in containers of Slurm, or as MPI ranks. Pure."""

from __future__ import annotations

import os.path
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dynctl.command import MASK, Command

_CACHES = ("HF_HOME", "HF_HUB_CACHE", "TRANSFORMERS_CACHE")
_DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class Box:
    """A container that Slurm starts (pyxis): the image, and what it sees of the host ("SRC:DST[:ro]")."""

    image: str
    mounts: tuple[str, ...] = ()


def box_for(
    image: str, mounts: Sequence[str], run_dir: str, paths: Sequence[str], env: Mapping[str, str]
) -> Box:
    """The container with the run directory, these paths and the Hugging Face cache at their own places."""
    own = [run_dir, *(path for path in paths if os.path.isabs(path))]
    own += [env[name] for name in _CACHES if os.path.isabs(env.get(name, ""))]
    return Box(image, tuple(dict.fromkeys([*mounts, *(f"{path}:{path}" for path in own)])))


def as_step(command: Command, seat: str, node: str, box: Box | None) -> Command:
    """The command as a step that its sidecar starts and the fleet finds by its name.

    A command that begins with `srun` says itself on which nodes and with how many tasks it runs.
    """
    own, inner = _split(command.argv)
    where = own or ("--nodes=1", "--ntasks=1", f"--nodelist={node}")
    argv = (
        "srun",
        "--overlap",
        *where,
        f"--job-name={engine_step(seat)}",
        "--mem=0",
        "--cpu-bind=none",
        "--overcommit",
        "--kill-on-bad-exit=1",
        "--input=none",
        "--unbuffered",
        "--quiet",
        "--export=ALL",
        *(_container(box, command.cwd or "") if box is not None else ()),
        *_told_again(command, everything=box is not None),
        *inner,
    )
    return Command(argv, command.env, command.cwd, command.files)


def engine_step(seat: str) -> str:
    """The name of the step."""
    return f"{seat}.engine"


def _split(argv: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Options of `srun` in front, and what it starts."""
    if argv[0] != "srun":
        return (), tuple(argv)
    end = next((i for i, word in enumerate(argv[1:], 1) if not word.startswith("-")), len(argv))
    return tuple(argv[1:end]), tuple(argv[end:])


def _container(box: Box, cwd: str) -> tuple[str, ...]:
    mounts = (f"--container-mounts={','.join(box.mounts)}",) if box.mounts else ()
    return (
        f"--container-image={box.image}",
        *mounts,
        f"--container-workdir={cwd}",
        "--no-container-mount-home",
        "--no-container-entrypoint",
    )


def _told_again(command: Command, *, everything: bool) -> tuple[str, ...]:
    """`env NAME=value ...` inside the step: Slurm sets its own GPUs there, and an image its own variables.

    Secrets are left to the environment, which other users cannot read.
    """
    shown = {name: value for name, value in command.shown_env().items() if value != MASK}
    wanted = shown if everything else {k: v for k, v in shown.items() if k == _DEVICES}
    return ("env", *(f"{name}={value}" for name, value in wanted.items())) if wanted else ()
