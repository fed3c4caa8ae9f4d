"""AIConfigurator beside the roofline, layout by layout: `python -m tests.perf.aiconfigurator PYTHON --write`.

PYTHON is one that has AIConfigurator. `--write` puts the table into docs/profiling.md, `--record` the answers
into tests/data/aiconfigurator.json, from which the unit tests' stand-in answers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from dynctl.errors import ProfileError
from dynctl.perfmodel.find_shape import find_shape
from dynctl.perfmodel.gpus import gpu_named
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.roofline import Roofline
from dynctl.profiler.aiconfigurator import PINNED, AiConfigurator
from dynctl.profiler.line_child import LineChild

BEGIN, END = "<!-- aiconfigurator: begin -->", "<!-- aiconfigurator: end -->"
ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "tests" / "data" / "aiconfigurator.json"
MODEL = "meta-llama/Llama-3.1-70B-Instruct"
BACKENDS = ("vllm", "trtllm")
LAYOUTS = tuple(Layout(tensor=size) for size in (1, 2, 4, 8))
PROMPTS = (500, 4000, 16000)
STEPS = ((1, 4250), (16, 4250), (64, 4250))


def estimators(backend: str, python: str) -> tuple[Roofline, AiConfigurator]:
    """Both, of the same question."""
    roofline = Roofline(find_shape(MODEL, {}), gpu_named("H200"), backend)
    return roofline, AiConfigurator(roofline, MODEL, python)


def table(python: str) -> list[str]:
    """Times of both and how far the roofline is from AIConfigurator."""
    heads = [f"prompt of {tokens}" for tokens in PROMPTS] + [f"step of {batch}" for batch, _ in STEPS]
    lines = [f"| engine | layout | {' | '.join(heads)} | KV tokens |", f"|{'---|' * (len(heads) + 3)}"]
    for backend in BACKENDS:
        roofline, other = estimators(backend, python)
        for layout in LAYOUTS[1:]:
            ours, theirs = roofline.profile(layout), other.profile(layout)
            pairs = [
                (p.prefill_s(0, n) + p.prefill.seconds[0]) * 1000 for n in PROMPTS for p in (theirs, ours)
            ]
            pairs += [p.decode_s(*step) * 1000 for step in STEPS for p in (theirs, ours)]
            cells = [
                f"{a:.{1 if a < 100 else 0}f} {b:.{1 if b < 100 else 0}f} ({b / a - 1:+.0%})"
                for a, b in zip(pairs[::2], pairs[1::2], strict=True)
            ]
            room = [one.limits.kv_tokens for one in (theirs, ours) if one.limits]
            cells.append(f"{room[0] / 1e6:.2f}M {room[1] / 1e6:.2f}M")
            lines.append(f"| {backend} {other.opened.database} | {layout.label} | {' | '.join(cells)} |")
        other.close()
    return lines


def record(python: str) -> dict[str, Any]:
    """Questions and the real answers to them."""
    lines: list[tuple[Any, Any]] = []
    real = LineChild.ask

    def heard(child: LineChild, line: bytes) -> bytes:
        answer = real(child, line)
        lines.append((json.loads(line), json.loads(answer)))
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LineChild, "ask", heard)
        for backend in BACKENDS:
            _, other = estimators(backend, python)
            for layout in LAYOUTS:
                try:
                    other.profile(layout)
                except ProfileError:
                    continue
            other.close()
    return {"source": f"answers of aiconfigurator {PINNED} (NVIDIA, Apache-2.0)", "heard": lines}


def write(lines: list[str]) -> None:
    """Between the marks in docs/profiling.md."""
    docs = ROOT / "docs" / "profiling.md"
    text = docs.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    docs.write_text("\n".join([before + BEGIN, *lines, END + rest.split(END)[1]]), encoding="utf-8")


def main() -> None:
    """Print the table; write or record when told to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--record", action="store_true")
    told = parser.parse_args()
    if told.record:
        text = json.dumps(record(told.python), separators=(",", ":"))
        RECORDED.write_text(text.replace("],[{", "],\n[{").replace("[[{", "[\n[{") + "\n", encoding="utf-8")
    lines = table(told.python)
    print("\n".join(lines))
    if told.write:
        write(lines)


if __name__ == "__main__":
    main()
