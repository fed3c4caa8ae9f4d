"""What an installed engine says of itself: how it is asked, and what its answer means. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from dynctl.engines.base import EngineEnvironment

_VERSION_OF = (
    "import importlib.metadata as m, sys\n"
    "for name in sys.argv[1:]:\n"
    "    try: print(m.version(name)); break\n"
    "    except m.PackageNotFoundError: pass\n"
)
"""Tells in a tenth of a second what `--version` of most engines tells after they have imported everything."""


def version_of(
    environment: EngineEnvironment, distributions: Sequence[str], on_path: Sequence[str] = ()
) -> tuple[str, ...]:
    """The command that prints a package's version by the Python of its venv; `on_path` without a venv.

    In a container, and without `on_path`, python3 of the PATH is asked.
    """
    inner: tuple[str, ...]
    if environment.python:
        inner = (environment.python, "-c", _VERSION_OF, *distributions)
    elif environment.venv:
        inner = (f"{environment.venv.rstrip('/')}/bin/python", "-c", _VERSION_OF, *distributions)
    else:
        inner = tuple(on_path) or ("python3", "-c", _VERSION_OF, *distributions)
    return ("apptainer", "exec", environment.container, *inner) if environment.container else inner


@dataclass(frozen=True, slots=True)
class Doubt:
    """A flag that the engine's help does not list. "short": it begins exactly one that is, `near`."""

    flag: str
    near: str
    kind: Literal["unknown", "short"] = "unknown"


def doubts(flags: Iterable[str], known: Iterable[str], *, abbreviates: bool = False) -> list[Doubt]:
    """Those of `flags` that are not among `known`, with the nearest that is ("" = none is near).

    `abbreviates` is the engine's, see `Inquiry`. Dashes and underscores count as the same: each engine's own
    way of joining words is used for it anyway.
    """
    there = {_plain(flag): flag for flag in known}
    found = []
    for flag in flags:
        plain = _plain(flag)
        if plain in there:
            continue
        longer = [name for name in there if name.startswith(plain)]
        if abbreviates and len(longer) == 1:
            found.append(Doubt(flag, there[longer[0]], "short"))
            continue
        near = difflib.get_close_matches(plain, there, n=1, cutoff=0.6)
        found.append(Doubt(flag, there[near[0]] if near else ""))
    return found


def _plain(flag: str) -> str:
    return flag.replace("_", "-").lstrip("-").lower()
