"""Who estimates: the roofline for engines on GPUs, the engine's own law for one that is simulated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from dynctl.engines.base import ArgValue
from dynctl.engines.catalog import get
from dynctl.errors import ProfileError
from dynctl.perfmodel.estimate import Estimator
from dynctl.perfmodel.gpus import Gpu
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.precision import Precision
from dynctl.perfmodel.profile import DEFAULT, Limits, Profile, Subject, load_profile
from dynctl.perfmodel.roofline import Roofline
from dynctl.perfmodel.shapes import ModelShape, known_shape, shape_of
from dynctl.recipe.load import LoadedRecipe


@dataclass(frozen=True, slots=True)
class Law:
    """An estimator for an engine whose costs are a file: one worker is one layout, whatever it is."""

    costs: Profile

    def profile(self, layout: Layout) -> Profile:
        """The costs of the file. Raises ProfileError for layouts of more than one rank."""
        if layout != Layout():
            raise ProfileError(f"{layout.label}: a simulated engine is one worker, without parallel ranks")
        return self.costs


def shape_for(loaded: LoadedRecipe) -> ModelShape:
    """The model's shape, from its config.json here or the table of known models.

    Raises ProfileError when neither has it.
    """
    model = loaded.recipe.model.path
    path = Path(loaded.model.directory, "config.json")
    if loaded.model.directory and path.is_file():
        try:
            config = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ProfileError(f"cannot be read: {error}", where=str(path)) from error
        if not isinstance(config, dict):
            raise ProfileError("must be a mapping", where=str(path))
        return shape_of(config, model, str(path))
    known = known_shape(model)
    if known is None:
        raise ProfileError(
            f"there is no config.json of {model} here, and its sizes are not known",
            where=loaded.where("model.path"),
            hint="download the model, or set model.path to a directory with its config.json",
        )
    return known


def estimator_for(loaded: LoadedRecipe, gpu: Gpu | None, precision: str) -> Estimator:
    """The built-in estimator of a recipe's engine. Raises ProfileError when there is nothing to go by."""
    engine = get(loaded.recipe.backend)
    if not engine.features.launches:
        raise ProfileError(
            f"backend {engine.name} only uses engines that run already: there is no layout to choose",
            where=loaded.where("backend"),
        )
    if not engine.features.gpus:
        return Law(law_of(loaded))
    if gpu is None:
        raise ProfileError("which GPU is not known", hint="--gpu h200_sxm")
    shape = shape_for(loaded)
    return Roofline(shape, gpu, loaded.recipe.backend, Precision.named(precision) if precision else None)


def law_of(loaded: LoadedRecipe) -> Profile:
    """The costs that a simulated engine is told to have, with the limits that its arguments give."""
    args = _arguments(loaded)
    engine = get(loaded.recipe.backend)
    path = args.get("profile")
    law = DEFAULT
    if isinstance(path, str) and path:
        law = load_profile(Path(loaded.file).parent / path)
    limits = law.limits or Limits(
        kv_tokens=65_536, sequences=256, batched_tokens=engine.step_tokens[1] or 8192
    )
    limits = msgspec.structs.replace(
        limits,
        kv_tokens=_int(args, "num-gpu-blocks-override", 0) * _int(args, "block-size", 16) or limits.kv_tokens,
    )
    subject = law.subject or Subject(
        model=loaded.recipe.model.path, backend=engine.name, hardware=engine.name
    )
    return msgspec.structs.replace(law, limits=limits, subject=subject, source=law.source or "estimate")


def _arguments(loaded: LoadedRecipe) -> Mapping[str, ArgValue]:
    """All arguments of the recipe, those of its roles laid over the engine's."""
    merged = dict(loaded.recipe.engine.args)
    for section in loaded.recipe.roles.present().values():
        merged.update(section.args)
    return merged


def _int(args: Mapping[str, ArgValue], name: str, usual: int) -> int:
    value = args.get(name)
    return value if isinstance(value, int) and value > 0 else usual
