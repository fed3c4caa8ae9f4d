"""Real vLLM with a reasoning parser, killed while its model reasons: the other worker goes on reasoning."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import deployment
from tests.deployment import Cli, Deployment, eventually
from tests.engines import environment, tiny_model
from tests.engines.test_migration_real_vllm import READY_S, both_ready, finishes, migrations, stream, usage

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

TOKENS = 1200
KILL_AFTER = 30
CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "tell me a story"}],
    "max_tokens": TOKENS,
    "temperature": 0,
    "ignore_eos": True,
}


def write_thinking_model(folder: Path) -> int:
    """The tiny model with marks of reasoning for its last two tokens; the closing one's id."""
    tiny_model.write(folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    model = tokenizer["model"]
    ids = sorted(model["vocab"].values())[-2:]
    gone = {text for text, token in model["vocab"].items() if token in ids}
    model["vocab"] = {text: token for text, token in model["vocab"].items() if token not in ids}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) not in gone]
    for mark, token in zip(("<think>", "</think>"), ids, strict=True):
        how = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
        tokenizer["added_tokens"].append({"id": token, "content": mark, **how})
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    return int(ids[1])


@pytest.fixture(scope="module")
def closing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("thinking")
    return folder, write_thinking_model(folder)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, closing: tuple[Path, int]) -> Iterator[Deployment]:
    cli = Cli(tmp_path_factory.mktemp("home"))
    options = deployment.sets(
        {
            "engine.venv": environment.vllm_venv(),
            "engine.args.reasoning-parser": "deepseek_r1",
            "model.path": closing[0],
            "frontend.port": 0,
        }
    )
    recipe = deployment.RECIPES / "tiny-vllm-cpu.yaml"
    with deployment.up(cli, recipe, *options, "--timeout", "380", timeout_s=READY_S) as running:
        yield running


def told(events: list[dict[str, Any]]) -> tuple[str, str, list[int]]:
    """Reasoning, text and token ids."""
    choices = [choice for event in events for choice in event["choices"]]
    deltas = [choice["delta"] for choice in choices]
    return (
        "".join(delta.get("reasoning") or delta.get("reasoning_content") or "" for delta in deltas),
        "".join(delta.get("content") or "" for delta in deltas),
        [token for choice in choices for token in choice.get("token_ids") or ()],
    )


def roles(events: list[dict[str, Any]]) -> int:
    return sum("role" in choice["delta"] for event in events for choice in event["choices"])


def test_reasoning_goes_on_with_the_very_same_tokens_and_ends_where_it_would_have(
    served: Deployment, closing: tuple[Path, int]
) -> None:
    body: dict[str, Any] = {**CHAT, "return_token_ids": True}
    whole: list[dict[str, Any]] = []
    for bias in (0, 2, 4, 6, 8, 10, 12):
        body["logit_bias"] = {str(closing[1]): bias}
        whole = stream(served, "/v1/chat/completions", body)
        at = told(whole)[2]
        if closing[1] in at[KILL_AFTER + 10 :] and closing[1] not in at[: KILL_AFTER + 10]:
            break
    got = stream(served, "/v1/chat/completions", body, kill_after=KILL_AFTER)
    assert migrations(served) == 1
    assert told(got) == told(whole)
    assert finishes(got) == finishes(whole) == ["length"]
    assert usage(got) == usage(whole)
    assert roles(got) == 1
    assert len({event["id"] for event in got}) == 1
    assert eventually(lambda: both_ready(served), within_s=300)


def test_reasoning_goes_on_by_its_text(served: Deployment) -> None:
    before = migrations(served)
    whole = stream(served, "/v1/chat/completions", CHAT)
    got = stream(served, "/v1/chat/completions", CHAT, kill_after=KILL_AFTER)
    assert migrations(served) == before + 1
    thoughts, text, _ = told(got)
    assert thoughts[:30] == told(whole)[0][:30]
    # Far more than before the kill; not all tokens are letters. Text may be tokenised otherwise than it was
    # said: what follows differs then, and may close the reasoning.
    assert len(thoughts) + len(text) > TOKENS / 2
    assert finishes(got) == ["length"]
    assert usage(got) == usage(whole) == (usage(whole)[0], TOKENS)
    assert roles(got) == 1
