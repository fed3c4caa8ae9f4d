"""Deployments of candidates: `dynctl up` and `dynctl down` as a user has them, so on every target alike.

Each runs in a process of its own, so that several can be started at once, and carries the mark of the profile
run: what a killed run was about to start is found by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynctl import errors, procfs
from dynctl.deploy.state import readable_state
from dynctl.errors import DynctlError, LaunchError, ProcessExited
from dynctl.launchers.base import ENV_RUN
from dynctl.recipe.override import VARIABLE

MARK = "DYNCTL_PROFILE"
_LET_GO_S = 20.0
_DOWN_S = 180.0
_LOOK_S = 0.5
_ASK_EVERY_S = 10.0
_SLACK_S = 60.0
_NO_SUCH = 2
"""`dynctl down` of a name that never came to be."""

Row = tuple[str, int, str, list[str]]
"""(Seat, restarts, state, last lines)."""


@dataclass(frozen=True, slots=True)
class Standing:
    """A deployment that is ready. `run_dir`: where its state is, when that is on this machine."""

    name: str
    url: str
    run_dir: Path


@dataclass(frozen=True, slots=True)
class Starts:
    """Starts and ends deployments for the profile run `run`. `options` are `dynctl up`'s."""

    run: str
    environ: Mapping[str, str]
    options: tuple[str, ...] = ()

    async def up(self, recipe: Path, name: str, timeout_s: float) -> Standing:
        """Ready within that time, or ended again. Raises as the verb does."""
        code, out, err = await self._dynctl(
            ["up", str(recipe), "-d", "-y", "--json", "--timeout", f"{timeout_s:.0f}s", *self.options],
            timeout_s + _SLACK_S,
        )
        if code:
            raise _failure(out, err, code)
        told = json.loads(out.splitlines()[-1])
        return Standing(name, str(told["url"]), Path(str(told.get("run_dir", ""))))

    async def down(self, name: str, *, remove: bool) -> str:
        """End it now, whatever state it is in, and `remove` what is kept of it, here and on its hosts; why it
        may live on, "" = it does not.
        """
        words = ["down", name, "--timeout", "0", "--json", *(["--remove"] if remove else [])]
        code, out, err = await self._dynctl(words, _DOWN_S)
        if code in (0, _NO_SUCH):
            return ""
        return str(_failure(out, err, code))

    async def died(self, standing: Standing) -> LaunchError:
        """Wait until an engine of it dies, and tell with which last lines."""
        beside = 0.0
        while True:
            await asyncio.sleep(_LOOK_S)
            state = standing.run_dir / "state.json"
            if state.is_file():
                found = readable_state(state)
                seats = found.seats if found else []
                rows: list[Row] = [(one.id, one.restarts, one.state, one.last_error) for one in seats]
            else:
                beside += _LOOK_S
                if beside < _ASK_EVERY_S:
                    continue
                beside, rows = 0.0, await self._rows(standing.name)
            for seat, restarts, phase, lines in rows:
                if restarts or phase in ("failed", "backoff"):
                    return ProcessExited("\n".join([f"{seat} died while it was measured", *lines]))

    async def _rows(self, name: str) -> list[Row]:
        code, out, _ = await self._dynctl(["ps", name, "--json"], _DOWN_S)
        rows: list[dict[str, Any]] = json.loads(out) if not code else []
        return [(row["id"], row["restarts"], row["state"], row["last_error"]) for row in rows]

    async def _dynctl(self, args: list[str], timeout_s: float) -> tuple[int, str, str]:
        """(Code, output, prose) of a verb. When cancelled it is interrupted, as by Ctrl-C, and waited for."""
        environ = {**self.environ, MARK: self.run}
        environ.pop(VARIABLE, None)  # what it says is in the candidate's recipe already
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "dynctl.cli.main",
            *args,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environ,
            start_new_session=True,  # Ctrl-C is for this process, which then ends what was started
        )
        try:
            async with asyncio.timeout(timeout_s):
                out, err = await process.communicate()
        except TimeoutError:
            await _stop(process)
            return 6, "", f"dynctl {args[0]} did not end within {timeout_s:.0f} s"
        except asyncio.CancelledError:
            await _stop(process)
            raise
        assert process.returncode is not None
        return process.returncode, out.decode(errors="replace"), err.decode(errors="replace")


async def _stop(process: asyncio.subprocess.Process) -> None:
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LET_GO_S):
                await process.wait()
                return


def end_marked(runs: Iterable[str]) -> int:
    """Kill verbs that killed profile runs had begun: what carries their mark, but belongs to no deployment
    (that is ended by its name). How many there were.
    """

    wanted, ended = set(runs), 0
    for pid in procfs.pids_of_user(os.geteuid()) if wanted else ():
        environ = procfs.environment(pid) if pid != os.getpid() else {}
        if environ.get(MARK) in wanted and ENV_RUN not in environ:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                ended += 1
    return ended


def _failure(out: str, err: str, code: int) -> DynctlError:
    """What a verb said went wrong, as the error that it was."""
    try:
        found = json.loads(out.splitlines()[-1])["error"]
    except (ValueError, KeyError, IndexError, TypeError):
        last = " ".join(err.split("\n")[-3:]).strip()
        return LaunchError(f"dynctl ended with {code}: {last}" if last else f"dynctl ended with {code}")
    kinds: dict[str, type[DynctlError]] = {
        each.kind: each
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, DynctlError)
    }
    return kinds.get(found["type"], LaunchError)(found["message"], where=found["where"])
