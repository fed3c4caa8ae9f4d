"""Compiles the steps of the hot path when dynctl is installed. Without a compiler Python does the same.

A failure is no error of the installation: it is shown, and kept beside the source, where `dynctl version`
finds it. The wheel is one for any machine all the same: where its module does not load, it is passed over.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).resolve().parent
FOLDER = "dynctl/native"

sys.path.insert(0, str(ROOT))
from dynctl.native.build import build_into  # noqa: E402  # the one that is to be built


class Hook(BuildHookInterface):  # type: ignore[type-arg]
    """hatchling's: for a wheel into a folder of its own, for an editable installation beside the source."""

    _folder = ""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and have the wheel take what came of it."""
        if self.target_name != "wheel":
            return
        editable = version == "editable"
        if not editable:
            self._folder = tempfile.mkdtemp(prefix="dynctl-build-")
        failure = build_into(ROOT / FOLDER if editable else Path(self._folder))
        if failure:
            self.app.display_warning(f"dynctl will do all in Python: {failure}")
        if not editable:
            for path in Path(self._folder).iterdir():
                build_data["force_include"][str(path)] = f"{FOLDER}/{path.name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the folder."""
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
