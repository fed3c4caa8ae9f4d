"""From a recipe to what the planner goes by."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from dynctl import hostfacts
from dynctl.engines.arguments import step_tokens
from dynctl.engines.base import ArgValue, Engine
from dynctl.engines.catalog import get
from dynctl.errors import PlannerError, ProfileError
from dynctl.perfmodel.choice import Sla
from dynctl.perfmodel.gpus import gpu_named
from dynctl.perfmodel.profile import Limits, Profile, load_profile
from dynctl.planner.config import PlannerConfig, RoleConfig
from dynctl.protocol.instances import Role
from dynctl.recipe.check_planner import differences, layout_of, profile_path
from dynctl.recipe.costs import ROUTINGS, estimator_of
from dynctl.recipe.load import LoadedRecipe
from dynctl.recipe.schema import Recipe, RoleSection

_MOST = 64
"""Replicas of a role, where neither the recipe nor the GPUs say."""
_KV_TOKENS = 1 << 20
_SEQUENCES = 256
_BATCHED = 8192


def config_of(loaded: LoadedRecipe, gpus: int, kind: str = "") -> PlannerConfig | None:
    """The planner's rules; None when the recipe has none or it is off. `gpus`: of the deployment's hosts,
    `kind`: which they are, where the recipe does not say; "" = those of this machine.

    Roles without a profile have an estimate, or the reason why there is none.
    Raises PlannerError for a profile that cannot be used, or when nothing is asked for.
    """
    recipe = loaded.recipe
    planner, engine = recipe.planner, get(recipe.backend)
    if planner is None or not planner.enabled:
        return None
    if recipe.sla is None:
        raise PlannerError(
            "there is no service level to keep", where=loaded.where("planner"), hint="sla.ttft"
        )
    budget = planner.max_gpus or (gpus if engine.features.gpus and recipe.engine.device == "gpu" else 0)
    return PlannerConfig(
        sla=Sla(
            ttft_s=recipe.sla.ttft,
            itl_s=recipe.sla.itl,
            percentile=float(recipe.sla.percentile.removeprefix("p")) / 100.0,
        ),
        roles={
            role: _role(loaded, engine, (role, section), (budget, kind))
            for role, section in recipe.roles.present().items()
        },
        mode=planner.mode,
        interval_s=planner.interval,
        load_interval_s=planner.load_interval,
        predictor=planner.predictor,
        season_s=planner.season,
        gpus=budget,
        headroom=planner.headroom,
        cooldown_s=planner.cooldown,
        boot_s=planner.boot_time,
        limit_s=planner.start_limit,
        retry_s=planner.retry,
        routing=ROUTINGS[recipe.router.mode],
        advisory=planner.advisory,
    )


def _role(
    loaded: LoadedRecipe, engine: Engine, one: tuple[Role, RoleSection], gpus_: tuple[int, str]
) -> RoleConfig:
    (role, section), (budget, kind) = one, gpus_
    recipe = loaded.recipe
    assert recipe.planner is not None
    bounds, gpus = getattr(recipe.planner.roles, role), layout_of(section).gpus
    args = {**recipe.engine.args, **section.args}
    most = bounds.max_replicas or (max(bounds.min_replicas, budget // gpus) if budget else _MOST)
    limits, why = limits_of(engine, args), ""
    profile = _profile(loaded, engine, one)
    if profile is None:
        try:
            profile = _estimate(loaded, engine, (section, args), limits, kind)
        except ProfileError as error:
            why = error.message
    return RoleConfig(
        minimum=bounds.min_replicas,
        maximum=most,
        gpus=gpus,
        profile=profile,
        limits=limits,
        unestimated=why,
    )


def _estimate(
    loaded: LoadedRecipe,
    engine: Engine,
    one: tuple[RoleSection, Mapping[str, ArgValue]],
    limits: Limits,
    kind: str,
) -> Profile:
    """What the role's layout costs by the estimate, within the limits of its arguments. Raises ProfileError
    with the reason why there is none.
    """
    section, args = one
    recipe = loaded.recipe
    assert recipe.planner is not None
    gpu = None
    if engine.features.gpus:
        if recipe.engine.device != "gpu":
            raise ProfileError("nothing is known of engines on CPUs")
        gpu = gpu_named(recipe.planner.gpu or kind or _kind_here())
    found = estimator_of(loaded, gpu, args).profile(layout_of(section))
    kv_tokens = found.limits.kv_tokens if found.limits else limits.kv_tokens
    return msgspec.structs.replace(
        found, limits=msgspec.structs.replace(limits, kv_tokens=kv_tokens), source="estimate"
    )


def _kind_here() -> str:
    """The GPUs of this machine, as their driver names them. Raises ProfileError when it names none."""
    there = hostfacts.gpus()
    names = [str(gpu["name"]) for gpu in there.get("gpus", ())]
    if not names:
        note = there.get("gpu_note", "no GPU here")
        raise ProfileError(f"which GPU is not known ({note}); planner.gpu tells it")
    return names[0]


def _profile(loaded: LoadedRecipe, engine: Engine, one: tuple[Role, RoleSection]) -> Profile | None:
    role, section = one
    path = profile_path(loaded.recipe, role)
    if not path:
        return None
    try:
        profile = load_profile(Path(path))
    except ProfileError as error:
        raise PlannerError(error.message, where=error.where, hint=error.hint) from error
    differs = differences(profile, loaded.recipe, engine, section)
    if differs:
        raise PlannerError(f"the profile is of something else: {'; '.join(differs)}", where=path)
    return profile


def limits_of(engine: Engine, args: Mapping[str, ArgValue]) -> Limits:
    """What a replica takes at once as far as its arguments say; KV is told by the engine once it runs."""
    sequences = args.get(engine.sequences_argument)
    return Limits(
        kv_tokens=_KV_TOKENS,
        sequences=sequences if isinstance(sequences, int) and sequences > 0 else _SEQUENCES,
        batched_tokens=step_tokens(engine.step_tokens, args) or _BATCHED,
    )


def about(config: PlannerConfig, recipe: Recipe) -> dict[str, object]:
    """The rules for people and scripts."""
    planner = recipe.planner
    assert planner is not None
    return {
        "advisory": planner.advisory,
        "mode": config.mode,
        "predictor": config.predictor,
        "interval_s": config.interval_s,
        "load_interval_s": config.load_interval_s,
        "sla": {
            "ttft_s": config.sla.ttft_s,
            "itl_s": config.sla.itl_s,
            "percentile": config.sla.percentile,
        },
        "max_gpus": config.gpus,
        "headroom": config.headroom,
        "cooldown_s": config.cooldown_s,
        "roles": {
            role: {
                "min_replicas": one.minimum,
                "max_replicas": one.maximum,
                "gpus": one.gpus,
                "costs": (one.profile.source or "profile") if one.profile else "learnt",
                "no_estimate": one.unestimated,
            }
            for role, one in config.roles.items()
        },
    }
