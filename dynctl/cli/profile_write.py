"""What `dynctl profile` leaves: recipe, profiles, choice and report as files; and how the choice is told."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from dynctl.cli.profile_measured_view import measured_lines
from dynctl.cli.profile_view import choice_text
from dynctl.cli.render import data, json_data, program, prose
from dynctl.errors import ProfileError
from dynctl.perfmodel.choice import Choice, Demand, Option
from dynctl.perfmodel.profile import Profile
from dynctl.profiler.npz import write_npz
from dynctl.profiler.outcome import Measurement
from dynctl.profiler.recipe_out import profile_name, recipe_text
from dynctl.profiler.report.told import Told
from dynctl.profiler.report.write import write_report
from dynctl.profiler.service import Asked, Outcome
from dynctl.recipe.load import LoadedRecipe

_RECIPE = "recipe.yaml"


@dataclass(frozen=True, slots=True)
class Wanted:
    """Where files go, and how the choice is told. `inventory`: the file that `up` needs, too."""

    folder: Path
    inventory: Path | None
    as_json: bool


def finish(
    asked: Asked, wanted: Wanted, outcome: Outcome, *, usable: bool, measured: Measurement | None = None
) -> int:
    """Write a choice that is of use, tell it; the exit code. People are told before plots are drawn."""
    written = write_files(wanted.folder, asked.loaded, outcome) if usable else []
    command = next_command(written, wanted.inventory)
    if not wanted.as_json:
        data(choice_text(outcome.choice, asked.loaded.recipe.name))
        if measured is not None:
            data("\n".join(measured_lines(measured)))
    written += write_pages(wanted.folder, told_of(asked, outcome, command, measured))
    if wanted.as_json:
        told = {**as_object(outcome.choice), "files": [str(path) for path in written]}
        json_data({**told, "measured": msgspec.to_builtins(measured)} if measured else told)
    if written:
        prose(f"wrote {', '.join(path.name for path in written)} to {written[0].parent}", style="dim")
    if command:
        prose(f"next: {command}")
    return 0 if usable else 1


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
        path = folder / profile_name(pool)
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


def told_of(asked: Asked, outcome: Outcome, command: str, measured: Measurement | None) -> Told:
    """What the report is made of."""
    return Told(
        name=asked.loaded.recipe.name,
        recipe=asked.loaded.file,
        choice=outcome.choice,
        profiles=outcome.profiles,
        gpus=asked.gpus,
        next_command=command,
        measured=measured,
    )


def write_pages(folder: Path, told: Told) -> list[Path]:
    """The report for people. What is missing for it is said, no more."""
    try:
        pages, missing = write_report(folder, told)
    except OSError as error:
        prose(f"no report: {error}", style="warning")
        return []
    if missing:
        prose(f"no plots in the report: {missing}", style="warning")
    return pages


def next_command(written: list[Path], inventory: Path | None) -> str:
    """What to run with the recipe that was written; "" when none was."""
    recipe = next((path for path in written if path.name == _RECIPE), None)
    if recipe is None:
        return ""
    hosts = f" --inventory {shlex.quote(str(inventory))}" if inventory is not None else ""
    return f"{program()} up {shlex.quote(str(recipe))}{hosts}"


def head_of(chosen: Option, file: str) -> str:
    """What the written recipe says of itself."""
    predicted = chosen.predicted
    return (
        f"{file} with the roles that dynctl profile has chosen: {chosen.label}.\n"
        f"Estimated: TTFT {predicted.ttft_s * 1000:.0f} ms, ITL {predicted.itl_s * 1000:.1f} ms, "
        f"up to {predicted.capacity:.3g} requests/s."
    )


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
