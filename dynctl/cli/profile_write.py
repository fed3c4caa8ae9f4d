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
from dynctl.launchers.files import write_atomic
from dynctl.perfmodel.choice import Choice, Demand, Option
from dynctl.perfmodel.profile import Profile
from dynctl.profiler.npz import DECODE, PREFILL, write_npz
from dynctl.profiler.outcome import FILE, Measurement, encode
from dynctl.profiler.recipe_out import profile_name, recipe_text
from dynctl.profiler.report.told import Told
from dynctl.profiler.report.write import HTML, PNG, write_report
from dynctl.profiler.service import Asked, Outcome
from dynctl.recipe.load import LoadedRecipe
from dynctl.recipe.schema import ROLES, Recipe

_RECIPE, _CHOICE = "recipe.yaml", "choice.json"


@dataclass(frozen=True, slots=True)
class Wanted:
    """Where files go, and how the choice is told. `inventory`: the file that `up` needs, too."""

    folder: Path
    inventory: Path | None
    as_json: bool


def finish(
    asked: Asked, wanted: Wanted, outcome: Outcome, *, usable: bool, measured: Measurement | None = None
) -> int:
    """Tell the choice, write it when it is of use; the exit code. People are told before plots are drawn.

    Nothing of an earlier run is left beside it. Raises ProfileError when files cannot be written, once all
    else is done.
    """
    if not wanted.as_json:
        data(choice_text(outcome.choice, asked.loaded.recipe.name, doubt=doubt_of(outcome, measured, usable)))
        if measured is not None:
            data("\n".join(measured_lines(measured)))
    written: list[Path] = []
    failure: OSError | None = None
    try:
        clear(wanted.folder)
        if measured is not None:
            write_atomic(wanted.folder / FILE, encode(measured))
        written += write_files(wanted.folder, asked.loaded, outcome, measured) if usable else []
        command = next_command(written, wanted.inventory, asked.loaded.recipe)
        written += write_pages(wanted.folder, told_of(asked, outcome, command, measured))
    except OSError as error:
        failure, command = error, ""
    if wanted.as_json:
        told = {**as_object(outcome.choice), "files": [str(path) for path in written]}
        json_data({**told, "measured": msgspec.to_builtins(measured)} if measured else told)
    if failure is not None:
        raise ProfileError(f"results cannot be written: {failure.strerror}", where=str(wanted.folder))
    if written:
        prose(f"wrote {', '.join(path.name for path in written)} to {written[0].parent}", style="dim")
    if command:
        prose(f"next: {command}")
    return 0 if usable else 1


def doubt_of(outcome: Outcome, measured: Measurement | None, usable: bool) -> str:
    """Why a choice is none to be used yet; "" = it is, or there is none."""
    if usable or outcome.choice.chosen is None or measured is None:
        return ""
    return "the next choice, not tried whole: the budget was used up (--resume with a larger --budget)"


def clear(folder: Path) -> None:
    """Take away what an earlier run has left that this one may not write. Raises OSError."""
    names = (_RECIPE, _CHOICE, HTML, PNG, *(f"profile-{role}.json" for role in ROLES))
    paths = [*names, *(f"{name}/raw_data.npz" for name in (PREFILL, DECODE))]
    for path in (folder / name for name in paths):
        if path.is_file():
            path.unlink()


def write_files(
    folder: Path, loaded: LoadedRecipe, outcome: Outcome, measured: Measurement | None
) -> list[Path]:
    """The recipe, the profiles and the choice; the paths, the recipe first. Raises OSError."""
    chosen = outcome.choice.chosen
    assert chosen is not None
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / _RECIPE
    write_atomic(
        recipe, recipe_text(loaded, chosen, head_of(chosen, loaded.file, measured), outcome.choice.sla)
    )
    written = [recipe]
    by_role: dict[str, Profile] = {}
    for pool in chosen.pools:
        by_role[pool.role] = outcome.profiles[pool.layout]
        path = folder / profile_name(pool)
        write_atomic(path, msgspec.json.format(msgspec.json.encode(by_role[pool.role]), indent=1) + b"\n")
        written.append(path)
    path = folder / _CHOICE
    write_atomic(path, msgspec.json.format(msgspec.json.encode(as_object(outcome.choice)), indent=1) + b"\n")
    written.append(path)
    try:
        first, last = by_role.get("prefill"), by_role.get("decode")
        both = by_role.get("aggregated")
        longest = max(int(outcome.profiles[pool.layout].prefill.tokens[-1]) for pool in chosen.pools)
        write_npz(folder, first or both or last, last or both or first, min(longest, 32768))  # type: ignore[arg-type]
        written += [folder / PREFILL, folder / DECODE]
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
        prose(f"no report: {folder}: {error.strerror}", style="warning")
        return []
    if missing:
        prose(f"no plots in the report: {missing}", style="warning")
    return pages


def next_command(written: list[Path], inventory: Path | None, recipe_before: Recipe) -> str:
    """What to run with the recipe that was written; "" when none was. Hosts not named yet are to be."""
    recipe = next((path for path in written if path.name == _RECIPE), None)
    if recipe is None:
        return ""
    if inventory is None and recipe_before.target == "ssh" and not recipe_before.hosts:
        inventory = Path("hosts.yaml")
    hosts = f" --inventory {shlex.quote(str(inventory))}" if inventory is not None else ""
    return f"{program()} up {shlex.quote(str(recipe))}{hosts}"


def head_of(chosen: Option, file: str, measured: Measurement | None) -> str:
    """What the written recipe says of itself: what was seen of the whole, else what is predicted."""
    first = f"{file} with the roles that dynctl profile has chosen: {chosen.label}.\n"
    last = measured.rounds[-1] if measured is not None and measured.rounds else None
    if last is not None and last.option.label == chosen.label and last.ttft_s and last.itl_s:
        told = f"TTFT {last.ttft_s * 1000:.0f} ms, ITL {last.itl_s * 1000:.1f} ms"
        doubt = " (not to be relied on)" if last.problems else ""
        return f"{first}Measured at {last.rate:.3g} requests/s{doubt}: {told}."
    predicted, how = chosen.predicted, "Estimated" if measured is None else "Predicted by measured times"
    return (
        f"{first}{how}: TTFT {predicted.ttft_s * 1000:.0f} ms, ITL {predicted.itl_s * 1000:.1f} ms, "
        f"up to {predicted.capacity:.3g} requests/s."
    )


def as_object(choice: Choice) -> dict[str, Any]:
    """The choice for scripts: values as they are, layouts with their label and GPUs, lengths as means."""
    demand: Demand = choice.demand
    return {
        "sla": msgspec.to_builtins(choice.sla),
        "demand": {
            "rate": demand.rate or None,
            "isl": demand.isl,
            "osl": demand.osl,
            "hit_rate": demand.hit_rate,
        },
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
