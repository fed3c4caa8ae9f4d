"""`dynctl profile`: which parallelism, how many prefill and decode workers, for a service level."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from dynctl.cli import options
from dynctl.cli.profile_write import Wanted, finish
from dynctl.cli.render import prose
from dynctl.engines.catalog import get
from dynctl.errors import UsageError
from dynctl.perfmodel.choice import Demand, Sla
from dynctl.perfmodel.gpus import Gpu, gpu_named
from dynctl.perfmodel.profile import load_profile
from dynctl.perfmodel.roofline import Roofline
from dynctl.profiler.aiconfigurator import AiConfigurator
from dynctl.profiler.estimators import estimator_for
from dynctl.profiler.request import demand_from, sla_of
from dynctl.profiler.service import Asked, run
from dynctl.recipe.check import check_recipe, parallel_of
from dynctl.recipe.costs import shape_for
from dynctl.recipe.load import LoadedRecipe, load_recipe
from dynctl.recipe.schema import RoleSection
from dynctl.topology.inventory import Host, Inventory
from dynctl.topology.inventory_file import inventory_for

_LEAST_BUDGET_S = 20.0
_MOST_GPUS = 2048

SlaOption = Annotated[
    str,
    typer.Option(
        "--sla", metavar="SLA", help="ttft=200ms,itl=20ms,percentile=p95; default: the recipe's sla."
    ),
]
Isl = Annotated[int | None, typer.Option(help="Prompt tokens (default 4000).", show_default=False)]
Osl = Annotated[int | None, typer.Option(help="Answer tokens (default 500).", show_default=False)]
Trace = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Lengths, rate and hit rate from a trace (JSON lines).", show_default=False
    ),
]
Rate = Annotated[
    float | None, typer.Option(help="Requests a second: the fewest GPUs are looked for.", show_default=False)
]
Gpus = Annotated[
    int | None,
    typer.Option(help="GPUs at most; without --rate the highest rate is looked for.", show_default=False),
]
GpuOption = Annotated[
    str, typer.Option("--gpu", metavar="GPU", help="Which GPU, such as h200_sxm.", show_default=False)
]
Precision = Annotated[
    str,
    typer.Option(
        metavar="P", help="bf16, fp8 or fp4; default: as the model is published.", show_default=False
    ),
]
HitRate = Annotated[
    float | None,
    typer.Option(help="Share of prompt tokens found in the cache, 0 to 1.", show_default=False),
]
ProfileFile = Annotated[
    list[Path] | None,
    typer.Option("--profile", metavar="FILE", help="A measured profile, again for more.", show_default=False),
]
EstimatorOption = Annotated[
    str,
    typer.Option(
        "--estimator",
        metavar="E",
        help="roofline, or aiconfigurator[:PYTHON], the Python that has it (docs/profiling.md).",
    ),
]
Budget = Annotated[
    float,
    typer.Option(
        "--budget",
        metavar="TIME",
        parser=options.duration,
        help="For measuring and trying it, like 30m.",
        show_default="30m",
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on where an earlier run ended: what it measured stays.")
]
Parallel = Annotated[
    int,
    typer.Option(
        "--parallel", metavar="N", help="Layouts measured at once, at most.", show_default="as GPUs allow"
    ),
]
EstimateOnly = Annotated[bool, typer.Option("--estimate-only", help="Start nothing, measure nothing.")]
Out = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where files go; default: profile-NAME here.", show_default=False),
]


def profile(  # noqa: PLR0913 - one parameter for each option of the verb
    recipe: options.Recipe,
    sla: SlaOption = "",
    isl: Isl = None,
    osl: Osl = None,
    trace: Trace = None,
    rate: Rate = None,
    gpus: Gpus = None,
    gpu: GpuOption = "",
    precision: Precision = "",
    hit_rate: HitRate = None,
    profiles: ProfileFile = None,
    estimator: EstimatorOption = "roofline",
    estimate_only: EstimateOnly = False,
    budget: Budget = 1800.0,
    resume: Resume = False,
    parallel: Parallel = 0,
    inventory: options.Inventory = None,
    target: options.Target = None,
    out: Out = None,
    set_: options.Set = None,
    unset: options.Unset = None,
    json_: options.Json = False,
) -> int:
    """Choose parallelism, replicas and batch limits for a service level, and write the recipe.

    Layouts that the estimate leaves open are started as dynctl up does and measured; the split chosen from
    that is started whole and tried at the rate. With --rate the fewest GPUs are looked for, else the highest
    rate on --gpus (default: those of the inventory, else as many as the recipe uses). Prefill and decode
    together is always a candidate. To --out go: a recipe for dynctl up, the profiles it rests on, the choice
    and all measurements as JSON, a report with plots, and the journal. Ctrl-C ends what was started; --resume
    goes on from there.

    Examples:

      dynctl profile recipes/llama70b-disagg.yaml --gpu h200_sxm --gpus 16 --estimate-only

      dynctl profile my.yaml --sla ttft=1s,itl=30ms --trace trace.jsonl --rate 10 --gpu h100 --budget 20m
    """
    loaded = load_recipe(recipe, options.with_target(set_, target), unset or (), files_here=not estimate_only)
    check_recipe(loaded)
    demand = demand_from((isl, osl), trace, rate, hit_rate)
    _check_numbers(gpus, parallel, budget)
    kind = gpu_named(gpu) if gpu else None
    machines = Machines(inventory, gpus, kind, precision, estimator, guess=not estimate_only)
    asked = asked_of(loaded, machines, sla_of(sla, loaded.recipe.sla), demand)
    measured = [(str(path), load_profile(path)) for path in profiles or ()]
    asked = replace(asked, measured=measured, most=rate is None and trace is None)
    wanted = Wanted(out or Path(f"profile-{loaded.recipe.name}"), inventory, json_)
    if estimate_only:
        outcome = run(asked)
        return finish(asked, wanted, outcome, usable=outcome.choice.chosen is not None)
    from dynctl.cli.profile_measure import How, measured_choice, tell_measured

    found = measured_choice(asked, wanted.folder, How(budget, resume, parallel, inventory, gpu))
    tell_measured(found.measurement, found.usable)
    return finish(asked, wanted, found.outcome, usable=found.usable, measured=found.measurement)


def _check_numbers(gpus: int | None, parallel: int, budget: float) -> None:
    """Raises UsageError."""
    if gpus is not None and gpus < 1:
        raise UsageError(f"--gpus must be 1 or more, not {gpus}")
    if gpus is not None and gpus > _MOST_GPUS:
        raise UsageError(f"--gpus must be {_MOST_GPUS} at most, not {gpus}: all splits are looked at")
    if parallel < 0:
        raise UsageError("--parallel must be above 0")
    if not budget >= _LEAST_BUDGET_S:
        raise UsageError(
            f"--budget must be {_LEAST_BUDGET_S:.0f}s or more, not {budget:g} s: an engine starts in it",
            hint="--estimate-only measures nothing",
        )


@dataclass(frozen=True, slots=True)
class Machines:
    """What the flags say of the machines to choose for."""

    inventory: Path | None
    gpus: int | None
    kind: Gpu | None
    precision: str
    estimator: str = "roofline"
    guess: bool = False


def asked_of(loaded: LoadedRecipe, machines: Machines, level: Sla, demand: Demand) -> Asked:
    """The question for the profiler, with an estimator for the recipe's engine on these machines."""
    simulated = not get(loaded.recipe.backend).features.gpus
    estimator = estimator_for(
        loaded, machines.kind, machines.precision, machines.estimator, guess=machines.guess
    )
    if isinstance(estimator, AiConfigurator):
        prose(f"estimated by {estimator.label}", style="dim")
    known = isinstance(estimator, (Roofline, AiConfigurator))
    shape = shape_for(loaded) if known else None
    there = nodes(loaded, machines, simulated=simulated)
    return Asked(
        loaded=loaded,
        sla=level,
        demand=demand,
        inventory=there,
        gpus=machines.gpus or sum(host.gpus for host in there.hosts),
        estimator=estimator,
        experts=shape is not None and shape.experts is not None,
        longest=shape.max_context if shape else 0,
    )


