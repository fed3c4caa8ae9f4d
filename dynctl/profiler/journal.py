"""What was measured, kept as it happens: one JSON object a line, each on disk before the next step.

A line is an answer to a question, known by its key: the hash of all that the answer depends on. A run that is
killed loses at most the line it was writing: a last line without its end is ignored, and cut off. Deployments
are noted before they are started and when they have ended, so that the next run can end what was left.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path
from typing import Any, Literal

import msgspec

from dynctl.errors import ProfileError, UsageError

FILE = "journal.jsonl"
OLD = "journal.old.jsonl"
VERSION = 1


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line. `kind`: "answer" with a `key` and the `found` value or why there is none (`refused`);
    "started" and "ended" with the `name` of a deployment; "run" at the begin of each. `what`: for people.
    """

    kind: Literal["run", "started", "ended", "answer"]
    run: str
    at: float
    key: str = ""
    what: str = ""
    name: str = ""
    found: dict[str, Any] | None = None
    refused: str = ""
    version: int = VERSION


def key_of(*parts: Any) -> str:
    """The hash of these values, whatever order their mappings are in."""
    raw = msgspec.json.encode(msgspec.to_builtins(parts), order="deterministic")
    return hashlib.sha256(raw).hexdigest()[:32]


class Journal:
    """The journal of one directory, held by one process alone until `close`."""

    def __init__(self, path: Path, run: str, *, resume: bool, clock: Any) -> None:
        """Open it, with what earlier runs found when these are resumed, else put aside under another name.

        Raises UsageError when another process has it, ProfileError when it cannot be read or written.
        """
        self.path, self._run, self._clock = path, run, clock
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise ProfileError(f"the journal cannot be opened: {error.strerror}", where=str(path)) from error
        try:
            self._lock()
            self._entries = self._read()
            self.resumed = resume
            self.left = self._left()
            """Deployments that were started and not ended, by earlier runs."""
            if not resume:
                self._put_aside()
            self.add("run")
        except BaseException:
            os.close(self._fd)
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                "another dynctl profile is at work with this directory",
                where=str(self.path.parent),
                hint="wait for it, or name another by --out",
            ) from error

    def _read(self) -> list[Entry]:
        """All whole lines; what follows the last of them is cut off. Raises ProfileError for a broken one."""
        raw = b""
        while part := os.pread(self._fd, 1 << 20, len(raw)):
            raw += part
        end = raw.rfind(b"\n") + 1
        if end < len(raw):
            os.ftruncate(self._fd, end)
        found = []
        for number, line in enumerate(raw[:end].splitlines(), 1):
            try:
                found.append(msgspec.json.decode(line, type=Entry))
            except msgspec.MsgspecError as error:
                raise ProfileError(
                    f"not a line of a journal: {error}",
                    where=f"{self.path}:{number}",
                    hint="remove the line, or the file to measure anew",
                ) from error
        return found

    def _left(self) -> tuple[Entry, ...]:
        ended = {entry.name for entry in self._entries if entry.kind == "ended"}
        return tuple(e for e in self._entries if e.kind == "started" and e.name not in ended)

    def _put_aside(self) -> None:
        """Begin anew, but for what may still run."""
        kept, self._entries = self.left, []
        if os.fstat(self._fd).st_size:
            try:
                os.replace(self.path, self.path.with_name(OLD))
                os.close(self._fd)
                self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            except OSError as error:
                raise self._full(error) from error
            self._lock()
        for entry in kept:
            self._write(entry)

    def found(self, key: str) -> dict[str, Any] | None:
        """What an earlier run, or this one, found out; None when that is still to be done."""
        answers = (e for e in reversed(self._entries) if e.kind == "answer" and e.key == key)
        return next((e.found for e in answers if e.found is not None), None)

    @property
    def answers(self) -> int:
        """How many there are."""
        return sum(entry.kind == "answer" for entry in self._entries)

    def add(self, kind: Literal["run", "started", "ended"], name: str = "") -> None:
        """Note that something begins or has ended. Raises ProfileError when the disk is full."""
        self._write(Entry(kind=kind, run=self._run, at=self._clock(), name=name))

    def answer(self, key: str, what: str, found: msgspec.Struct | None = None, *, refused: str = "") -> None:
        """Note what came of a question. Raises ProfileError when the disk is full."""
        value = msgspec.to_builtins(found) if found is not None else None
        self._write(
            Entry(
                kind="answer",
                run=self._run,
                at=self._clock(),
                key=key,
                what=what,
                found=value,
                refused=refused,
            )
        )

    def _write(self, entry: Entry) -> None:
        line = msgspec.json.encode(entry) + b"\n"
        before = os.fstat(self._fd).st_size
        try:
            written = os.write(self._fd, line)
            if written < len(line):
                os.ftruncate(self._fd, before)  # a line is whole or not there
                written = os.write(self._fd, line)
                if written < len(line):
                    os.ftruncate(self._fd, before)
                    raise OSError(28, "No space left on device")
            os.fsync(self._fd)
        except OSError as error:
            raise self._full(error) from error
        self._entries.append(entry)

    def _full(self, error: OSError) -> ProfileError:
        return ProfileError(
            f"the journal cannot be written: {error.strerror}",
            where=str(self.path),
            hint="free some space, then go on with --resume",
        )

    def close(self) -> None:
        """Let go of it."""
        os.close(self._fd)
