"""How well the estimator predicts measured serving points: fits, cross-validates, writes its table.

    python -m tests.perf.estimator            # judge; table to standard output and docs/profiling.md
    python -m tests.perf.estimator --fit      # fit the constants (calibration.json) on all points first

Runs that are listed more than once are kept together: what is held out was never seen under another name.
Needs numpy and scipy.
"""

from __future__ import annotations

import csv
import gzip
import os
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from dynctl.errors import ProfileError
from dynctl.perfmodel.accuracy import score
from dynctl.perfmodel.calibration import Calibration, calibration
from dynctl.perfmodel.find_shape import find_shape
from dynctl.perfmodel.points import deployment_of
from dynctl.perfmodel.serving import predict_s
from tests.perf.calibrate import Point, fit, point, rounded

ROOT = Path(__file__).resolve().parent.parent.parent
DATA = ROOT / "tests" / "data" / "serving_points.csv.gz"
CONSTANTS = ROOT / "dynctl" / "perfmodel" / "calibration.json"
DOCS = ROOT / "docs" / "profiling.md"
BEGIN, END = "<!-- estimator: begin -->", "<!-- estimator: end -->"
SOURCE = "tests/perf/estimator.py on tests/data/serving_points.csv.gz"
SLAS_MS = (5, 7.5, 10, 15, 20, 30, 50, 75, 100)
TOLERANCE = 1.1
"""A choice breaks the SLA when its measured TPOT is above it by more than a tenth."""
SPLITS = 3


@dataclass(frozen=True, slots=True)
class Measured:
    """A row that can be predicted."""

    row: dict[str, str]
    point: Point

    @property
    def run(self) -> tuple[str, str]:
        """The same for rows that list one run."""
        return self.row["ttft_ms"], self.row["tpot_ms"]

    @property
    def family(self) -> str:
        """Models of one architecture are one: leaving one out must not leave its twin in."""
        name = self.row["model"]
        sizes = next((size for size in ("DeepSeek", "3.1-8B", "3.1-70B") if size in name), "")
        return {"DeepSeek": "DeepSeek-R1/V3", "3.1-8B": "Llama-3.1-8B", "3.1-70B": "Llama-3.1-70B"}.get(
            sizes, name.split("/")[1]
        )

    @property
    def stated(self) -> bool:
        """Whether the whole layout is known."""
        return not self.point.what.guessed


Predicted = dict[int, tuple[float, float]]
"""id of a Measured → (TPOT, TTFT) in seconds."""


def load() -> tuple[list[Measured], list[str]]:
    """Primary rows, and the reasons of those that cannot be predicted."""
    with gzip.open(DATA, "rt", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["listing"] == "primary"]
    found, refused = [], []
    for row in rows:
        try:
            what = deployment_of(row, lambda name: find_shape(name, {}))
            found.append(Measured(row, point(what, float(row["tpot_ms"]), float(row["ttft_ms"]))))
        except ProfileError as error:
            refused.append(str(error))
    return found, refused


def predict(points: Iterable[Measured], constants: Calibration) -> Predicted:
    """Of each point."""
    return {id(m): predict_s(m.point.what, constants) for m in points}


def held_out(points: Sequence[Measured], out: Callable[[Measured], bool]) -> Predicted:
    """Predictions of the points that are out, by constants fitted on the others."""
    constants = fit([m.point for m in points if not out(m)], SOURCE)
    return predict([m for m in points if out(m)], constants)


def random_split(points: Sequence[Measured], seed: int, share: float = 0.3) -> set[tuple[str, str]]:
    """Runs to be held out."""
    runs = sorted({m.run for m in points})
    return set(random.Random(seed).sample(runs, int(len(runs) * share)))


def errors(points: Iterable[Measured], told: Predicted) -> list[tuple[float, float]]:
    """(TTFT, TPOT) as |predicted / measured - 1|."""
    return [
        (abs(told[id(m)][1] / m.point.ttft_s - 1), abs(told[id(m)][0] / m.point.tpot_s - 1))
        for m in points
        if id(m) in told
    ]


def by(
    points: Iterable[Measured], key: Callable[[Measured], tuple[str, str, str]]
) -> dict[tuple[str, str, str], list[Measured]]:
    """Points in groups, in order."""
    groups = defaultdict(list)
    for m in points:
        groups[key(m)].append(m)
    return dict(sorted(groups.items()))


def engine_gpu(m: Measured) -> tuple[str, str, str]:
    """The group a point is reported in."""
    return m.row["backend"], m.row["system"], m.row["mode"]


@dataclass(frozen=True, slots=True)
class Choices:
    """Choices among measured layouts and loads: share of the best throughput/GPU, whether the SLA broke."""

    shares: list[float]
    broken: list[bool]

    def cells(self) -> str:
        """For a table."""
        return (
            f"{len(self.shares)} | {statistics.fmean(self.shares):.1%} | {statistics.fmean(self.broken):.1%}"
        )


def throughput(m: Measured, tpot_s: float, ttft_s: float) -> float:
    """Answer tokens a second by GPU, by Little's law."""
    osl, gpus = int(m.row["osl"]), float(m.row["gpus"])
    return float(m.row["concurrency"]) * osl / (ttft_s + tpot_s * (osl - 1)) / gpus


