"""`dynctl profile`: which parallelism, how many prefill and decode workers, for a service level."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from dynctl.cli import options
from dynctl.cli.profile_measured_view import measured_lines
from dynctl.cli.profile_view import choice_text
from dynctl.cli.render import data, json_data, program, prose
from dynctl.engines.catalog import get
from dynctl.errors import ProfileError, UsageError
from dynctl.perfmodel.choice import Choice, Demand, Option, Sla
from dynctl.perfmodel.gpus import Gpu, gpu_named
from dynctl.perfmodel.profile import Profile, load_profile
from dynctl.perfmodel.roofline import Roofline
from dynctl.profiler.aiconfigurator import AiConfigurator
from dynctl.profiler.estimators import estimator_for, shape_for
from dynctl.profiler.npz import write_npz
from dynctl.profiler.outcome import Measurement
from dynctl.profiler.recipe_out import recipe_text
from dynctl.profiler.report.told import Told
from dynctl.profiler.report.write import write_report
from dynctl.profiler.request import demand_from, sla_of
from dynctl.profiler.service import Asked, Outcome, run
from dynctl.recipe.check import check_recipe, parallel_of
from dynctl.recipe.load import LoadedRecipe, load_recipe
from dynctl.recipe.schema import RoleSection
from dynctl.topology.inventory import Host, Inventory
from dynctl.topology.inventory_file import inventory_for

_RECIPE = "recipe.yaml"

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
    folder = out or Path(f"profile-{loaded.recipe.name}")
    if estimate_only:
        outcome = run(asked)
        return finish(asked, folder, outcome, usable=outcome.choice.chosen is not None, as_json=json_)
    from dynctl.cli.profile_measure import How, measured_choice, tell_measured

    found = measured_choice(asked, folder, How(budget, resume, parallel, inventory, gpu))
    tell_measured(found.measurement, found.usable)
    return finish(
        asked, folder, found.outcome, usable=found.usable, as_json=json_, measured=found.measurement
    )


def _check_numbers(gpus: int | None, parallel: int, budget: float) -> None:
    """Raises UsageError."""
    if gpus is not None and gpus < 1:
        raise UsageError(f"--gpus must be 1 or more, not {gpus}")
    if parallel < 0 or not budget > 0:
        raise UsageError("--parallel and --budget must be above 0")


def finish(
    asked: Asked,
    folder: Path,
    outcome: Outcome,
    *,
    usable: bool,
    as_json: bool,
    measured: Measurement | None = None,
) -> int:
    """Write a choice that is of use, tell it; the exit code."""
    written = write_files(folder, asked.loaded, outcome) if usable else []
    written += write_pages(folder, asked, outcome, written, measured)
    tell(outcome, asked.loaded, written, as_json=as_json, measured=measured)
    return 0 if usable else 1


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


def write_files(folder: Path, loaded: LoadedRecipe, outcome: Outcome) -> list[Path]:
    """The recipe, the profiles and the choice; the paths, the recipe first."""
    chosen = outcome.choice.chosen
    assert chosen is not None
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / _RECIPE
    recipe.write_text(recipe_text(loaded, chosen, head_of(chosen, loaded.file)), encoding="utf-8")
    written = [recipe]
    by_role: dict[str, Profile] = {}
    for pool in chosen.pools:
        by_role[pool.role] = outcome.profiles[pool.layout]
        path = folder / f"profile-{pool.role}.json"
        path.write_bytes(msgspec.json.format(msgspec.json.encode(by_role[pool.role]), indent=1) + b"\n")
        written.append(path)
    path = folder / "choice.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(as_object(outcome.choice)), indent=1) + b"\n")
    written.append(path)
    try:
        first, last = by_role.get("prefill"), by_role.get("decode")
        both = by_role.get("aggregated")
        longest = max(int(outcome.profiles[pool.layout].prefill.tokens[-1]) for pool in chosen.pools)
        write_npz(folder, first or both or last, last or both or first, min(longest, 32768))  # type: ignore[arg-type]
        written.append(folder / "selected_prefill_interpolation")
    except ProfileError as error:
        prose(f"no npz files for Dynamo: {error}", style="warning")
    return written


def write_pages(
    folder: Path,
    asked: Asked,
    outcome: Outcome,
    written: list[Path],
    measured: Measurement | None = None,
) -> list[Path]:
    """The report for people, on what was written already. What is missing for it is said, no more."""
    told = Told(
        name=asked.loaded.recipe.name,
        recipe=asked.loaded.file,
        choice=outcome.choice,
        profiles=outcome.profiles,
        gpus=asked.gpus,
        next_command=next_command(written),
        measured=measured,
    )
    try:
        pages, missing = write_report(folder, told)
    except OSError as error:
        prose(f"no report: {error}", style="warning")
        return []
    if missing:
        prose(f"no plots in the report: {missing}", style="warning")
    return pages


def next_command(written: list[Path]) -> str:
    """What to run with the recipe that was written; "" when none was."""
    recipe = next((path for path in written if path.name == _RECIPE), None)
    return f"{program()} up {shlex.quote(str(recipe))}" if recipe else ""


def head_of(chosen: Option, file: str) -> str:
    """What the written recipe says of itself."""
    predicted = chosen.predicted
    return (
        f"{file} with the roles that dynctl profile has chosen: {chosen.label}.\n"
        f"Estimated: TTFT {predicted.ttft_s * 1000:.0f} ms, ITL {predicted.itl_s * 1000:.1f} ms, "
        f"up to {predicted.capacity:.3g} requests/s."
    )


def tell(
    outcome: Outcome,
    loaded: LoadedRecipe,
    written: list[Path],
    *,
    as_json: bool,
    measured: Measurement | None = None,
) -> None:
    """The choice on standard output, where things are and what comes next on standard error."""
    if as_json:
        told = {**as_object(outcome.choice), "files": [str(path) for path in written]}
        json_data({**told, "measured": msgspec.to_builtins(measured)} if measured else told)
    else:
        data(choice_text(outcome.choice, loaded.recipe.name))
        if measured is not None:
            data("\n".join(measured_lines(measured)))
    if written:
        prose(f"wrote {', '.join(path.name for path in written)} to {written[0].parent}", style="dim")
    if command := next_command(written):
        prose(f"next: {command}")


def as_object(choice: Choice) -> dict[str, Any]:
    """The choice for scripts: values as they are, layouts with their label and GPUs, lengths as means."""
    demand: Demand = choice.demand
    return {
        "sla": msgspec.to_builtins(choice.sla),
        "demand": {"rate": demand.rate, "isl": demand.isl, "osl": demand.osl, "hit_rate": demand.hit_rate},
        "chosen": option_object(choice.chosen) if choice.chosen else None,
        "why": choice.why,
        "options": [option_object(option) for option in choice.options],
        "sensitivity": [
            {
                "what": one.what,
                "factor": one.factor,
                "holds": one.holds,
                "option": one.option.label if one.option else None,
            }
            for one in choice.sensitivity
        ],
        "rejected": [
            {"layout": one.layout.label, "role": one.role, "reason": one.reason} for one in choice.refused
        ],
    }


def option_object(option: Option) -> dict[str, Any]:
    """One option for scripts."""
    return {
        "label": option.label,
        "mode": option.mode,
        "gpus": option.gpus,
        "roles": {
            pool.role: {**msgspec.to_builtins(pool), "gpus": pool.gpus, "label": pool.layout.label}
            for pool in option.pools
        },
        "predicted": msgspec.to_builtins(option.predicted),
        "misses": list(option.misses),
    }
