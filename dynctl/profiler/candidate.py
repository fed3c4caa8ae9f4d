"""A layout, or a whole split, as a recipe of its own that `dynctl up` takes; and what its costs depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dynctl.perfmodel.choice import Option, Pool, Prediction
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.profile import Limits
from dynctl.profiler.recipe_out import section_of
from dynctl.recipe.load import LoadedRecipe
from dynctl.recipe.schema import ApiKey, Roles, RoleSection


def alone(layout: Layout, limits: Limits | None = None) -> Option:
    """One replica of a layout that does both: what a layout is measured as, with these batch limits."""
    pool = Pool(
        role="aggregated",
        layout=layout,
        replicas=1,
        sequences=limits.sequences if limits else 0,
        batched_tokens=limits.batched_tokens if limits else 0,
        load=0.0,
    )
    nothing = Prediction(
        ttft_s=0.0, itl_s=0.0, capacity=0.0, tokens_per_s_per_gpu=0.0, tokens_per_s_per_user=0.0
    )
    return Option(mode="aggregated", pools=(pool,), predicted=nothing)


def candidate(
    loaded: LoadedRecipe, option: Option, name: str, key: str, hosts: Sequence[str] = ()
) -> LoadedRecipe:
    """The recipe that starts `option` under a name of its own, on any free port, for who has the `key`.

    All else is as in the recipe that is written for the option (`recipe_out`), but that no planner changes
    it. `hosts`: those it may run on, () = as the recipe says.
    """
    recipe = loaded.recipe
    roles = {pool.role: section_of(recipe, pool) for pool in option.pools}
    if hosts:
        roles = {role: one.model_copy(update={"hosts": list(hosts)}) for role, one in roles.items()}
    digest = "sha256:" + hashlib.sha256(key.encode()).hexdigest()
    # Who has the key may ask from elsewhere: a load by SSH comes from this machine.
    host = "0.0.0.0" if recipe.target != "local" else recipe.frontend.host
    keys = [ApiKey(name="profile", key=digest)]
    frontend = recipe.frontend.model_copy(
        update={"host": host, "port": 0, "replicas": 1, "hosts": [], "api_key": keys}
    )
    changed = {"name": name, "description": "", "roles": Roles(**roles), "frontend": frontend}
    return replace(loaded, recipe=recipe.model_copy(update={**changed, "planner": None}))


def depends_on(made: LoadedRecipe, layout: Layout, version: str, hardware: str) -> dict[str, Any]:
    """All that a candidate's costs depend on: model, engine and version, layout, flags, hardware. Files that
    flags name count by what is in them.
    """
    recipe = made.recipe
    roles: dict[str, dict[str, Any]] = {
        role: {"args": section.args, "env": section.env, "sizes": _sizes(section)}
        for role, section in recipe.roles.present().items()
    }
    args = {**recipe.engine.args, **{k: v for one in roles.values() for k, v in one["args"].items()}}
    return {
        "model": recipe.model.path,
        "revision": recipe.model.revision,
        "backend": recipe.backend,
        "version": version,
        "engine": {
            "venv": recipe.engine.venv,
            "python": recipe.engine.python,
            "container": recipe.engine.container,
            "device": recipe.engine.device,
            "kv_transfer": recipe.engine.kv_transfer,
            "args": recipe.engine.args,
            "env": recipe.engine.env,
        },
        "roles": roles,
        "files": _files(args, layout),
        "hardware": hardware,
        "target": recipe.target,
    }


def _sizes(section: RoleSection) -> list[int]:
    return [
        section.tensor_parallel,
        section.pipeline_parallel,
        section.data_parallel,
        section.expert_parallel,
    ]


def _files(args: Mapping[str, Any], layout: Layout) -> dict[str, str]:
    found = {}
    for name, value in args.items():
        path = Path(layout.named(value)) if isinstance(value, str) and "/" in value else None
        if path is not None and path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
