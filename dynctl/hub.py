"""Where downloaded Hugging Face models lie on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


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
