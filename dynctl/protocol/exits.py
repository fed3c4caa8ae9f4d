"""Last words: what a process leaves in the run directory when it ends against its will.

`exits/<id>.json`, written by the process itself just before it exits (a sidecar also speaks for its engine)
and read by the controller, which cannot see the exit code of a process that it has only adopted.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

EXITS_DIR = "exits"


class LastWords(msgspec.Struct, frozen=True, kw_only=True):
    """Why a process ended.

    `kind` is the `DynctlError.kind` it ended with ("error" for an unforeseen one), `message` one sentence,
    `lines` the error lines of its own or its engine's log, oldest first. `exit_code` is the engine's when it
    was the engine that died (negative = that signal). `permanent`: it would fail the same way again, so a
    restart is useless.
    """

    id: str
    incarnation: int
    kind: str
    message: str
    exit_code: int | None = None
    lines: list[str] = []
    permanent: bool = False

    def save(self, run_dir: Path) -> None:
        """Write `exits/<id>.json` whole or not at all (temp, fsync, rename). Raises OSError."""
        folder = run_dir / EXITS_DIR
        folder.mkdir(mode=0o700, exist_ok=True)
        temporary = folder / f".{self.id}.{os.getpid()}"
        with temporary.open("wb") as file:
            file.write(msgspec.json.encode(self))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / f"{self.id}.json")


def read_last_words(run_dir: Path, process_id: str, incarnation: int) -> LastWords | None:
    """What this incarnation left, or None when it left nothing readable."""
    try:
        text = (run_dir / EXITS_DIR / f"{process_id}.json").read_bytes()
        words = msgspec.json.decode(text, type=LastWords)
    except (OSError, msgspec.MsgspecError):
        return None
    return words if words.incarnation == incarnation else None
