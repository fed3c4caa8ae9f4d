"""A layout, or a whole split, as a recipe of its own that `dynctl up` takes; and what its costs depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dynctl.engines.catalog import get
from dynctl.perfmodel.choice import Option, Pool, Prediction
from dynctl.perfmodel.layout import Layout
from dynctl.profiler.recipe_out import limit_args, section_before
from dynctl.recipe.load import LoadedRecipe
from dynctl.recipe.schema import ApiKey, Recipe, Roles, RoleSection


def alone(layout: Layout) -> Option:
    """One replica of a layout that does both: what a layout is measured as."""
    pool = Pool(role="aggregated", layout=layout, replicas=1, sequences=0, batched_tokens=0, load=0.0)
    nothing = Prediction(
        ttft_s=0.0, itl_s=0.0, capacity=0.0, tokens_per_s_per_gpu=0.0, tokens_per_s_per_user=0.0
    )
    return Option(mode="aggregated", pools=(pool,), predicted=nothing)


def candidate(
    loaded: LoadedRecipe, option: Option, name: str, key: str, hosts: Sequence[str] = ()
) -> LoadedRecipe:
    """The recipe that starts `option` under a name of its own, on any free port, for who has the `key`.

    Limits of 0 in a pool are left as the recipe has them. `hosts`: those it may run on, () = as the recipe
    says.
    """
    recipe = loaded.recipe
    roles = {pool.role: _section(recipe, pool, hosts) for pool in option.pools}
    digest = "sha256:" + hashlib.sha256(key.encode()).hexdigest()
    # Who has the key may ask from elsewhere: a load by SSH comes from this machine.
    host = "0.0.0.0" if recipe.target != "local" else recipe.frontend.host
    keys = [ApiKey(name="profile", key=digest)]
    frontend = recipe.frontend.model_copy(
        update={"host": host, "port": 0, "replicas": 1, "hosts": [], "api_key": keys}
    )
    made = recipe.model_copy(
        update={"name": name, "description": "", "roles": Roles(**roles), "frontend": frontend}
    )
    return replace(loaded, recipe=made)


def _section(recipe: Recipe, pool: Pool, hosts: Sequence[str]) -> RoleSection:
    engine, before = get(recipe.backend), section_before(recipe, pool)
    limits = limit_args(engine, pool) if pool.sequences else {}
    told = {engine.cached_argument: True} if engine.cached_argument else {}
    return before.model_copy(
        update={
            "replicas": pool.replicas,
            "tensor_parallel": pool.layout.tensor,
            "pipeline_parallel": pool.layout.pipeline,
            "data_parallel": pool.layout.data,
            "expert_parallel": pool.layout.expert,
            "args": {**before.args, **limits, **told},
            **({"hosts": list(hosts)} if hosts else {}),
        }
    )


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
