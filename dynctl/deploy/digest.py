"""What a seat is started with, as one short name, and what differs between two of them. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import msgspec

from dynctl.deploy.plan import Plan, PlannedProcess

_TOLD_LIVE = "roles"
"""Replicas by role, in the spec of a frontend: told by the registry too, whenever they change."""


def digest_of(process: PlannedProcess) -> str:
    """The same for two processes that are started with the same command, environment and files."""
    command = process.command
    parts = [list(command.argv), sorted(command.env.items()), command.cwd, process.node, list(process.gpus)]
    files = {name: _told(name, text) for name, text in sorted(command.files.items())}
    return hashlib.sha256(msgspec.json.encode([*parts, files], order="deterministic")).hexdigest()[:16]


def reasons(old: PlannedProcess, new: PlannedProcess) -> list[str]:
    """What differs, for people: engine arguments as written, other fields of the spec by their name."""
    found = []
    if (old.node, old.gpus) != (new.node, new.gpus):
        found.append(f"from {_place(old)} to {_place(new)}")
    was, now = _spec(old), _spec(new)
    before, after = _argv(was), _argv(now)
    found += [f"+ {word}" for word in _only(after, before)] + [f"- {word}" for word in _only(before, after)]
    names = sorted({*was, *now})
    found += [name for name in names if was.get(name) != now.get(name) and name != "engine.argv"]
    if not found and digest_of(old) != digest_of(new):
        found.append("its command or files")
    return found


def _told(name: str, text: str) -> Any:
    """A file's content; of a spec what a process must be started anew for."""
    if not name.startswith("specs/"):
        return text
    spec = msgspec.json.decode(text)
    if isinstance(spec.get(_TOLD_LIVE), dict):
        spec[_TOLD_LIVE] = sorted(spec[_TOLD_LIVE])
    return spec


def _spec(process: PlannedProcess) -> dict[str, Any]:
    text = process.command.files.get(f"specs/{process.id}.json", "{}")
    return dict(_flat(_told("specs/", text), ""))


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _argv(spec: dict[str, Any]) -> list[str]:
    """Flags with their values, each as one word."""
    words: list[str] = []
    for word in spec.get("engine.argv", []):
        if words and words[-1].startswith("--") and " " not in words[-1] and not word.startswith("--"):
            words[-1] += f" {word}"
        else:
            words.append(word)
    return words


def _only(these: list[str], others: list[str]) -> list[str]:
    return [word for word in these if word not in others]


def _place(process: PlannedProcess) -> str:
    gpus = ",".join(map(str, process.gpus))
    return process.node + (f" GPU {gpus}" if gpus else "")


def plan_digest(plan: Plan) -> str:
    """A short name for a plan."""
    return hashlib.sha256(plan.to_json().encode()).hexdigest()[:16]
