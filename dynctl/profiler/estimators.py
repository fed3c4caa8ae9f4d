"""Who estimates for a profiling: the recipe's own estimator, AIConfigurator instead of it, or a guess."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from dynctl.engines.base import ArgValue
from dynctl.engines.catalog import get
from dynctl.errors import ProfileError, UsageError
from dynctl.perfmodel.estimate import Estimator
from dynctl.perfmodel.find_shape import config_directory
from dynctl.perfmodel.gpus import Gpu
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.precision import Precision
from dynctl.perfmodel.profile import Profile
from dynctl.perfmodel.roofline import Roofline
from dynctl.profiler.aiconfigurator import AiConfigurator
from dynctl.recipe.costs import estimator_of, law_of
from dynctl.recipe.load import LoadedRecipe


@dataclass(frozen=True, slots=True)
class Guess:
    """For hardware of which nothing is known: an invented machine, one worker on each. To be measured."""

    loaded: LoadedRecipe

    def profile(self, layout: Layout) -> Profile:
        """Raises ProfileError for all but one rank."""
        if layout != Layout():
            raise ProfileError(f"{layout.label}: nothing is known of this hardware")
        law = law_of(self.loaded, layout, _arguments(self.loaded))
        return msgspec.structs.replace(law, name="guess")


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
    if guess and gpu is None and engine.features.gpus and loaded.recipe.engine.device == "cpu":
        return Guess(loaded)
    own = estimator_of(loaded, gpu, _arguments(loaded), Precision.named(precision) if precision else None)
    if name == "roofline":
        return own
    if not isinstance(own, Roofline):
        raise ProfileError(
            f"AIConfigurator knows GPUs, backend {engine.name} is simulated and has a law of its own",
            where=loaded.where("backend"),
            hint="without --estimator",
        )
    model = loaded.model.directory or loaded.recipe.model.path
    return AiConfigurator(own, config_directory(model, os.environ) or model, python or sys.executable)


def _arguments(loaded: LoadedRecipe) -> Mapping[str, ArgValue]:
    """All arguments of the recipe, those of its roles laid over the engine's."""
    merged = dict(loaded.recipe.engine.args)
    for section in loaded.recipe.roles.present().values():
        merged.update(section.args)
    return merged
