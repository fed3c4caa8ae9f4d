"""Where models lie on this machine: those that come with dynctl, and downloaded Hugging Face ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

BUILTIN = "builtin:"
ASSETS = Path(__file__).resolve().parent / "mocker" / "assets"


def builtin_dir(path: str) -> str:
    """A model's path; for "builtin:NAME" the directory that comes with the dynctl that runs here."""
    return str(ASSETS / path.removeprefix(BUILTIN)) if path.startswith(BUILTIN) else path


def snapshot(model_id: str, revision: str, environ: Mapping[str, str]) -> str:
    """The snapshot of a model in the local Hugging Face cache, "" when it is not there.

    Layout: HF_HUB_CACHE or HF_HOME/hub, then models--org--name/{refs/REVISION,snapshots/COMMIT}.
    `revision` "" = main.
    """
    home = environ.get("HF_HOME") or str(Path(environ.get("HOME", "/"), ".cache", "huggingface"))
    root = Path(environ.get("HF_HUB_CACHE") or Path(home, "hub"))
    folder = root / ("models--" + model_id.replace("/", "--"))
    wanted = revision or "main"
    try:
        commit = (folder / "refs" / wanted).read_text().strip()
    except OSError:
        commit = wanted
    found = folder / "snapshots" / commit
    return str(found) if found.is_dir() else ""