def nodes(loaded: LoadedRecipe, machines: Machines, *, simulated: bool) -> Inventory:
    """The nodes to choose for. Raises UsageError when fewer GPUs are there than are asked for."""
    recipe, gpus, kind = loaded.recipe, machines.gpus, machines.kind
    there = None
    if machines.inventory is not None or recipe.hosts or recipe.target == "local":
        there = inventory_for(recipe, loaded.file, machines.inventory)
    have = sum(host.gpus for host in there.hosts) if there else 0
    if there is None or simulated or not have:
        # No GPU is known of: as many as are asked for, in nodes as they are made.
        used = gpus or sum(section.replicas * _gpus(section) for section in recipe.roles.present().values())
        return invented(used, used if simulated or kind is None else kind.per_node)
    if gpus is not None and gpus > have:
        raise UsageError(f"--gpus {gpus}, but {there.source} has {have}", hint="fewer, or --inventory FILE")
    return there


def _gpus(section: RoleSection) -> int:
    return parallel_of(section).gpus


def invented(gpus: int, per_node: int) -> Inventory:
    """Nodes of so many GPUs each, the last one with what is left."""
    sizes = [per_node] * (gpus // per_node) + ([gpus % per_node] if gpus % per_node else [])
    return Inventory(
        tuple(Host(f"node-{i}", f"node-{i}", size) for i, size in enumerate(sizes)), f"{gpus} GPUs"
    )
