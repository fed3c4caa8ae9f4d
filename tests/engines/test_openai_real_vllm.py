"""The OpenAI surface of real vLLM through dynctl: tools, schemas, logprobs, choices, usage, LoRA adapters."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests import deployment
from tests.deployment import Cli, Deployment, counter, eventually, get
from tests.engines import environment, tiny_adapter

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

USER: Any = [{"role": "user", "content": "which way is it? " * 20}]
WHERE = {"type": "string", "enum": ["up", "down"]}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"where": WHERE, "far": {"type": "boolean"}},
    "required": ["where", "far"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "look", "parameters": SCHEMA, "strict": True}}
ARGS = {
    "enable-auto-tool-choice": True,
    "tool-call-parser": "hermes",
    "structured-outputs-config": {"backend": "xgrammar", "disable_any_whitespace": True},
    "enable-lora": True,
    "max-lora-rank": tiny_adapter.RANK,
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    cli = Cli(tmp_path_factory.mktemp("home"))
    options = deployment.sets(
        {
            "engine.venv": environment.vllm_venv(),
            "model.path": environment.tiny_model_folder(),
            "roles.aggregated.replicas": 1,
            "frontend.port": 0,
            **{f"engine.args.{name}": json.dumps(value) for name, value in ARGS.items()},
        }
    )
    recipe = deployment.RECIPES / "tiny-vllm-cpu.yaml"
    with deployment.up(cli, recipe, *options, "--timeout", "380", timeout_s=400.0) as running:
        yield running


@pytest.fixture
def client(served: Deployment) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def test_a_tool_call_comes_whole_and_in_a_stream(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": USER, "tools": [TOOL], "max_tokens": 80}
    asked |= {"tool_choice": "required", "temperature": 0}
    whole = client.chat.completions.create(**asked)
    calls = whole.choices[0].message.tool_calls or []
    assert {call.function.name for call in calls} == {"look"}
    assert all(set(json.loads(call.function.arguments)) == {"where", "far"} for call in calls)
    named: dict[str, Any] = {**asked, "tool_choice": {"type": "function", "function": {"name": "look"}}}
    parts = [part for chunk in client.chat.completions.create(**named, stream=True) for part in chunk.choices]
    pieces = [piece.function for part in parts for piece in part.delta.tool_calls or [] if piece.function]
    assert "".join(piece.name or "" for piece in pieces) == "look"
    assert "".join(piece.arguments or "" for piece in pieces)
    assert client.chat.completions.create(**{**asked, "tool_choice": "auto", "max_tokens": 4}).choices


def test_an_answer_keeps_to_a_schema(client: openai.OpenAI) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "way", "schema": SCHEMA, "strict": True}}
    answer = client.chat.completions.create(
        model="tiny", messages=USER, response_format=schema, temperature=1.0, seed=3, max_tokens=80
    )
    said = json.loads(answer.choices[0].message.content or "")
    assert said["where"] in ("up", "down")
    assert said["far"] in (True, False)


def test_logprobs_choices_stops_and_usage(served: Deployment, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=USER, logprobs=True, top_logprobs=3, n=2, max_tokens=5, temperature=1.0, seed=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert [len(token.top_logprobs) for token in choice.logprobs.content or []] == [3] * 5
    greedy: Any = {"model": "tiny", "prompt": "which way", "temperature": 0, "max_tokens": 12}
    text = client.completions.create(**greedy).choices[0].text
    stopped = client.completions.create(**greedy, stop=[text[6:9]]).choices[0]
    assert (stopped.finish_reason, stopped.text) == ("stop", text[: text.index(text[6:9])])
    stream = client.completions.create(**greedy, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12


def test_reused_tokens_are_those_the_engine_tells(served: Deployment, client: openai.OpenAI) -> None:
    def told() -> list[float]:
        page, name = get(served.url + "/metrics"), "dynctl_component_router_kv_{}_tokens_total"
        return [counter(page, name.format(part)) for part in ("selected_cached_prefix", "worker_reused")]

    prompt = list(range(300, 400))
    before = told()
    first = client.completions.create(model="tiny", prompt=prompt, max_tokens=1)
    assert first.usage is not None
    assert first.usage.prompt_tokens_details is not None
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert told() == before

    def again() -> bool:
        """Once the events have come: 3 full blocks of 32 tokens, as the router and the engine say."""
        selected, reused = told()
        client.completions.create(model="tiny", prompt=prompt, max_tokens=1)
        assert told()[1] - reused == 96
        return told()[0] - selected == 96

    assert eventually(again)


def test_an_adapter_is_loaded_and_unloaded_while_it_runs(
    served: Deployment, client: openai.OpenAI, tmp_path: Path
) -> None:
    tiny_adapter.write(tmp_path / "adapter")
    load = {"lora_name": "tuned", "lora_path": str(tmp_path / "adapter")}
    with pytest.raises(AssertionError, match=r"400 .*adapter"):
        served.post("/v1/load_lora_adapter", {**load, "lora_path": str(tmp_path / "missing")})
    assert served.post("/v1/load_lora_adapter", load)["workers"] == ["aggregated-0"]
    assert [model.id for model in client.models.list()] == ["tiny", "tuned"]
    greedy: Any = {"messages": USER, "temperature": 0, "max_tokens": 12}
    plain, tuned = (client.chat.completions.create(model=name, **greedy) for name in ("tiny", "tuned"))
    assert tuned.model == "tuned"
    assert tuned.choices[0].message.content != plain.choices[0].message.content
    client.chat.completions.create(model="tuned", **greedy)
    # The router has seen the adapter's blocks by the name under which it hashes them itself.
    metrics = get(served.url + "/metrics")
    assert sum(float(value) for value in re.findall(r"router_kv_hit_rate_sum\S* (\S+)", metrics)) > 0
    assert counter(metrics, "dynctl_frontend_lora_adapters") == 1
    assert served.post("/v1/unload_lora_adapter", {"lora_name": "tuned"})["loaded"] is False
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="tuned", **greedy)
