"""`dynctl version`."""

from __future__ import annotations

import platform
from importlib import metadata

from dynctl.cli.options import Json
from dynctl.cli.render import data, json_data
from dynctl.native import load


def version(as_json: Json = False) -> None:
    """Print the version of dynctl, and whether its hot path is compiled."""
    number = metadata.version("dynctl")
    if as_json:
        hot_path = {"compiled": load.compiled is not None, "why_not": load.missing}
        json_data({"version": number, "python": platform.python_version(), "hot_path": hot_path})
    else:
        data(f"dynctl {number}, hot path {load.told()}")
