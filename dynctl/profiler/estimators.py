"""Who estimates: the roofline or AIConfigurator for engines on GPUs, the engine's own law for one that is
simulated.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from dynctl.engines.base import ArgValue
from dynctl.engines.catalog import get
from dynctl.errors import ProfileError, UsageError
from dynctl.perfmodel.estimate import Estimator
from dynctl.perfmodel.find_shape import config_directory, find_shape
from dynctl.perfmodel.gpus import Gpu
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.precision import Precision
from dynctl.perfmodel.profile import DEFAULT, Limits, Profile, Subject, load_profile
from dynctl.perfmodel.roofline import Roofline
from dynctl.perfmodel.shapes import ModelShape
from dynctl.profiler.aiconfigurator import AiConfigurator
from dynctl.recipe.load import LoadedRecipe


@dataclass(frozen=True, slots=True)
class Law:
    """An estimator for an engine whose costs are a file, or a file for each layout."""

    loaded: LoadedRecipe

    def profile(self, layout: Layout) -> Profile:
        """The costs of the file. Raises ProfileError for layouts that have none of their own."""
        written = _arguments(self.loaded).get("profile")
        if layout != Layout() and (not isinstance(written, str) or layout.named(written) == written):
            raise ProfileError(f"{layout.label}: a simulated engine is one worker, without parallel ranks")
        return law_of(self.loaded, layout)


@dataclass(frozen=True, slots=True)
class Guess:
    """For hardware of which nothing is known: an invented machine, one worker on each. To be measured."""

    loaded: LoadedRecipe

    def profile(self, layout: Layout) -> Profile:
        """Raises ProfileError for all but one rank."""
        if layout != Layout():
            raise ProfileError(f"{layout.label}: nothing is known of this hardware")
        return msgspec.structs.replace(law_of(self.loaded, layout), name="guess")


def shape_for(loaded: LoadedRecipe) -> ModelShape:
    """The model's shape, from its config.json here or the table of known models.

    Raises ProfileError when neither has it.
    """
    try:
        return find_shape(loaded.model.directory or loaded.recipe.model.path, os.environ)
    except ProfileError as error:
        raise ProfileError(
            error.message, where=error.where or loaded.where("model.path"), hint=error.hint
        ) from error


def estimator_for(
    loaded: LoadedRecipe, gpu: Gpu | None, precision: str, wanted: str = "roofline", *, guess: bool = False
) -> Estimator:
    """The estimator of a recipe's engine. `wanted`: "roofline" or "aiconfigurator[:PYTHON]".

    Raises UsageError for another one, ProfileError when there is nothing to go by, unless it may `guess` what
    runs on CPUs.
    """
    name, _, python = wanted.partition(":")
    if name not in ("roofline", "aiconfigurator") or (python and name == "roofline"):
        raise UsageError(
            f"--estimator: {wanted!r} is not known", hint="roofline, aiconfigurator or aiconfigurator:PYTHON"
        )
    engine = get(loaded.recipe.backend)
    if not engine.features.launches:
        raise ProfileError(
            f"backend {engine.name} only uses engines that run already: there is no layout to choose",
            where=loaded.where("backend"),
        )
    if not engine.features.gpus:
        if name != "roofline":
            raise ProfileError(
                f"AIConfigurator knows GPUs, backend {engine.name} is simulated and has a law of its own",
                where=loaded.where("backend"),
                hint="without --estimator",
            )
        return Law(loaded)
    if guess and gpu is None and loaded.recipe.engine.device == "cpu":
        return Guess(loaded)
    if gpu is None:
        raise ProfileError("which GPU is not known", hint="--gpu h200_sxm")
    shape = shape_for(loaded)
    roofline = Roofline(shape, gpu, loaded.recipe.backend, Precision.named(precision) if precision else None)
    if name == "roofline":
        return roofline
    model = loaded.model.directory or loaded.recipe.model.path
    return AiConfigurator(roofline, config_directory(model, os.environ) or model, python or sys.executable)


def law_of(loaded: LoadedRecipe, layout: Layout) -> Profile:
    """The costs that a simulated engine is told to have, with the limits that its arguments give."""
    args = _arguments(loaded)
    engine = get(loaded.recipe.backend)
    path = args.get("profile")
    law = DEFAULT
    if isinstance(path, str) and path:
        law = load_profile(Path(loaded.file).parent / layout.named(path))
    limits = law.limits or Limits(
        kv_tokens=65_536,
        sequences=_int(args, engine.sequences_argument, 256),
        batched_tokens=_int(args, engine.step_tokens[0], engine.step_tokens[1] or 8192),
    )
    limits = msgspec.structs.replace(
        limits,
        kv_tokens=_int(args, "num-gpu-blocks-override", 0) * _int(args, "block-size", 16) or limits.kv_tokens,
    )
    hardware = engine.name if not engine.features.gpus else loaded.recipe.engine.device
    subject = law.subject or Subject(model=loaded.recipe.model.path, backend=engine.name, hardware=hardware)
    subject = msgspec.structs.replace(subject, layout=layout)
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
