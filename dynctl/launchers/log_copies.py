"""Copies of other nodes' logs, to be read where the controller is, also when a node has gone."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from dynctl.protocol.agent import LogCall, LogPart

logger = logging.getLogger(__name__)


class LogCopies:
    """One node's logs, copied into `folder`. A copy goes on where an earlier controller has left it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: dict[str, int] | None = None
        self._full = False

    def call(self) -> LogCall:
        """What to ask the node for: all from where the copies end, of new logs from their beginning."""
        return LogCall(places=self._known(), last_bytes=1 << 40)

    def take(self, parts: list[LogPart]) -> None:
        """Append what came. On a full disk it is left for later."""
        for part in parts:
            try:
                self._append(part)
            except OSError as error:
                if not self._full:
                    logger.error("logs.unwritable folder=%s error=%s", self._folder, error)
                self._full = True
                return
        self._full = False

    def _known(self) -> dict[str, int]:
        """How far each copy has come; what an earlier controller has left is looked for once."""
        if self._places is None:
            self._places = {p.name.removesuffix(".log"): _size(p) for p in self._folder.glob("*.log")}
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


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
