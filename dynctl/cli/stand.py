"""A service for as long as it is measured: one that runs already, or a recipe's, started and ended again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dynctl import errors
from dynctl.cli.endpoint import Access, Target, find_target, is_url
from dynctl.cli.pick import Elsewhere, home, running_names
from dynctl.cli.render import prose
from dynctl.errors import DynctlError, LaunchError, UsageError
from dynctl.recipe.load import load_recipe
from dynctl.recipe.shipped import find_recipe

_LET_GO_S = 20.0
_LOOK_S = 60.0


@dataclass(frozen=True, slots=True)
class Stand:
    """What is to be measured: `recipe` None = it runs already, under the name or URL `where`."""

    where: str
    recipe: Path | None = None


def stand_of(where: str) -> Stand:
    """A URL, a deployment that runs, or a recipe; a deployment goes before a shipped recipe of its name.

    Raises UsageError when it is none of them, or a recipe whose name is in use; RecipeError.
    """
    if is_url(where) or where in running_names():
        return Stand(where)
    recipe = find_recipe(Path(where))
    if not recipe.is_file():
        known = running_names()
        listed = f"there run: {', '.join(known)}" if known else "none runs"
        raise UsageError(f"'{where}' is no recipe, no URL and no deployment that runs", hint=listed)
    name = load_recipe(recipe, files_here=False).recipe.name
    if name in running_names():
        raise UsageError(
            f"a deployment '{name}' runs already", where=where, hint=f"name it instead of {where}, or end it"
        )
    return Stand(name, recipe)


@contextmanager
def standing(stand: Stand, options: Sequence[str], access: Access) -> Iterator[Target]:
    """It, ready to be asked. What was started is ended at the end, whatever happened: a failure, Ctrl-C.

    `options` are `dynctl up`'s. Raises as `up` and `find_target`.
    """
    if stand.recipe is None:
        yield find_target(stand.where, access)
        return
    label = stand.recipe.name
    prose(f"starting {stand.recipe}", style="dim")
    try:
        url = _up(stand.recipe, options)
        yield replace(_target(stand.where, url, access), label=label)
    finally:
        _down(stand.where)


def _target(name: str, url: str, access: Access) -> Target:
    try:
        return find_target(name, access)
    except Elsewhere:  # another machine looks after it, but its frontend can be asked from here
        found = find_target(url, replace(access, insecure=True))
        rows: list[dict[str, Any]] = json.loads(_dynctl(["ps", name, "--json"]))
        workers = [row for row in rows if row["role"] != "frontend"]
        return replace(found, gpus=sum(len(row["gpus"]) for row in workers), workers=len(workers))


def _up(recipe: Path, options: Sequence[str]) -> str:
    """Start it; its URL. Ctrl-C is passed on, and waited for. Raises as `up`."""
    argv = [*_program(), "up", str(recipe), "-d", "-y", "--json", *options]
    # In a group of its own: Ctrl-C is for this process, which then ends what was started.
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, process_group=0
    )
    try:
        told, _ = process.communicate()
    except BaseException:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=_LET_GO_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        raise
    if process.returncode:
        raise _failure(told, recipe, process.returncode)
    return str(json.loads(told.splitlines()[-1])["url"])


def _failure(told: str, recipe: Path, code: int) -> DynctlError:
    """What `up` said went wrong, as the error that it was."""
    try:
        found = json.loads(told.splitlines()[-1])["error"]
    except (ValueError, KeyError, IndexError):
        return LaunchError(f"dynctl up ended with {code}", where=str(recipe))
    kinds: dict[str, type[DynctlError]] = {
        each.kind: each
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, DynctlError)
    }
    kind = kinds.get(found["type"], LaunchError)
    return kind(f"it did not start: {found['message']}", where=found["where"] or str(recipe))


def _down(name: str) -> None:
    """End it. A further Ctrl-C does not stop that."""
    if home().run_of(name) is None and home().note_of(name) is None:
        return  # it never came to be
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        prose(f"ending {name}", style="dim")
        done = subprocess.run([*_program(), "down", name], stdin=subprocess.DEVNULL, process_group=0)
        if done.returncode:
            prose(f"{name} may be left running: dynctl down {name} ends it", style="warning")
    finally:
        signal.signal(signal.SIGINT, before)


def _dynctl(args: Sequence[str]) -> str:
    done = subprocess.run(
        [*_program(), *args],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=_LOOK_S,
        check=False,
    )
    if done.returncode:
        raise LaunchError(f"dynctl {' '.join(args)} ended with {done.returncode}: {done.stdout.strip()}")
    return done.stdout


def _program() -> list[str]:
    return [sys.executable, "-m", "dynctl.cli.main"]
