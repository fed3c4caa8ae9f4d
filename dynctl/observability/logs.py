"""Log lines of a process: to stderr, one event a line, time in UTC."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import TextIO

ENV_FORMAT = "DYNCTL_LOG_FORMAT"
ENV_LEVEL = "DYNCTL_LOG_LEVEL"
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))} | {
    0x09: "\\t",
    0x0A: "\\n",
    0x0D: "\\r",
    0x2028: "\\u2028",
    0x2029: "\\u2029",
}


def timestamp(seconds: float) -> str:
    """Unix time as ISO 8601 in UTC with milliseconds: 2025-01-31T09:08:07.123Z."""
    milliseconds = int(seconds * 1000)
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(milliseconds // 1000))
    return f"{whole}.{milliseconds % 1000:03d}Z"


class PlainFormatter(logging.Formatter):
    """`time LEVEL process logger event…`; a traceback follows on lines of its own.

    Control characters of the event are shown as escapes: what a client sent can begin no line of its own.
    """

    def __init__(self, process_id: str) -> None:
        super().__init__()
        self._process_id = process_id

    def format(self, record: logging.LogRecord) -> str:
        """One record as text."""
        head = f"{timestamp(record.created)} {record.levelname} {self._process_id} {record.name}"
        event = record.getMessage()
        line = f"{head} {event if event.isprintable() else event.translate(_CONTROLS)}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, process, logger, event, and traceback if there is one."""

    def __init__(self, process_id: str) -> None:
        super().__init__()
        self._process_id = process_id

    def format(self, record: logging.LogRecord) -> str:
        """One record as JSON."""
        fields = {
            "time": timestamp(record.created),
            "level": record.levelname,
            "process": self._process_id,
            "logger": record.name,
            "event": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def setup(process_id: str, stream: TextIO | None = None) -> None:
    """Send all logs of this process to stderr (or `stream`), in place of whatever was set up before.

    DYNCTL_LOG_FORMAT is "plain" (the default) or "json", DYNCTL_LOG_LEVEL a level's name (INFO if unset or
    unknown).
    """
    as_json = os.environ.get(ENV_FORMAT, "plain").lower() == "json"
    level = os.environ.get(ENV_LEVEL, "INFO").upper()
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonFormatter(process_id) if as_json else PlainFormatter(process_id))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level if level in _LEVELS else "INFO")
