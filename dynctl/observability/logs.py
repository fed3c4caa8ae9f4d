"""How every dynctl process logs: one line an event on standard error, UTC time first."""

from __future__ import annotations

import logging
import os
import sys
import time

FORMAT = "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s %(message)s"
_TIME = "%Y-%m-%dT%H:%M:%S"


def configure_logs() -> None:
    """Log to standard error, which the launcher has made the process's log file.

    DYNCTL_LOG sets the level (debug, info, warning, error; info when unset or unknown).
    """
    formatter = logging.Formatter(FORMAT, _TIME)
    formatter.converter = time.gmtime
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    level = logging.getLevelNamesMapping().get(os.environ.get("DYNCTL_LOG", "").upper(), logging.INFO)
    logging.basicConfig(level=level, handlers=[handler], force=True)
