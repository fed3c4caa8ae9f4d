"""`dynctl version`."""

from __future__ import annotations

import platform
from importlib import metadata

from dynctl.cli.options import Json
from dynctl.cli.render import data, json_data


def version(as_json: Json = False) -> None:
    """Print the version of dynctl."""
    number = metadata.version("dynctl")
    if as_json:
        json_data({"version": number, "python": platform.python_version()})
    else:
        data(f"dynctl {number}")
