"""`dynctl profile` beside an exhaustive sweep, on simulated engines whose law is known and whose estimate is
wrong: the split that each finds, and the probes it takes. The profile run is killed by SIGKILL on its way.

    python -m tests.perf.profile_sweep [--write]      about 20 minutes; --write: into docs/profiling.md
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from dynctl.http.runtime import run as run_loop
from dynctl.perfmodel.choice import Choice, Demand, Sla
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.offers import Ask
from dynctl.perfmodel.profile import DecodeGrid, PrefillCurve, Profile
from dynctl.perfmodel.split import choose
from dynctl.profiler.load.spec import Endpoint
from dynctl.profiler.outcome import FILE, DecodePoint, Measurement, PrefillPoint, load
from dynctl.profiler.probe import measured
from dynctl.profiler.search import DecodeProbe, PrefillProbe
from tests.deployment import Cli, end_all, eventually, owned, up
from tests.perf.laws import law, write_law, write_recipe

SIZES = (1, 2, 4, 8)
WRONG = {1: (1.4, 1.2), 2: (1.15, 1.1), 4: (0.75, 0.85), 8: (0.7, 0.8)}
"""By how much the estimate is off: reading, writing."""
SLOW = 2.0
"""Times of the law are longer than those of `laws`: a busy machine measures long times better."""
SLA = Sla(ttft_s=1.6, itl_s=0.08)
DEMAND = Demand(rate=6.0, lengths=((600, 60),))
GPUS = 8
ISL = tuple(round(150 + i * (900 - 150) / 15) for i in range(16))
BATCH = (1, 4, 8, 16, 24, 32)
CONTEXT = (100, 206, 312, 418, 524, 630)
_DOCS = Path(__file__).resolve().parents[2] / "docs" / "profiling.md"
_TRIES = 15


@dataclass(frozen=True)
class Row:
    """One way to choose."""

    how: str
    choice: Choice
    probes: int
    took_s: float


def parsed(value: dict[str, object]) -> Profile:
    """A law as a profile."""
    return msgspec.convert(json.loads(json.dumps(value)), Profile)


def laws(off: dict[int, tuple[float, float]]) -> dict[Layout, Profile]:
    """The law of each layout, off by so much."""
    return {
        Layout(tensor=size): parsed(law(size, reading=SLOW * reading, writing=SLOW * writing))
        for size, (reading, writing) in off.items()
    }


def chosen_by(profiles: dict[Layout, Profile]) -> Choice:
    """The choice when layouts cost this."""
    return choose(
        Ask(
            sla=SLA,
            demand=DEMAND,
            profiles={"prefill": profiles, "decode": profiles, "aggregated": profiles},
            gpus=GPUS,
            routing="least_work",
        )
    )


def exhaustive(folder: Path, cli: Cli) -> Row:
    """A grid of 16 prompt lengths and 36 batches and contexts for every layout, as others have it."""
    begun_s, probes = time.monotonic(), 0
    found: dict[Layout, Profile] = {}
    for size in SIZES:
        recipe = write_recipe(folder, f"grid-{size}")
        with up(cli, recipe, "--set", f"roles.aggregated.tensor_parallel={size}") as there:
            endpoint = Endpoint(url=there.url, model="tiny")
            found[Layout(tensor=size)] = run_loop(grid_of(endpoint, size))
            probes += len(ISL) + len(BATCH) * len(CONTEXT)
        print(f"grid of TP{size}: {time.monotonic() - begun_s:.0f} s", file=sys.stderr, flush=True)
    return Row(
        "exhaustive sweep (16 + 36 points a layout)", chosen_by(found), probes, time.monotonic() - begun_s
    )


async def grid_of(endpoint: Endpoint, size: int) -> Profile:
    """All points of a layout, as a profile."""
    base = parsed(law(size, reading=SLOW, writing=SLOW))
    reading = [(await sure(PrefillProbe(isl=isl), endpoint)) for isl in ISL]
    steps = [
        [(await sure(DecodeProbe(batch=batch, context=context), endpoint)) for context in CONTEXT]
        for batch in BATCH
    ]
    first = reading[0] - (reading[1] - reading[0]) / (ISL[1] - ISL[0]) * ISL[0]
    return msgspec.structs.replace(
        base,
        prefill=PrefillCurve(tokens=(0, *ISL), seconds=(max(0.0, first), *reading)),
        decode=DecodeGrid(batch=BATCH, context=CONTEXT, seconds=tuple(tuple(row) for row in steps)),
    )


async def sure(probe: PrefillProbe | DecodeProbe, endpoint: Endpoint) -> float:
    """Seconds of a probe, tried until it is valid."""
    reason = ""
    for number in range(_TRIES):
        point, reason = await measured(probe, endpoint, f"grid/{probe.label}/{number}", 120.0)
        if isinstance(point, PrefillPoint | DecodePoint):
            return point.seconds
    raise SystemExit(f"{probe.label}: {reason}")


def profiled(folder: Path, cli: Cli) -> tuple[Row, Measurement, str]:
    """`dynctl profile`, killed once and resumed; and what is to be said of that."""
    begun_s, out = time.monotonic(), folder / "out"
    args = ["--isl", "600", "--osl", "60", "--rate", "6", "--gpus", str(GPUS), "--parallel", "1"]
    args += ["--sla", "ttft=1600ms,itl=80ms", "--budget", "20m", "--out", str(out)]
    for size in SIZES:
        args += ["--profile", str(wrong(folder, size))]
    recipe = str(write_recipe(folder))
    first = subprocess.Popen(
        [sys.executable, "-m", "dynctl.cli.main", "profile", recipe, *args],
        env={**os.environ, "DYNCTL_HOME": str(cli.home)},
        stdout=subprocess.DEVNULL,
    )
    assert eventually(lambda: len(answers(out)) >= 7, 300.0)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = answers(out)
    left = running(cli)
    done = cli.run("profile", recipe, *args, "--resume", timeout_s=1500.0)
    sys.stderr.write(done.stderr + done.stdout)
    after, told = answers(out), load(out / FILE)
    again = len(after) - len(set(after))
    killed = (
        f"killed by SIGKILL after {len(before)} answers, {left} processes of an engine living on; --resume "
        f"took {told.reused} from the journal, measured {again} again, and left {running(cli)} processes."
    )
    row = Row(
        "dynctl profile, killed and resumed",
        told.choice,
        sum(len(run.prefill) + len(run.decode) + len(run.refused) for run in told.layouts) + len(told.rounds),
        time.monotonic() - begun_s,
    )
    return row, told, killed


def wrong(folder: Path, size: int) -> Path:
    """The estimate of a layout: a law that is off."""
    reading, writing = WRONG[size]
    path = folder / f"estimate-tp{size}.json"
    subject = {"model": "", "backend": "mocker", "layout": {"tensor": size}}
    path.write_text(
        json.dumps({**law(size, reading=SLOW * reading, writing=SLOW * writing), "subject": subject})
    )
    return path


def answers(out: Path) -> list[str]:
    """Keys of all questions answered so far."""
    path = out / "journal.jsonl"
    raw = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in raw.splitlines(keepends=True) if line.endswith("\n")]
    return [line["key"] for line in lines if line["kind"] == "answer" and line.get("found")]


def running(cli: Cli) -> int:
    """Processes of all runs."""
    return sum(len(owned(path.name)) for path in (cli.home / "runs").glob("[!.]*"))


def text(rows: list[Row], told: Measurement, killed: str) -> str:
    """The section for the docs."""
    lines = [
        f"Four layouts (TP1, 2, 4, 8) of a known law, at most {GPUS} GPUs, {DEMAND.rate:g} requests/s of "
        f"{DEMAND.isl:.0f} / {DEMAND.osl:.0f} tokens, p95 TTFT 1600 ms, ITL 80 ms. The estimate is off by "
        "-30 to +40 %.",
        "",
        "| | split | GPUs | probes | time |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        one = row.choice.chosen
        label, gpus = (one.label, one.gpus) if one else ("nothing", 0)
        lines.append(f"| {row.how} | {label} | {gpus} | {row.probes or '-'} | {row.took_s / 60:.1f} min |")
    share = rows[-1].probes / rows[-2].probes
    lines += ["", f"Share of the probes: {share:.0%}. The run was {killed}", ""]
    for seen in told.rounds:
        if seen.ttft_s is None or seen.itl_s is None:
            lines.append(f"Tried whole: {seen.option.label}: {seen.failure}")
            continue
        predicted = seen.option.predicted
        lines.append(
            f"Tried whole: {seen.option.label}: TTFT {predicted.ttft_s * 1e3:.0f} ms predicted, "
            f"{seen.ttft_s * 1e3:.0f} measured; ITL {predicted.itl_s * 1e3:.1f} and "
            f"{seen.itl_s * 1e3:.1f} ms; {seen.requests} requests."
        )
    stamp = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {os.cpu_count()} CPUs, load {os.getloadavg()[1]:.1f}"
    return "\n".join([*lines, f"{told.verdict}.", "", stamp + "."])


def main() -> None:
    """Measure both, print, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put it into docs/profiling.md")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        cli = Cli(folder / "home")
        try:
            for size in SIZES:
                write_law(folder, size, slower=SLOW)
            truth = laws(dict.fromkeys(SIZES, (1.0, 1.0)))
            guess = laws(WRONG)
            rows = [
                Row("the law itself", chosen_by(truth), 0, 0.0),
                Row("the estimate", chosen_by(guess), 0, 0.0),
            ]
            mine, told, killed = profiled(folder, cli)
            rows += [exhaustive(folder, cli), mine]
        finally:
            end_all(cli.home)
    section = text(rows, told, killed)
    print(section)
    if asked.write:
        before = _DOCS.read_text(encoding="utf-8")
        pattern = r"(<!-- profile sweep -->\n).*(<!-- end profile sweep -->)"
        _DOCS.write_text(
            re.sub(pattern, lambda m: f"{m[1]}{section}\n{m[2]}", before, flags=re.DOTALL), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
