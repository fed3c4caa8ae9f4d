"""Tokens taken from caches in a whole deployment: what the router expected, what engines say, to a token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deployment import RECIPES, Cli, Deployment, counter, end_all, eventually, get, sets, up

BLOCK = 16
BEST, SELECTED, REUSED = (
    f"dynctl_component_router_kv_{name}_tokens_total"
    for name in ("best_eligible_cached_prefix", "selected_cached_prefix", "worker_reused")
)
APART = ("--unset", "roles.aggregated", *sets({"roles.prefill.replicas": 1, "roles.decode.replicas": 1}))
ONE = sets({"roles.aggregated.replicas": 1})


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    yield Cli(tmp_path / "home")
    end_all(tmp_path / "home")


def ask(deployment: Deployment, prompt: list[int], **fields: Any) -> None:
    deployment.post("/v1/completions", {"model": "tiny", "prompt": prompt, "max_tokens": 1, **fields})


def told(deployment: Deployment) -> dict[str, float]:
    page = get(deployment.url + "/metrics")
    return {
        "best": counter(page, BEST),
        "selected": counter(page, SELECTED),
        "reused": counter(page, REUSED),
        "requests": counter(page, "dynctl_frontend_cached_tokens_count"),
    }


@pytest.mark.parametrize("roles", [ONE, APART], ids=["together", "apart"])
def test_reused_tokens_are_those_the_engine_tells(cli: Cli, roles: tuple[str, ...]) -> None:
    options = sets({"frontend.port": 0, "engine.args.block-size": BLOCK})
    with up(cli, RECIPES / "quickstart.yaml", *options, *roles) as served:
        prompt = list(range(100, 200))
        ask(served, prompt)
        assert told(served) == {"best": 0, "selected": 0, "reused": 0, "requests": 1}
        blocks = "dynctl_frontend_router_kv_blocks"
        assert eventually(lambda: counter(get(served.url + "/metrics"), blocks) >= 6)
        ask(served, prompt)  # 6 full blocks of 16
        assert told(served) == {"best": 96, "selected": 96, "reused": 96, "requests": 2}
        ask(served, [*prompt[:40], *range(300, 350)])  # of which 2 are those of the first 40 tokens
        assert told(served) == {"best": 128, "selected": 128, "reused": 128, "requests": 3}
        ask(served, prompt, cache_salt="another tenant's")
        assert told(served) == {"best": 128, "selected": 128, "reused": 128, "requests": 4}
