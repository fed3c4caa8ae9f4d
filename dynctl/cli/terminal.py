"""What may be written to a terminal."""

from __future__ import annotations

import os


def wants_colour(terminal: bool, environ: os._Environ[str] | dict[str, str]) -> bool:
    """Colour only on a terminal, and never with NO_COLOR set to something (https://no-color.org)."""
    return terminal and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"
