"""The load generator beside AIPerf: the same load on the same simulated engine gives the same figures.

The engine is slow and steady (250 ms to read a prompt, 40 ms a token), so that what a loaded machine adds is
small beside it; medians are compared, which a few disturbed requests do not move.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from dynctl.hub import ASSETS
from dynctl.profiler.load.run import measure
from dynctl.profiler.load.spec import Closed, Endpoint, Lengths, Load
from tests.engines.environment import aiperf_venv
from tests.integration.mocker_process import mocker

pytestmark = [pytest.mark.aiperf, pytest.mark.timeout(300)]
DEADLINE_S = 240.0
TINY = str(ASSETS / "tiny")
CONCURRENCY, REQUESTS, ISL, OSL = 4, 32, 100, 20
STEADY = {
    "version": 1,
    "name": "steady",
    "prefill": {"tokens": [0, 1024], "seconds": [0.25, 0.25]},
    "decode": {"batch": [1, 64], "context": [0, 8192], "seconds": [[0.04, 0.04], [0.04, 0.04]]},
    "transfer": {"bytes_per_token": 1, "bytes_per_s": 1e9, "latency_s": 0},
}
OF_MEDIANS = 0.15
"""Two runs of one load on a busy machine differ by that much; another definition would by far more: TPOT
counted per token instead of per gap by 5 %, but TTFT with the first token's step by 16 %, E2E without the
TTFT by a quarter.
"""


async def aiperf(url: str, folder: Path) -> dict[str, Any]:
    """What AIPerf exports of the load."""
    options = {
        "--model": "tiny",
        "--url": url,
        "--endpoint-type": "chat",
        "--tokenizer": TINY,
        "--concurrency": CONCURRENCY,
        "--request-count": REQUESTS,
        "--warmup-request-count": CONCURRENCY,
        "--synthetic-input-tokens-mean": ISL,
        "--output-tokens-mean": OSL,
        "--extra-inputs": "ignore_eos:true",
        "--random-seed": 1,
        "--output-artifact-dir": folder,
        "--ui": "none",
    }
    argv = [str(word) for pair in options.items() for word in pair]
    process = await asyncio.create_subprocess_exec(
        str(aiperf_venv() / "bin" / "aiperf"),
        "profile",
        "--streaming",
        *argv,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": "", "HF_HUB_DISABLE_TELEMETRY": "1"},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(DEADLINE_S):
            said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, said.decode(errors="replace")[-3000:]
    found: dict[str, Any] = json.loads((folder / "profile_export_aiperf.json").read_text())
    return found


async def test_the_same_load_gives_the_same_figures_as_aiperf(tmp_path: Path) -> None:
    (tmp_path / "steady.json").write_text(json.dumps(STEADY))
    flags = ("--served-model-name", "tiny", "--profile", str(tmp_path / "steady.json"))
    async with mocker(*flags) as engine:
        load = Load(
            arrivals=Closed(concurrency=CONCURRENCY),
            requests=REQUESTS,
            warmup=CONCURRENCY,
            isl=Lengths(tokens=ISL),
            osl=Lengths(tokens=OSL),
            seed=11,
        )
        ours = await measure(load, Endpoint(url=str(engine.origin), model="tiny", tokenizer=TINY))
        theirs = await aiperf(str(engine.origin), tmp_path)

    assert (ours.counts.completed, ours.counts.failed) == (REQUESTS, 0)
    assert theirs["request_count"]["avg"] == REQUESTS
    assert ours.output_tokens is not None
    assert ours.output_tokens.min == ours.output_tokens.max == OSL
    assert theirs["output_sequence_length"]["p50"] == OSL
    assert theirs["usage_completion_tokens"]["p50"] == OSL
    # Its prompts are as long before the chat template is put around them, ours after it.
    assert ours.input_tokens is not None
    assert ours.input_tokens.min == ours.input_tokens.max == ISL
    assert theirs["input_sequence_length"]["p50"] == ISL

    pairs = {
        "time_to_first_token": ours.ttft_s,
        "inter_token_latency": ours.tpot_s,
        "inter_chunk_latency": ours.itl_s,
        "request_latency": ours.e2e_s,
    }
    seen = {
        name: (figure.percentiles["p50"].value * 1000, theirs[name]["p50"])
        for name, figure in pairs.items()
        if figure is not None
    }
    assert set(seen) == set(pairs)
    for name, (own_ms, its_ms) in seen.items():
        assert own_ms == pytest.approx(its_ms, rel=OF_MEDIANS), (name, seen)
    assert ours.request_rate == pytest.approx(theirs["request_throughput"]["avg"], rel=2 * OF_MEDIANS), seen
