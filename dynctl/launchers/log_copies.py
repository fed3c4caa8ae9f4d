"""Copies of other nodes' logs, to be read where the controller is, also when a node has gone."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import msgspec

from dynctl.protocol.agent import LogCall, LogPart

logger = logging.getLogger(__name__)


class LogCopies:
    """One node's logs, copied into `folder`. A copy goes on where an earlier controller has left it.

    How far each log of the node has come is written down there, since a copy may have lines of several nodes:
    of a worker that was moved, each node has a part.
    """

    def __init__(self, folder: Path, node: str) -> None:
        self._folder = folder
        self._record = folder / f".copied-{node}.json"
        self._places: dict[str, int] | None = None
        self._full = False

    def call(self) -> LogCall:
        """What to ask the node for: all from where the copies end, of new logs from their beginning."""
        return LogCall(places=self._known(), last_bytes=1 << 40)

    def take(self, parts: list[LogPart]) -> None:
        """Append what came. On a full disk it is left for later."""
        try:
            for part in parts:
                self._append(part)
            if parts:
                self._write_down()
        except OSError as error:
            if not self._full:
                logger.error("logs.unwritable folder=%s error=%s", self._folder, error)
            self._full = True
            return
        self._full = False

    def _known(self) -> dict[str, int]:
        """How far each log has come; what an earlier controller has left is looked for once."""
        if self._places is None:
            self._places = _recorded(self._record)
        return self._places

    def _append(self, part: LogPart) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        descriptor = os.open(self._folder / f"{part.source}.log", flags, 0o600)
        with os.fdopen(descriptor, "ab") as file:
            before = file.tell()
            try:
                file.write(part.text)
                file.flush()
            except OSError:
                file.truncate(before)
                raise
        self._known()[part.source] = part.place

    def _write_down(self) -> None:
        """Whole or not at all, but not forced to the disk: this is on the way of every line."""
        draft = self._record.with_name(f"{self._record.name}.draft")
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(msgspec.json.encode(self._known()))
        draft.replace(self._record)


def _recorded(record: Path) -> dict[str, int]:
    """What was written down; nothing of a node of which there is no copy yet."""
    try:
        return msgspec.json.decode(record.read_bytes(), type=dict[str, int])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.MsgspecError) as error:
        logger.warning("logs.copied_anew record=%s error=%s", record, error)
        return {}
