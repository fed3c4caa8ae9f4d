"""Engine arguments: from a recipe's map to a command line, and back to one spelling. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from dynctl.engines.base import ArgValue, EngineEnvironment

Style = Literal["-", "_"]
"""How an engine joins the words of an argument's name."""


def normal_name(name: str, style: Style = "-") -> str:
    """One spelling of a name: no leading dashes, words joined as the engine does, its case kept."""
    return name.lstrip("-").replace("_" if style == "-" else "-", style)


def both_spellings(owned: Mapping[str, str]) -> dict[str, str]:
    """The table with every name in dashes and in underscores."""
    return {
        spelling: path
        for name, path in owned.items()
        for spelling in (name, name.replace("-", "_"), name.replace("_", "-"))
    }


def normalised(args: Mapping[str, ArgValue], style: Style = "-") -> dict[str, ArgValue]:
    """The map by normal names, sorted; of two spellings of a name the later one counts."""
    return dict(sorted({normal_name(name, style): value for name, value in args.items()}.items()))


def flags(args: Mapping[str, ArgValue], style: Style = "-") -> list[str]:
    """The arguments as a command line has them, sorted by name: the same map gives the same list.

    True is a bare flag, False and None are left out, a list gives several values, a map is JSON.
    """
    argv: list[str] = []
    for name, value in normalised(args, style).items():
        if value is None or value is False:
            continue
        argv.append(f"--{name}")
        if isinstance(value, list):
            argv.extend(_text(item) for item in value)
        elif value is not True:
            argv.append(_text(value))
    return argv


def flag_names(args: Mapping[str, ArgValue], style: Style = "-") -> tuple[str, ...]:
    """The flags of `flags`, without their values."""
    given = normalised(args, style).items()
    return tuple(f"--{name}" for name, value in given if value is not None and value is not False)


def to_json(value: object) -> str:
    """JSON with sorted keys and no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else to_json(value)


def program(environment: EngineEnvironment, script: str, module: Iterable[str]) -> tuple[str, ...]:
    """How an engine's program starts: from a venv, by a Python (`-m module ...`), or as found on PATH.

    With a container, the same inside `apptainer exec`; paths are then those of the image.
    """
    if environment.python:
        inner: tuple[str, ...] = (environment.python, "-m", *module)
    elif environment.venv:
        inner = (f"{environment.venv.rstrip('/')}/bin/{script}",)
    else:
        inner = (script,)
    return (*container(environment, "--nv"), *inner)


def container(environment: EngineEnvironment, *flags: str) -> tuple[str, ...]:
    """What opens the container in front of a command; () when there is none, or it is opened around it."""
    if not environment.container or environment.runtime != "apptainer":
        return ()
    mounts = [part for mount in environment.mounts for part in ("--bind", mount)]
    return ("apptainer", "exec", *flags, *mounts, environment.container)


def devices(gpus: Iterable[int]) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES for these indices; {} when there are none (CPU builds)."""
    text = ",".join(str(gpu) for gpu in gpus)
    return {"CUDA_VISIBLE_DEVICES": text} if text else {}


def step_tokens(argument: tuple[str, int], args: Mapping[str, ArgValue]) -> int:
    """Tokens computed per step, of `Engine.step_tokens` and a role's arguments; 0 = not known."""
    name, usual = argument
    given = normalised(args).get(normal_name(name), usual)
    return given if isinstance(given, int) and given > 0 else 0
