"""`dynctl up` with real vLLM on the CPU: KV-aware routing and prefill/decode apart, by its own counters."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import deployment
from tests.deployment import Cli, Deployment, counter, get
from tests.engines import environment

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

READY_S = 400.0
HITS = "vllm:prefix_cache_hits_total"
BY_SOURCE = "vllm:prompt_tokens_by_source_total"


def options() -> Sequence[str]:
    return deployment.sets(
        {
            "engine.venv": environment.vllm_venv(),
            "model.path": environment.tiny_model_folder(),
            "frontend.port": 0,
        }
    )


def prompt(rng: random.Random, tokens: int = 200) -> list[int]:
    return [rng.randrange(10, 1000) for _ in range(tokens)]


def complete(where: Deployment, tokens: list[int], **more: Any) -> list[int]:
    """Greedy completion through the frontend; the generated token ids."""
    body = {
        "model": "tiny",
        "prompt": tokens,
        "max_tokens": 16,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **more,
    }
    ids: list[int] = where.post("/v1/completions", body)["choices"][0]["token_ids"]
    return ids


@pytest.fixture(scope="module")
def aggregated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    cli = Cli(tmp_path_factory.mktemp("home"))
    recipe = deployment.RECIPES / "tiny-vllm-cpu.yaml"
    with deployment.up(cli, recipe, *options(), "--timeout", "380", timeout_s=READY_S) as running:
        yield running


@pytest.fixture(scope="module")
def disaggregated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    cli = Cli(tmp_path_factory.mktemp("home"))
    recipe = deployment.RECIPES / "tiny-vllm-cpu-disagg.yaml"
    with deployment.up(cli, recipe, *options(), "--timeout", "380", timeout_s=READY_S) as running:
        yield running


def per_worker(where: Deployment, role: str, name: str, **labels: str) -> list[float]:
    return [counter(get(w["url"] + "/metrics"), name, **labels) for w in where.workers(role)]


def test_repeated_prompts_go_to_the_worker_that_holds_them(aggregated: Deployment) -> None:
    rng = random.Random(1)
    assert len(aggregated.workers("aggregated")) == 2
    prompts = [prompt(rng) for _ in range(12)]
    first = [complete(aggregated, tokens) for tokens in prompts]
    computed = per_worker(aggregated, "aggregated", "vllm:prompt_tokens_total")
    assert all(computed), f"one worker got every prompt, load was not spread: {computed}"
    before = sum(per_worker(aggregated, "aggregated", HITS))
    for _ in range(3):
        assert [complete(aggregated, tokens) for tokens in prompts] == first
    gained = sum(per_worker(aggregated, "aggregated", HITS)) - before
    # 200 tokens are 6 whole blocks of 32; every repeat must find them, wherever it went first.
    assert gained == 3 * len(prompts) * 6 * 32


def test_chat_streams_and_reports_usage_as_the_engine_does(aggregated: Deployment) -> None:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 5,
        "ignore_eos": True,
        "temperature": 0,
    }
    whole = aggregated.post("/v1/chat/completions", body)
    assert whole["usage"]["completion_tokens"] == 5
    assert aggregated.cli.run("chat", "hello", "--name", aggregated.name).returncode == 0


def test_decode_equals_aggregated_with_all_prompt_tokens_transferred(
    aggregated: Deployment, disaggregated: Deployment
) -> None:
    rng = random.Random(2)
    prompts = [prompt(rng) for _ in range(5)]
    alone = [complete(aggregated, tokens) for tokens in prompts]
    metrics = disaggregated.workers("decode")[0]["url"] + "/metrics"
    before = get(metrics)
    apart = [complete(disaggregated, tokens) for tokens in prompts]
    assert apart == alone
    after = get(metrics)
    moved, computed = (
        counter(after, BY_SOURCE, source=source) - counter(before, BY_SOURCE, source=source)
        for source in ("external_kv_transfer", "local_compute")
    )
    assert (moved, computed) == (sum(map(len, prompts)), 0)


def test_client_cannot_reach_the_transfer_parameters(disaggregated: Deployment) -> None:
    """Parameters a client makes up would kill the decode engine (engine contract); they must not arrive."""
    made_up = {"do_remote_prefill": True, "remote_engine_id": "x", "remote_block_ids": []}
    ids = complete(disaggregated, prompt(random.Random(3)), kv_transfer_params=made_up)
    assert len(ids) == 16
    assert all(row["ready"] for row in disaggregated.ps())


def test_logs_of_the_engine_can_be_read(aggregated: Deployment, tmp_path: Path) -> None:
    done = aggregated.cli.run("logs", aggregated.name, "aggregated/0")
    assert done.returncode == 0
    assert "vllm" in done.stdout.lower()
