"""Prompts with images in whole deployments: which blocks they have is known as the engines know it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deployment import RECIPES, Cli, Deployment, counter, end_all, eventually, get, sets, up
from tests.pictured_model import image, text, write

BLOCK = 16
BEFORE = text("say what you see, as short as you can, and name its colours too " * 4)
AFTER = text(" what is it, and what does it do all day long?")
SELECTED = "dynctl_component_router_kv_selected_cached_prefix_tokens_total"
REUSED = "dynctl_component_router_kv_worker_reused_tokens_total"
FALLBACKS = "dynctl_frontend_tokenize_fallbacks_total"
APART = ("--unset", "roles.aggregated", *sets({"roles.prefill.replicas": 2, "roles.decode.replicas": 1}))


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    yield Cli(tmp_path / "home")
    end_all(tmp_path / "home")


def ask(deployment: Deployment, *parts: dict[str, Any], said: str = "") -> dict[str, int]:
    """Tokens of the prompt, and of these cached, as the engine tells them."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": list(parts)}]
    if said:
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "go on"}]
    usage = deployment.post("/v1/chat/completions", {"model": "tiny", "messages": messages, "max_tokens": 2})[
        "usage"
    ]
    return {"prompt": usage["prompt_tokens"], "cached": usage["prompt_tokens_details"]["cached_tokens"]}


def metric(deployment: Deployment, name: str) -> float:
    return counter(get(deployment.url + "/metrics"), name)


def knows(deployment: Deployment, shown: dict[str, Any]) -> bool:
    """Whether the frontend needs no guess for a prompt with this image: the engine's events have told it."""
    before = metric(deployment, FALLBACKS)
    ask(deployment, text(f"{before} "), shown)
    return metric(deployment, FALLBACKS) == before


@pytest.mark.parametrize("roles", [(), APART], ids=["together", "apart"])
def test_an_image_seen_once_is_found_block_by_block(cli: Cli, tmp_path: Path, roles: tuple[str, ...]) -> None:
    write(tmp_path / "model")
    options = sets(
        {"frontend.port": 0, "model.path": str(tmp_path / "model"), "engine.args.block-size": BLOCK}
    )
    cat, dog = image(1), image(2, 700_000)
    with up(cli, RECIPES / "quickstart.yaml", *options, *roles) as served:
        first = ask(served, BEFORE, cat, AFTER)
        assert first["cached"] == 0
        assert metric(served, FALLBACKS) == 1  # what the first image takes was the engine's to know
        assert eventually(lambda: knows(served, cat))
        selected, reused = metric(served, SELECTED), metric(served, REUSED)
        again = ask(served, BEFORE, cat, AFTER)
        # What is expected to be cached is what the engine takes from its cache: all full blocks.
        full = first["prompt"] // BLOCK * BLOCK
        assert again == {"prompt": first["prompt"], "cached": full}
        assert metric(served, SELECTED) - selected == full
        assert metric(served, REUSED) - reused == full
        # The conversation goes on after the image, and so do the blocks that are known.
        more = ask(served, BEFORE, cat, AFTER, said="a cat. " * 20)
        assert more["cached"] == full
        assert metric(served, SELECTED) - selected == 2 * full
        # Another image at the same place: what is before it, and no more.
        other = ask(served, BEFORE, dog, AFTER)
        assert 0 < other["cached"] < full
        assert eventually(lambda: knows(served, dog))
