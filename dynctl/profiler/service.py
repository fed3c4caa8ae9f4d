"""One profiling, from what is asked to the choice: estimate, choose. `run` is the one way in.

Nothing is started here: costs come from an estimator and from profiles that were measured before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dynctl.engines.base import Engine, Parallel, RoleSettings
from dynctl.engines.catalog import get
from dynctl.errors import PlacementError, ProfileError
from dynctl.perfmodel.choice import Choice, Demand, Refused, Sla
from dynctl.perfmodel.estimate import Estimator
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.offers import Ask
from dynctl.perfmodel.profile import Profile
from dynctl.perfmodel.split import choose
from dynctl.profiler.layouts import Space, candidates
from dynctl.protocol.instances import Role
from dynctl.recipe.costs import ROUTINGS
from dynctl.recipe.load import LoadedRecipe
from dynctl.topology.inventory import Inventory
from dynctl.topology.placement import Need, place


@dataclass(frozen=True, slots=True)
class Asked:
    """All that a profiling is asked. `most`: the highest rate on the GPUs there are, else the fewest GPUs.

    `inventory`: the nodes to place on; `gpus`: how many of theirs may be used. `measured`: profiles that
    stand for the estimate of their layouts.
    """

    loaded: LoadedRecipe
    sla: Sla
    demand: Demand
    inventory: Inventory
    gpus: int
    estimator: Estimator
    most: bool = False
    experts: bool = False
    longest: int = 0
    measured: Sequence[tuple[str, Profile]] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """The choice, and the profiles it rests on."""

    choice: Choice
    profiles: Mapping[Layout, Profile] = field(default_factory=dict)


def run(asked: Asked) -> Outcome:
    """Estimate all layouts and choose. Raises ProfileError when nothing can be estimated at all."""
    require_context(asked)
    profiles, refused = estimated(asked)
    profiles.update(checked(asked.measured, profiles))
    return Outcome(choose(ask_of(asked, profiles, refused)), profiles)


def require_context(asked: Asked) -> None:
    """Raises ProfileError when the demand holds requests that are longer than the model takes."""
    wanted = max(prompt + answer for prompt, answer in asked.demand.lengths)
    if asked.longest and wanted > asked.longest:
        raise ProfileError(
            f"a prompt and its answer take {wanted} tokens, the model's context is {asked.longest}",
            hint="smaller --isl and --osl, or a trace without such requests",
        )


def ask_of(asked: Asked, profiles: Mapping[Layout, Profile], refused: tuple[Refused, ...] = ()) -> Ask:
    """What to choose from, when layouts cost this in whatever role."""
    engine = get(asked.loaded.recipe.backend)
    roles: tuple[Role, ...] = ("aggregated", "prefill", "decode")
    if not engine.features.disaggregation:
        roles = ("aggregated",)
    return Ask(
        sla=asked.sla,
        demand=asked.demand,
        profiles=dict.fromkeys(roles, profiles),
        gpus=asked.gpus,
        most=asked.most,
        routing=ROUTINGS[asked.loaded.recipe.router.mode],
        fits=fitting(asked, engine),
        refused=refused,
    )


def estimated(asked: Asked) -> tuple[dict[Layout, Profile], tuple[Refused, ...]]:
    """The costs of each layout that can be, and why the others cannot."""
    engine = get(asked.loaded.recipe.backend)
    per_node = max((host.gpus for host in asked.inventory.hosts), default=asked.gpus)
    profiles: dict[Layout, Profile] = {}
    refused: list[Refused] = []
    space = Space(asked.gpus, max(1, per_node), asked.experts)
    for layout in (*candidates(space), *candidates(replace(space, stages=True))):
        if layout.pipeline > 1 and profiles:
            continue  # stages help no request: they are for models that fit no other way
        reason = _beyond(engine, layout, per_node)
        if not reason:
            try:
                profiles[layout] = asked.estimator.profile(layout)
                continue
            except ProfileError as error:
                reason = error.message.removeprefix(f"{layout.label}: ")
        refused.append(Refused(layout=layout, reason=reason))
    return profiles, tuple(refused)


def _beyond(engine: Engine, layout: Layout, per_node: int) -> str:
    """What the engine cannot do of a layout; "" when nothing."""
    if layout.data > 1 and not engine.features.data_parallel:
        return f"{engine.name} has no data-parallel ranks in one replica"
    if layout.gpus > per_node and not engine.features.multi_node:
        return f"{engine.name} does not span nodes, which have {per_node} GPUs"
    return ""


def checked(
    measured: Sequence[tuple[str, Profile]], estimates: Mapping[Layout, Profile]
) -> dict[Layout, Profile]:
    """The profiles that are given, by layout. Raises ProfileError for one of another model, engine, GPU."""
    found = {}
    for where, profile in measured:
        subject = profile.subject
        if subject is None or profile.limits is None:
            missing = "subject" if subject is None else "limits"
            raise ProfileError(f"does not tell its {missing}", where=where, hint="written by dynctl profile")
        mine = next((one.subject for one in estimates.values() if one.subject), None)
        if mine is not None and (differences := subject.differences(mine)):
            raise ProfileError(f"was made for something else: {'; '.join(differences)}", where=where)
        found[subject.layout] = profile
    return found


def fitting(asked: Asked, engine: Engine) -> Callable[[tuple[tuple[Layout, int], ...]], bool]:
    """Whether pools can be placed on the nodes, and the engine takes them beside each other."""
    recipe = asked.loaded.recipe

    def fits(pools: tuple[tuple[Layout, int], ...]) -> bool:
        roles: tuple[Role, ...] = ("prefill", "decode") if len(pools) == 2 else ("aggregated",)
        sizes = [
            (role, parallel_of(layout), count) for role, (layout, count) in zip(roles, pools, strict=True)
        ]
        if engine.features.gpus:
            multi = engine.features.multi_node
            try:
                place(
                    [Need(role, n, parallel, multi_node=multi) for role, parallel, n in sizes],
                    asked.inventory,
                )
            except PlacementError:
                return False
        settings = [
            RoleSettings(role, n, parallel, recipe.engine.args, recipe.engine.env, recipe.model.path)
            for role, parallel, n in sizes
        ]
        return all(found.level != "error" for found in engine.check(settings, asked.loaded.model.facts))

    return fits


def parallel_of(layout: Layout) -> Parallel:
    """A layout in the engines' words."""
    return Parallel(layout.tensor, layout.pipeline, layout.data, layout.expert)
