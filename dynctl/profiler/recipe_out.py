"""The user's recipe with the chosen roles: its own text, so that comments stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynctl.engines.arguments import normal_name
from dynctl.engines.base import Engine
from dynctl.engines.catalog import get
from dynctl.errors import ProfileError
from dynctl.perfmodel.choice import Option, Pool, Sla
from dynctl.profiler.request import sla_of
from dynctl.profiler.rewrite import plain_values, rewritten
from dynctl.recipe.load import LoadedRecipe
from dynctl.recipe.schema import Recipe, RoleSection


def recipe_text(loaded: LoadedRecipe, option: Option, head: str, sla: Sla) -> str:
    """The recipe that starts `option`, with `head` as its first comment, to be written anywhere.

    Its service level is `sla`, for which `option` was chosen.

    It holds what flags have changed, and paths that the recipe tells relative to itself are told whole. A
    planner gets the profiles that are written beside it (`profile_name`). Raises ProfileError when the file
    has changed so that it is no recipe any more.
    """
    try:
        text = Path(loaded.file).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ProfileError(f"cannot be read any more: {error.strerror}", where=loaded.file) from error
    sections: dict[str, Any] = {"roles": {pool.role: _role(loaded.recipe, pool) for pool in option.pools}}
    if not _says(loaded.recipe, sla):
        sections["sla"] = _sla(sla)
    if loaded.recipe.planner is not None:
        sections["planner"] = _planner(plain_values(loaded, short=True).get("planner", {}), option)
    text = rewritten(text, loaded, sections)
    return "".join(f"# {line}\n" for line in head.splitlines()) + "\n" + text


def _says(recipe: Recipe, sla: Sla) -> bool:
    said = recipe.sla
    return said is not None and bool(said.ttft or said.itl) and sla_of("", said) == sla


def _sla(sla: Sla) -> dict[str, str]:
    limits = {"ttft": sla.ttft_s, "itl": sla.itl_s}
    told = {name: f"{seconds * 1000:.10g}ms" for name, seconds in limits.items() if seconds is not None}
    return {**told, "percentile": f"p{sla.percentile * 100:.10g}"}


def profile_name(pool: Pool) -> str:
    """The file, beside the recipe, of what a replica of a pool costs."""
    return f"profile-{pool.role}.json"


def _planner(before: dict[str, Any], option: Option) -> dict[str, Any]:
    there = before.get("roles", {})
    roles = {pool.role: {**there.get(pool.role, {}), "profile": profile_name(pool)} for pool in option.pools}
    return {**{name: value for name, value in before.items() if name != "profile"}, "roles": roles}


def _role(recipe: Recipe, pool: Pool) -> dict[str, Any]:
    section = section_of(recipe, pool)
    return {
        "replicas": section.replicas,
        **section.model_dump(mode="json", by_alias=True, exclude_defaults=True),
    }


def section_of(recipe: Recipe, pool: Pool) -> RoleSection:
    """The section that starts a pool, be it tried or written: what the recipe says of the role, with the
    pool's sizes and batch limits (0: those of the recipe).
    """
    before, layout = _section_before(recipe, pool), pool.layout
    limits = limit_args(get(recipe.backend), pool) if pool.sequences else {}
    spelt = {normal_name(name): name for name in (*recipe.engine.args, *before.args)}
    told = {spelt.get(normal_name(name), name): value for name, value in limits.items()}
    return before.model_copy(
        update={
            "replicas": pool.replicas,
            "tensor_parallel": layout.tensor,
            "pipeline_parallel": layout.pipeline,
            "data_parallel": layout.data,
            "expert_parallel": layout.expert,
            "args": {**before.args, **told},
        }
    )


def limit_args(engine: Engine, pool: Pool) -> dict[str, int]:
    """The batch limits of a pool in the engine's own words, by rank."""
    ranks = pool.layout.data
    found = {engine.sequences_argument: pool.sequences, engine.step_tokens[0]: pool.batched_tokens}
    return {name: max(1, -(-value // ranks)) for name, value in found.items() if name}


def _section_before(recipe: Recipe, pool: Pool) -> RoleSection:
    """What the recipe says of the role; of the nearest one when it has it not."""
    present: dict[str, RoleSection] = {role: one for role, one in recipe.roles.present().items()}
    nearest = {"aggregated": ("decode", "prefill"), "prefill": ("aggregated",), "decode": ("aggregated",)}
    for role in (pool.role, *nearest.get(pool.role, ())):
        if role in present:
            return present[role]
    return RoleSection()
