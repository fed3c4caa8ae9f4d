"""The shape of a model by what a recipe calls it: a directory, a Hugging Face id, a model that comes with
dynctl.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from dynctl.errors import ProfileError
from dynctl.hub import builtin_dir, snapshot
from dynctl.perfmodel.shapes import ModelShape, known_models, known_shape, shape_of


def find_shape(model: str, environ: Mapping[str, str]) -> ModelShape:
    """From the config.json in a directory or in the local Hugging Face cache, else from the table of known
    models.

    Nothing is downloaded. Raises ProfileError that tells where a config.json was looked for, or what is wrong
    with it.
    """
    directory = builtin_dir(model)
    if place := config_directory(model, environ):
        return _read(Path(place, "config.json"), model)
    known = known_shape(model)
    if known is not None:
        return known
    close = difflib.get_close_matches(model.lower(), known_models(), n=1, cutoff=0.8)
    looked = (
        "no config.json in it"
        if os.path.isdir(directory)
        else "no such directory, not in the local hub cache"
    )
    raise ProfileError(
        f"model {model!r} has no config: {looked}, not in the table of known models",
        hint=f"did you mean {close[0]}?" if close else "a directory with config.json, or download it first",
    )


def config_directory(model: str, environ: Mapping[str, str]) -> str:
    """The directory here that has the model's config.json: itself, or in the hub cache; "" = none."""
    if "\0" not in model:
        for place in (builtin_dir(model), _cached(model, environ)):
            if place and os.path.exists(os.path.join(place, "config.json")):
                return place
    return ""


def _cached(model: str, environ: Mapping[str, str]) -> str:
    """Its snapshot in the hub cache; "" also for what no file system could name."""
    try:
        return snapshot(model, "", environ)
    except OSError:
        return ""


def _read(path: Path, model: str) -> ModelShape:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ProfileError(f"cannot be read: {error}", where=str(path)) from error
    if not isinstance(config, dict):
        raise ProfileError("is not a mapping", where=str(path), hint="the config.json of a model")
    return shape_of(config, model, str(path))
