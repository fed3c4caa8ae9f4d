"""`dynctl bench`."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from dynctl.cli import load_options as asked
from dynctl.cli import options
from dynctl.cli.bench_view import Progress, lines, next_step, problems
from dynctl.cli.endpoint import Access, Target, find_target
from dynctl.cli.exits import INTERRUPTED
from dynctl.cli.render import data, json_data, prose
from dynctl.errors import EngineFailed
from dynctl.http.runtime import run as run_loop
from dynctl.profiler.load.files import csv_text, load_object, save, writable
from dynctl.profiler.load.run import Measured, Watch, run
from dynctl.profiler.load.spec import Load

_LOOK_S = 0.2

Where = Annotated[
    str | None,
    typer.Argument(
        metavar="[NAME|URL]",
        help="A deployment, or http://host:port of any OpenAI-like server; default: the only one running.",
        show_default=False,
    ),
]
Model = Annotated[
    str, typer.Option("--model", metavar="NAME", help="When several are served.", show_default=False)
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="PATH",
        help="Makes prompts of exactly so many tokens; default: the deployment's, if it is on this machine.",
        show_default=False,
    ),
]
Insecure = Annotated[bool, typer.Option("--insecure", help="Do not check the URL's certificate.")]
Csv = Annotated[
    Path | None,
    typer.Option("--csv", metavar="FILE", help="Write a row for each request.", show_default=False),
]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="Write the result as JSON.", show_default=False)
]


@asked.takes_load
def bench(  # noqa: PLR0913 - one parameter for each option of the verb
    load: Load,
    where: Where = None,
    model: Model = "",
    tokenizer: Tokenizer = None,
    key_file: asked.KeyFile = None,
    insecure: Insecure = False,
    csv: Csv = None,
    out: Out = None,
    as_json: options.Json = False,
) -> int:
    """Send a load and measure what users would get: TTFT, TPOT, ITL, throughput, goodput.

    A closed loop (--concurrency) shows what it can do; an open one (--rate) what users wait for, queueing and
    all. Ctrl-C ends it with what was measured so far. What spoils a measurement (failures, cached prompts,
    a client that is the bottleneck) is told, and is in "problems" of --json.

    dynctl bench --rate 10 --isl 1000 --osl 100 --sla ttft=200ms,itl=20ms
    """
    for path in (csv, out):
        if path is not None:
            writable(path)
    access = Access(model=model, api_key=asked.api_key(key_file), tokenizer=tokenizer, insecure=insecure)
    target = find_target(where, access)
    measured, interrupted = measure_shown(load, target)
    found = as_object(target, measured)
    if as_json:
        json_data(found)
    else:
        tell(load, target, measured)
    if csv is not None:
        save(csv, csv_text(measured.records, measured.load))
    if out is not None:
        save(out, msgspec.json.format(msgspec.json.encode(found), indent=1).decode() + "\n")
    if interrupted:
        return INTERRUPTED
    if not measured.result.counts.completed:
        raise EngineFailed("no request completed", where=target.endpoint.url)
    return 0


def measure_shown(load: Load, target: Target) -> tuple[Measured, bool]:
    """Send the load while showing how far it is; whether Ctrl-C ended it early. Raises as `run`.

    Ctrl-C stops sending and lets go of what is in flight; before anything was sent it is KeyboardInterrupt.
    """
    with Progress(load, target.label) as shown:
        return run_loop(_measure(load, target, shown))


async def _measure(load: Load, target: Target, shown: Progress) -> tuple[Measured, bool]:
    watch = Watch()
    loop = asyncio.get_running_loop()
    work = asyncio.create_task(run(load, target.endpoint, watch))
    interrupted = False

    def interrupt() -> None:
        nonlocal interrupted
        interrupted = True
        loop.remove_signal_handler(signal.SIGINT)
        if watch.begun_s:
            watch.stop.set()
        else:
            work.cancel()

    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        while not work.done():
            await asyncio.wait((work,), timeout=_LOOK_S)
            shown.show(watch)
        if work.cancelled() and interrupted:
            raise KeyboardInterrupt
        return work.result(), interrupted
    finally:
        work.cancel()
        loop.remove_signal_handler(signal.SIGINT)


def as_object(target: Target, measured: Measured) -> dict[str, Any]:
    """A measurement for scripts: times in seconds."""
    return {
        "target": target.label,
        "url": target.endpoint.url,
        "model": target.endpoint.model,
        "gpus": target.gpus,
        "load": load_object(measured.load),
        "valid": measured.result.valid,
        **msgspec.to_builtins(measured.result),
    }


def tell(load: Load, target: Target, measured: Measured) -> None:
    """A measurement for people."""
    data("\n".join(lines(target.label, load, measured.result)))
    problems(measured.result.problems)
    prose(next_step(load, measured.result), style="dim")
