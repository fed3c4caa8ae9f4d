"""`dynctl simulate`: a trace against a recipe in accelerated time, with its router and planner."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from dynctl.cli import options
from dynctl.cli.render import data, json_data, prose
from dynctl.cli.simulate_process import results_of
from dynctl.cli.simulate_view import as_object, pace_text, results_text
from dynctl.deploy.handover import started_alike
from dynctl.deploy.seats import busy_spec, router_spec
from dynctl.engines.catalog import get
from dynctl.errors import ProfileError, UsageError
from dynctl.perfmodel.choice import Sla
from dynctl.perfmodel.gpus import gpu_named
from dynctl.perfmodel.profile import Profile, load_profile
from dynctl.perfmodel.simulation import HANDOVER_S, MOST, Group, Service, Task
from dynctl.planner.config import PlannerConfig
from dynctl.planner.settings import config_of, limits_of
from dynctl.profiler.estimators import estimator_for
from dynctl.profiler.request import sla_of
from dynctl.protocol.instances import Role
from dynctl.recipe.check import check_recipe
from dynctl.recipe.check_planner import differences, layout_of, profile_path
from dynctl.recipe.load import LoadedRecipe, load_recipe

_BOOT_S = 60.0

Trace = Annotated[
    Path, typer.Option(metavar="FILE", help="Requests with their times (JSON lines).", show_default=False)
]
SlaOption = Annotated[
    str,
    typer.Option(
        "--sla", metavar="SLA", help="ttft=200ms,itl=20ms,percentile=p95; default: the recipe's sla."
    ),
]
Profiles = Annotated[
    list[str] | None,
    typer.Option(
        "--profile",
        metavar="[ROLE=]FILE",
        help="What a replica costs, of all roles or of one; again for more.",
        show_default=False,
    ),
]
Gpu = Annotated[
    str,
    typer.Option(
        metavar="GPU", help="Where no profile is given: an estimate for this GPU.", show_default=False
    ),
]
Gpus = Annotated[
    int, typer.Option(metavar="N", help="The planner's GPUs at most, where the recipe does not say.", min=0)
]
Boot = Annotated[
    float | None,
    typer.Option(
        "--boot-time",
        metavar="TIME",
        parser=options.duration,
        help="Until a new replica serves; default: planner.boot_time, else 60s.",
        show_default=False,
    ),
]
Speed = Annotated[float, typer.Option(metavar="X", help="The trace in 1/X of its time.")]
RateScale = Annotated[
    float, typer.Option("--rate-scale", metavar="X", help="X times the trace's requests in the same time.")
]
Seed = Annotated[int, typer.Option(metavar="N", help="The same seed gives the same result.")]
Compare = Annotated[
    bool,
    typer.Option("--compare", help="Also fixed numbers, the classic formula, and who knows the future."),
]


def simulate(  # noqa: PLR0913 - one parameter for each option of the verb
    recipe: options.Recipe,
    trace: Trace,
    sla: SlaOption = "",
    profiles: Profiles = None,
    gpu: Gpu = "",
    gpus: Gpus = 0,
    boot: Boot = None,
    speed: Speed = 1.0,
    rate_scale: RateScale = 1.0,
    seed: Seed = 1,
    compare: Compare = False,
    set_: options.Set = None,
    unset: options.Unset = None,
    json_: options.Json = False,
) -> None:
    """Replay a trace against a recipe in accelerated time: hours in seconds, no engine is started.

    Router, queue and planner are the real ones; replicas cost what their profile says (--profile, else
    planner.profile, the mocker's own, or an estimate for --gpu). With planner: in the recipe it adds and
    removes replicas, which take --boot-time to start, and changes their role where engines may; GPU-hours
    count each from its start to its end.

    --compare adds: the recipe's replicas unchanged, those that the demand's peak and its mean would take, the
    classic planner formula, and an oracle that knows the demand.

    Examples:

      dynctl simulate my.yaml --trace trace.jsonl --sla ttft=2s,itl=30ms

      dynctl simulate my.yaml --trace trace.jsonl --set planner.enabled=true --compare
    """
    for name, value in (("speed", speed), ("rate-scale", rate_scale)):
        if not (math.isfinite(value) and value > 0.0):
            raise UsageError(f"--{name} must be above 0, not {value:g}")
    asked = [f"sla.{part.strip()}" for part in sla.split(",") if part]
    loaded = load_recipe(recipe, [*(set_ or ()), *asked], unset or (), files_here=False)
    for warning in check_recipe(loaded):
        prose(str(warning), style="warning")
    level = sla_of("", loaded.recipe.sla)
    config = config_of(loaded, gpus, gpu)
    if config is not None:
        boot_s = boot if boot is not None else config.boot_s
        config = dataclasses.replace(config, sla=level, boot_s=boot_s, advisory=False)
    costs = Costs(_by_role(profiles or (), loaded), gpu)
    task = Task(
        service=service_of(loaded, level, costs, config, boot),
        trace=str(trace),
        seed=seed,
        speed=speed,
        rate_scale=rate_scale,
        planner=msgspec.to_builtins(config) if config is not None else None,
        compare=compare,
    )
    found = results_of(task, drawn=sys.stderr.isatty())
    if json_:
        json_data(as_object(task, found))
    else:
        data(results_text(task, found))
        prose(pace_text(found), style="dim")


@dataclass(frozen=True, slots=True)
class Costs:
    """Where costs come from: a GPU's name, or files and their profiles by role; "" = of all that have none of
    their own.
    """

    profiles: Mapping[str, tuple[str, Profile]]
    gpu: str

    def of(self, loaded: LoadedRecipe, role: Role) -> Profile:
        """A replica's costs. Raises ProfileError when there is nothing to go by, or only what was made of
        something else.
        """
        recipe, section = loaded.recipe, loaded.recipe.roles.present()[role]
        kind = gpu_named(self.gpu) if self.gpu else None
        path = profile_path(recipe, role)
        where, given = self.profiles.get(role) or self.profiles.get("") or (path, None)
        if given is None and path:
            given = load_profile(Path(path))
        if given is not None:
            differs = differences(given, recipe, get(recipe.backend), section, kind.name if kind else "")
            if differs:
                raise ProfileError(f"it is of something else than {role}: {'; '.join(differs)}", where=where)
            return given
        return estimator_for(loaded, kind, "").profile(layout_of(section))


def service_of(
    loaded: LoadedRecipe, level: Sla, costs: Costs, config: PlannerConfig | None, boot: float | None
) -> Service:
    """The recipe's deployment as the simulator knows it."""
    recipe, groups = loaded.recipe, []
    engine = get(recipe.backend)
    for role, section in recipe.roles.present().items():
        profile = costs.of(loaded, role)
        bounds = config.roles[role] if config is not None else None
        group = Group(
            role=role,
            replicas=section.replicas,
            gpus=layout_of(section).gpus,
            profile=profile,
            limits=profile.limits or limits_of(engine, {**recipe.engine.args, **section.args}),
            least=bounds.minimum if bounds else 1,
            most=max(bounds.maximum if bounds else MOST, section.replicas),
        )
        groups.append(group)
    boot_s = boot if boot is not None else config.boot_s if config is not None else _BOOT_S
    alike = started_alike(loaded) and len({(one.gpus, one.limits) for one in groups}) == 1
    return Service(
        name=recipe.name,
        groups=tuple(groups),
        router=router_spec(recipe),
        busy=busy_spec(recipe),
        sla=level,
        boot_s=boot_s,
        handover_s=HANDOVER_S if alike else None,
    )


def _by_role(words: tuple[str, ...] | list[str], loaded: LoadedRecipe) -> dict[str, tuple[str, Profile]]:
    """Profiles by the role they are given for, "" = all. Raises UsageError, ProfileError."""
    found: dict[str, tuple[str, Profile]] = {}
    present = loaded.recipe.roles.present()
    for word in words:
        role, equals, path = word.partition("=")
        if not equals:
            role, path = "", word
        elif role not in present:
            raise UsageError(f"--profile: the recipe has no role {role!r}", hint=", ".join(present))
        if role in found:
            raise UsageError(f"--profile is given twice for {role or 'all roles'}", hint="ROLE=FILE for each")
        found[role] = path, load_profile(Path(path))
    return found
