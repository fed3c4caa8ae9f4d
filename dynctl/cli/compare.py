"""`dynctl compare`."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import msgspec
import typer

from dynctl.cli import load_options as asked
from dynctl.cli import options
from dynctl.cli.bench import Insecure, Model, Out, as_object, measure_shown
from dynctl.cli.bench_view import headline, problems
from dynctl.cli.compare_view import table_of
from dynctl.cli.endpoint import Access, Target
from dynctl.cli.render import data, json_data, prose
from dynctl.cli.stand import stand_of, standing
from dynctl.profiler.load.files import save, writable
from dynctl.profiler.load.run import Measured
from dynctl.profiler.load.spec import Load
from dynctl.profiler.versus import Comparison, Side, compared

_SHAPE = "A recipe, a deployment that runs, or a URL."
A = Annotated[str, typer.Argument(metavar="A", help=_SHAPE, show_default=False)]
B = Annotated[str, typer.Argument(metavar="B", help="Likewise.", show_default=False)]
Timeout = Annotated[
    str | None,
    typer.Option("--timeout", metavar="TIME", help="For each to be ready, like 10m.", show_default=False),
]


@asked.takes_load
def compare(  # noqa: PLR0913 - one parameter for each option of the verb
    load: Load,
    a: A,
    b: B,
    model: Model = "",
    key_file: asked.KeyFile = None,
    insecure: Insecure = False,
    timeout: Timeout = None,
    target: options.Target = None,
    inventory: options.Inventory = None,
    out: Out = None,
    as_json: options.Json = False,
) -> int:
    """Measure two services at the same load: which keeps the SLA, at what cost per GPU.

    Recipes are started one after the other, as dynctl up does, and ended again whatever happens. The prompts
    and times are the same for both. A difference that may be chance is called none.

    dynctl compare agg.yaml disagg.yaml --rate 10 --isl 4000 --osl 500 --sla ttft=300ms,itl=20ms
    """
    if out is not None:
        writable(out)
    access = Access(model=model, api_key=asked.api_key(key_file), insecure=insecure)
    both = measured_both((a, b), load, access, up_options(timeout, target, inventory))
    sides = [side_of(where, one) for where, one in both]
    found = compared(load, sides[0], sides[1])
    told = as_objects(both, found)
    if as_json:
        json_data(told)
    else:
        data("\n".join([headline("compare", load), "", table_of(load, sides[0], sides[1], found), ""]))
        for side in sides:
            problems([f"{side.label}: {problem}" for problem in side.result.problems])
        data(found.verdict)
    if out is not None:
        save(out, msgspec.json.format(msgspec.json.encode(told), indent=1).decode() + "\n")
    return 0


def measured_both(
    wheres: tuple[str, str], load: Load, access: Access, up: list[str]
) -> list[tuple[Target, Measured]]:
    """Each measured, one after the other. Ctrl-C or SIGTERM ends the whole, with what was started."""
    stands = [stand_of(where) for where in wheres]
    found = []
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        for stand in stands:
            with standing(stand, up, access) as target:
                prose(f"measuring {target.label}", style="dim")
                measured, interrupted = measure_shown(load, target)
                if interrupted:
                    raise KeyboardInterrupt
                found.append((target, measured))
    finally:
        signal.signal(signal.SIGTERM, before)
    return found


def up_options(timeout: str | None, target: str | None, inventory: Path | None) -> list[str]:
    """What is passed on to `dynctl up`."""
    given = {"--timeout": timeout, "--target": target, "--inventory": inventory}
    return [word for flag, value in given.items() if value is not None for word in (flag, str(value))]


def side_of(target: Target, measured: Measured) -> Side:
    """One side of the comparison."""
    count, unit = target.units
    return Side(label=target.label, units=count, unit=unit, result=measured.result)


def as_objects(both: list[tuple[Target, Measured]], found: Comparison) -> dict[str, Any]:
    """The comparison for scripts: times in seconds."""
    sides = [as_object(target, measured) for target, measured in both]
    return {"a": sides[0], "b": sides[1], **msgspec.to_builtins(found)}


def _interrupt(_signum: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