def choices(points: Sequence[Measured], told: Predicted) -> dict[tuple[str, str, str], Choices]:
    """For each model, GPU, engine, precision and lengths, and each SLA of TPOT that some measured point
    keeps: what the predictions would choose.
    """
    usable = [m for m in points if m.row["gpus"] and m.stated and id(m) in told]
    cases = defaultdict(list)
    for m in usable:
        names = ("backend", "system", "mode", "model", "weight_quant", "moe_quant", "isl", "osl")
        cases[tuple(m.row[name] for name in names)].append(m)
    found: dict[tuple[str, str, str], Choices] = defaultdict(lambda: Choices([], []))
    for case, group in cases.items():
        layouts = {
            tuple(m.row[n] for n in ("tp", "attention_dp", "moe_ep", "decode_tp", "decode_attention_dp"))
            for m in group
        }
        if len(layouts) < 2:
            continue
        for sla in SLAS_MS:
            kept = [m for m in group if m.point.tpot_s * 1e3 <= sla]
            wanted = [m for m in group if told[id(m)][0] * 1e3 <= sla]
            if not kept or not wanted:
                continue
            best = max(throughput(m, m.point.tpot_s, m.point.ttft_s) for m in kept)
            chosen = max(wanted, key=lambda m: throughput(m, *told[id(m)]))
            got = throughput(chosen, chosen.point.tpot_s, chosen.point.ttft_s)
            found[case[0], case[1], case[2]].shares.append(min(1.0, got / best))
            found[case[0], case[1], case[2]].broken.append(chosen.point.tpot_s * 1e3 > sla * TOLERANCE)
    return dict(sorted(found.items()))


def table(title: str, groups: dict[tuple[str, str, str], list[Measured]], told: Predicted) -> list[str]:
    """Markdown: errors by group and of all."""
    lines = [f"| {title} | points | TTFT median | p90 | TPOT median | p90 |", "|---|---|---|---|---|---|"]
    everything = [m for group in groups.values() for m in group]
    for key, group in [*groups.items(), (("all", "", ""), everything)]:
        found = errors(group, told)
        if found:
            one = score(key, found)
            cells = " | ".join(f"{v:.1%}" for v in (*one.ttft, *one.tpot))
            lines.append(f"| {' '.join(k for k in key if k)} | {one.points} | {cells} |")
    return lines


def judged(points: Sequence[Measured], refused: Sequence[str]) -> str:
    """The section of docs/profiling.md."""
    stated = [m for m in points if m.stated]
    splits = []
    for seed in range(SPLITS):
        out = random_split(points, seed)
        splits.append((seed, held_out(points, lambda m, out=out: m.run in out)))  # type: ignore[misc]
    told_random = {k: v for _, told in reversed(splits) for k, v in told.items()}
    told_model: Predicted = {}
    for family in sorted({m.family for m in points}):
        told_model |= held_out(points, lambda m, family=family: m.family == family)  # type: ignore[misc]
    lines = [
        f"{len(points)} distinct runs, {len(stated)} of them with their whole layout stated; "
        f"{len(refused)} rows refused. All errors are of points that the constants were not fitted on.",
        "",
        f"**30 % of the runs held out at random**, {SPLITS} splits:",
        "",
        "| split | points | TTFT median | p90 | TPOT median | p90 |",
        "|---|---|---|---|---|---|",
    ]
    for seed, told in splits:
        for name, chosen in (("layout stated", stated), ("all rows", points)):
            lines.append(table(f"{seed}", {(f"{seed}", name, ""): list(chosen)}, told)[2])
    lines += ["", "By engine and GPU (layout stated; the splits together):", ""]
    lines += table("engine, GPU", by(stated, engine_gpu), told_random)
    lines += ["", "**One model left out at a time** (layout stated):", ""]
    lines += table("model", by(stated, lambda m: (m.family, "", "")), told_model)
    lines += ["", "With the rows whose layout is guessed, which are nearly all of DeepSeek:", ""]
    lines += table("model", by(points, lambda m: (m.family, "", "")), told_model)
    lines += ["", "By engine and GPU (layout stated):", ""]
    lines += table("engine, GPU", by(stated, engine_gpu), told_model)
    lines += ["", "Rows whose layout is not stated in full, guessed (held out at random):", ""]
    lines += table("engine, GPU", by([m for m in points if not m.stated], engine_gpu), told_random)
    for title, told in (("runs held out at random", told_random), ("models left out", told_model)):
        lines += [
            "",
            f"**Choice among measured layouts**, {title}, TPOT SLAs of {SLAS_MS[0]} to {SLAS_MS[-1]} ms:",
            "",
        ]
        lines += ["| engine, GPU | choices | of best tok/s/GPU | SLA broken |", "|---|---|---|---|"]
        found = choices(points, told)
        for key, one in found.items():
            lines.append(f"| {' '.join(key)} | {one.cells()} |")
        total = Choices(
            [s for c in found.values() for s in c.shares], [b for c in found.values() for b in c.broken]
        )
        lines.append(f"| all | {total.cells()} |")
    return "\n".join(lines)


def write_section(text: str) -> None:
    """Between the marks in docs/profiling.md, which is made if it is not there."""
    old = DOCS.read_text() if DOCS.exists() else "# Profiling\n"
    if BEGIN not in old:
        old = f"{old.rstrip()}\n\n## The estimate\n\n### Accuracy\n\n{BEGIN}\n{END}\n"
    head, rest = old.split(BEGIN, 1)
    DOCS.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}")


def main() -> None:
    """Fit if asked to, judge, print, write."""
    points, refused = load()
    if "--fit" in sys.argv[1:]:
        CONSTANTS.write_bytes(rounded(fit([m.point for m in points], SOURCE)))
        calibration.cache_clear()
    text = judged(points, refused)
    print(text)
    write_section(text)


if __name__ == "__main__":
    main()
