"""What a replica of a recipe costs, without running it: the roofline for engines on GPUs, the engine's own
law for one that is simulated.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from dynctl.engines.base import ArgValue
from dynctl.engines.catalog import get
from dynctl.errors import ProfileError
from dynctl.perfmodel.find_shape import find_shape
from dynctl.perfmodel.fit import scaled
from dynctl.perfmodel.gpus import Gpu
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.precision import Precision
from dynctl.perfmodel.profile import DEFAULT, Limits, Profile, Subject, load_profile
from dynctl.perfmodel.queueing import Routing
from dynctl.perfmodel.roofline import Roofline
from dynctl.perfmodel.shapes import ModelShape
from dynctl.recipe.load import LoadedRecipe

ROUTINGS: Mapping[str, Routing] = {
    "kv": "least_work",
    "least_loaded": "least_work",
    "round_robin": "round_robin",
    "random": "random",
    "power_of_two": "random",
    "consistent_hash": "random",
}
"""The router's modes as queues: what is not known to spread work evenly counts as random, the safe side."""


@dataclass(frozen=True, slots=True)
class Law:
    """An estimator for an engine whose costs are a file, or a file for each layout. `args`: its arguments."""

    loaded: LoadedRecipe
    args: Mapping[str, ArgValue]

    def profile(self, layout: Layout) -> Profile:
        """The costs of the file. Raises ProfileError for layouts that have none of their own."""
        written = self.args.get("profile")
        if layout != Layout() and (not isinstance(written, str) or layout.named(written) == written):
            raise ProfileError(f"{layout.label}: a simulated engine is one worker, without parallel ranks")
        return law_of(self.loaded, layout, self.args)


def estimator_of(
    loaded: LoadedRecipe, gpu: Gpu | None, args: Mapping[str, ArgValue], precision: Precision | None = None
) -> Roofline | Law:
    """The estimator of a recipe's engine, whose replicas have these arguments.

    Raises ProfileError when there is nothing to go by: no engine is started, the GPU is not known, the model
    has no config.
    """
    engine = get(loaded.recipe.backend)
    if not engine.features.launches:
        raise ProfileError(
            f"backend {engine.name} only uses engines that run already: there is no layout to choose",
            where=loaded.where("backend"),
        )
    if not engine.features.gpus:
        return Law(loaded, args)
    if gpu is None:
        raise ProfileError("which GPU is not known", hint="--gpu h200_sxm")
    return Roofline(shape_for(loaded), gpu, loaded.recipe.backend, precision)


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


def law_of(loaded: LoadedRecipe, layout: Layout, args: Mapping[str, ArgValue]) -> Profile:
    """The costs that a simulated engine is told to have, at its speed, with the limits that its arguments
    give.
    """
    engine = get(loaded.recipe.backend)
    path = args.get("profile")
    law = DEFAULT
    if isinstance(path, str) and path:
        law = load_profile(Path(layout.named(path)))
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
    law = msgspec.structs.replace(law, limits=limits, subject=subject, source=law.source or "estimate")
    return _at_speed(law, args.get("speedup", 1.0))


def _at_speed(law: Profile, speed: object) -> Profile:
    if not isinstance(speed, int | float) or speed <= 0 or speed == 1:
        return law
    moved = law.transfer
    moved = msgspec.structs.replace(
        moved, bytes_per_s=moved.bytes_per_s * speed, latency_s=moved.latency_s / speed
    )
    return msgspec.structs.replace(scaled(law, prefill=1 / speed, decode=1 / speed), transfer=moved)


def _int(args: Mapping[str, ArgValue], name: str, usual: int) -> int:
    value = args.get(name)
    return value if isinstance(value, int) and value > 0 else usual
