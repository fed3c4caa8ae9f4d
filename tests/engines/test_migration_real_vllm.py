"""Real vLLM killed while it streams: the other worker goes on, with the same tokens where they are known."""

from __future__ import annotations

import json
import os
import random
import signal
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests import deployment
from tests.deployment import Cli, Deployment, counter, eventually, get
from tests.engines import environment

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

READY_S = 400.0
TOKENS = 1200
TRIES = 5
KILL_AFTER = 30
"""Characters: each is at most a token."""
TEXTS = ("text", "content", "reasoning", "reasoning_content")
HELD_BACK = "token ids were told whose text was held back"
"""What an answer ends with whose engine died between a token and its text: that moment is not chosen here."""


def options() -> Sequence[str]:
    return deployment.sets(
        {
            "engine.venv": environment.vllm_venv(),
            "model.path": environment.tiny_model_folder(),
            "frontend.port": 0,
        }
    )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    cli = Cli(tmp_path_factory.mktemp("home"))
    recipe = deployment.RECIPES / "tiny-vllm-cpu.yaml"
    with deployment.up(cli, recipe, *options(), "--timeout", "380", timeout_s=READY_S) as running:
        yield running


def stream(where: Deployment, path: str, body: dict[str, Any], kill_after: int = 0) -> list[dict[str, Any]]:
    """The events of a stream, [DONE] last; its engine is killed in the middle, after so many characters."""
    for _ in range(TRIES if kill_after else 1):
        events, killed = read(where, path, body, kill_after)
        if killed or not kill_after:
            return events
    raise AssertionError(
        f"{TRIES} times the engine had said all after {kill_after} characters, or held some back"
    )


def read(
    where: Deployment, path: str, body: dict[str, Any], kill_after: int
) -> tuple[list[dict[str, Any]], bool]:
    """The events of a stream, and whether its engine was killed."""
    data = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    request = urllib.request.Request(where.url + path, data, {"content-type": "application/json"})
    events: list[dict[str, Any]] = []
    heard, killed = 0, False
    pids = {row["id"]: row["engine_pid"] for row in where.workers("aggregated")}
    with urllib.request.urlopen(request, timeout=300) as answer:
        worker = answer.headers["x-dynctl-workers"]
        for line in answer:
            told = line.decode().strip()
            if not told:
                continue
            if told == "data: [DONE]":
                assert answer.read().strip() == b""
                return events, killed
            events.append(json.loads(told.removeprefix("data: ")))
            if HELD_BACK in events[-1].get("error", {}).get("message", ""):
                assert eventually(lambda: replaced(where, pids[worker]), within_s=300)
                return events, False
            before, heard = heard, heard + characters(events[-1])
            if before < kill_after <= heard:
                killed = kill_at_work(where, pids[worker])
    raise AssertionError(f"the stream ended without [DONE], with {events[-1]}")


def kill_at_work(where: Deployment, pid: int) -> bool:
    """Kill an engine that has not yet said all, and tell whether; else leave it be.

    While other work takes the processors, a whole answer may come at once, or lie in the sockets before its
    beginning is read here. So the engine is stopped, and the frontend, which has read by its second answer
    all that was sent until then, tells whether the stream goes on.
    """
    os.kill(pid, signal.SIGSTOP)
    pages = [get(where.url + "/metrics") for _ in range(2)]
    at_work = counter(pages[-1], "dynctl_frontend_inflight_requests") == 1
    os.kill(pid, signal.SIGKILL if at_work else signal.SIGCONT)
    return at_work


def characters(event: dict[str, Any]) -> int:
    """How much an event says, as text or reasoning."""
    told = [choice.get("delta", choice) for choice in event["choices"]]
    return sum(len(one.get(part) or "") for one in told for part in TEXTS)


def usage(events: list[dict[str, Any]]) -> tuple[int, int]:
    told = events[-1]["usage"]
    return told["prompt_tokens"], told["completion_tokens"]


def finishes(events: list[dict[str, Any]]) -> list[str]:
    choices = [choice for event in events for choice in event["choices"]]
    return [choice["finish_reason"] for choice in choices if choice["finish_reason"]]


def said(events: list[dict[str, Any]]) -> tuple[str, list[int]]:
    """Text and token ids."""
    choices = [choice for event in events for choice in event["choices"]]
    return "".join(c["text"] for c in choices), [token for c in choices for token in c["token_ids"]]


def migrations(where: Deployment) -> int:
    metrics = get(where.url + "/metrics")
    name = "dynctl_frontend_model_migration_total"
    return int(counter(metrics, name, migration_type="ongoing_request"))


def replaced(where: Deployment, engine_pid: int) -> bool:
    return both_ready(where) and all(row["engine_pid"] != engine_pid for row in where.workers("aggregated"))


def both_ready(where: Deployment) -> bool:
    return all(row["ready"] for row in where.workers("aggregated"))


def test_a_completion_goes_on_with_the_very_same_tokens(served: Deployment) -> None:
    rng = random.Random(5)
    body = {
        "model": "tiny",
        "prompt": [rng.randrange(10, 1000) for _ in range(100)],
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    whole = stream(served, "/v1/completions", body)
    got = stream(served, "/v1/completions", body, kill_after=KILL_AFTER)
    assert said(got) == said(whole)
    assert migrations(served) == 1
    assert finishes(got) == finishes(whole) == ["length"]
    assert usage(got) == usage(whole) == (100, TOKENS)
    assert len({event["id"] for event in got}) == 1
    assert eventually(lambda: both_ready(served), within_s=300)


def test_a_chat_goes_on_and_its_usage_is_one(served: Deployment) -> None:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "tell me a story"}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    whole = stream(served, "/v1/chat/completions", body)
    before = migrations(served)
    got = stream(served, "/v1/chat/completions", body, kill_after=KILL_AFTER)
    assert migrations(served) == before + 1
    texts = [
        "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])
        for events in (whole, got)
    ]
    # The text of random weights is not cut into the same tokens again, so it may go on otherwise.
    assert texts[1][:KILL_AFTER] == texts[0][:KILL_AFTER]
    assert sum("role" in choice["delta"] for event in got for choice in event["choices"]) == 1
    assert finishes(got) == ["length"]
    assert usage(got)[0] == usage(whole)[0]
    assert usage(got)[1] == TOKENS
