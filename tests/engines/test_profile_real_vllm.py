"""`dynctl profile` with real vLLM on the CPU: its engine is started, probed and ended, with what it tells."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynctl.profiler.outcome import FILE, load
from tests import deployment
from tests.deployment import RECIPES, Cli, end_all, owned
from tests.engines import environment

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]


def test_a_real_engine_is_measured_and_tells_what_was_cached(tmp_path: Path) -> None:
    cli, out = Cli(tmp_path / "home"), tmp_path / "out"
    where = {"engine.venv": environment.vllm_venv(), "model.path": environment.tiny_model_folder()}
    args = ["profile", str(RECIPES / "tiny-vllm-cpu.yaml"), *deployment.sets(where), "--out", str(out)]
    args += ["--isl", "1200", "--osl", "64", "--sla", "ttft=20s,itl=2s,percentile=p50", "--rate", "1"]
    try:
        done = cli.run(*args, "--gpus", "1", "--budget", "3m", timeout_s=360.0)
        assert done.returncode in (0, 1), done.stderr
        one = load(out / FILE).layouts[0]
        left = [pid for run in (cli.home / "runs").iterdir() for pid in owned(run.name)]
        assert not left, f"still running: {left}"
    finally:
        end_all(cli.home)
    assert (one.failure, one.start_s > 0.0) == ("", True)
    assert one.estimated.limits is not None
    assert one.estimated.limits.kv_tokens == 4096, "what the engine itself says of its KV was not asked"
    assert len(one.prefill) + len(one.decode) + len(one.refused) >= 5
    assert all(point.cached is not None and point.cached > 0.7 for point in one.decode)
