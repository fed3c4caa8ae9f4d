"""Real vLLM on the CPU: a worker changes its role while its engine runs, and answers are what they were."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests import deployment
from tests.deployment import Cli, Deployment, counter, get
from tests.engines import environment

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

READY_S = 500.0
COMPUTED = "vllm:prompt_tokens_by_source_total"


def answers(where: Deployment, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy completions through the frontend, as token ids."""
    body = {"model": "tiny", "max_tokens": 12, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return [
        where.post("/v1/completions", {**body, "prompt": prompt})["choices"][0]["token_ids"]
        for prompt in prompts
    ]


def tokens(url: str, source: str) -> float:
    """Prompt tokens that an engine has had from there so far."""
    return counter(get(f"{url}/metrics"), COMPUTED, source=source)


def workers(where: Deployment) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in where.ps() if row["role"] != "frontend"}


def test_an_engine_decodes_what_others_read_then_reads_for_others_and_back(tmp_path: Path) -> None:
    options = deployment.sets(
        {
            "engine.venv": environment.vllm_venv(),
            "model.path": environment.tiny_model_folder(),
            "engine.kv_transfer": "nixl_both",
            "roles.decode.replicas": 2,
            "router.mode": "round_robin",
            "frontend.port": 0,
        }
    )
    recipe = deployment.RECIPES / "tiny-vllm-cpu-disagg.yaml"
    rng = random.Random(4)
    prompts = [[rng.randrange(10, 1000) for _ in range(200)] for _ in range(4)]
    fresh = [[rng.randrange(10, 1000) for _ in range(200)] for _ in range(4)]
    with deployment.up(
        Cli(tmp_path / "home"), recipe, *options, "--timeout", "480", timeout_s=READY_S
    ) as served:
        first, both = answers(served, prompts), workers(served)
        one = both["decode-1"]
        assert tokens(one["url"], "external_kv_transfer") > 0

        assert served.cli.run("scale", "prefill=2", "decode=1", timeout_s=120.0).returncode == 0
        there = workers(served)
        assert set(there) == {"prefill-0", "prefill-1", "decode-0"}
        assert (there["prefill-1"]["engine_pid"], there["prefill-1"]["url"]) == (
            one["engine_pid"],
            one["url"],
        )
        read, had = (
            tokens(one["url"], "local_compute"),
            tokens(there["decode-0"]["url"], "external_kv_transfer"),
        )
        assert answers(served, prompts) == first
        told = answers(served, fresh)
        assert tokens(one["url"], "local_compute") - read >= 2 * 200  # half of the new ones
        assert tokens(there["decode-0"]["url"], "external_kv_transfer") - had >= 4 * 200

        assert served.cli.run("scale", "prefill=1", "decode=2", timeout_s=120.0).returncode == 0
        again = workers(served)
        assert (again["decode-1"]["engine_pid"], again["decode-1"]["restarts"]) == (one["engine_pid"], 0)
        assert answers(served, prompts) == first
        assert answers(served, fresh) == told
        assert served.cli.run("status", served.name).returncode == 0
