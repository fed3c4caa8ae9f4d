"""Chats that no engine could continue as a message, and whose worker is lost: one stream to the client."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

import dynctl.mocker
from dynctl.http.server import Exchange, Request
from dynctl.protocol.instances import ModelCard
from dynctl.protocol.specs import RouterSpec
from tests.integration.frontend_harness import Engine, Front, frontend, make_spec

TINY = Path(dynctl.mocker.__file__).parent / "assets" / "tiny"
TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}"
    "{%- if opens -%}{{- '<think>\n' -}}{%- endif -%}{%- endif -%}"
)
THOUGHT = "The user greets. I could greet, too; a < b says nothing of it.\n"
SPEECH = "\n\nHello! How are you today?"
CHAT: dict[str, Any] = {
    "model": "m",
    "stream": True,
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 100,
    "stream_options": {"include_usage": True},
}
PATHS = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "special"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny tokenizer with marks of reasoning, special tokens or not."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    tokenizer.add_tokens(
        [AddedToken(mark, special=request.param, normalized=False) for mark in ("<think>", "</think>")]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


@dataclass
class Thinker:
    """An engine's model: always the same answer, token by token, from wherever it is asked to go on."""

    folder: Path
    dies: list[int] = field(default_factory=list)
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    reasons: bool = True
    parses: bool = True
    """Whether it takes its reasoning out of the text."""

    def __post_init__(self) -> None:
        self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    def answer(self, opens: bool) -> list[int]:
        """All tokens it generates."""
        start = "" if opens or not self.reasons else "<think>"
        thought = f"{start}{THOUGHT}</think>" if self.reasons else ""
        ids: list[int] = self.tokenizer.encode(thought + SPEECH, add_special_tokens=False).ids
        return ids

    def prompt(self, opens: bool) -> list[int]:
        """The tokens of the chat's prompt."""
        text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n" + ("<think>\n" if opens else "")
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    async def script(self, engine: Engine, request: Request, exchange: Exchange) -> None:
        """Say it, and die after so many tokens if it is to."""
        body = json.loads(request.body)
        self.asked.append((request.path, body))
        opens = bool((self.asked[0][1].get("chat_template_kwargs") or {}).get("opens"))
        whole, start = self.answer(opens), 0
        chat = "messages" in body
        assert request.path == PATHS["chat" if chat else "completion"]
        prompt = self.prompt(opens)
        if not chat:
            given = self.tokenizer.decode(body["prompt"], skip_special_tokens=False)
            before = self.tokenizer.decode(prompt, skip_special_tokens=False)
            assert given.startswith(before), given
            said = given[len(before) :]
            start = next(
                n
                for n in range(len(whole))
                if self.tokenizer.decode(whole[:n], skip_special_tokens=False) == said
            )
            prompt = body["prompt"]
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or 1000
        ids = whole[start : start + limit]
        finish = "stop" if start + len(ids) == len(whole) else "length"
        dies = self.dies.pop(0) if self.dies else None
        exchange.start(200, [(b"content-type", b"text/event-stream")], framing="chunked")
        writer = _Writer(self, body, exchange, len(self.asked))
        if chat:
            writer.opening(prompt)
        for number, token in enumerate(ids, 1):
            writer.token(token, finish if number == len(ids) else None)
            await asyncio.sleep(0)
            if number == dies:
                await asyncio.sleep(0.02)
                exchange.on_disconnect = None
                exchange.abort()
                return
        writer.end(len(prompt), len(ids))
        exchange.end()


class _Writer:
    def __init__(self, model: Thinker, body: dict[str, Any], exchange: Exchange, leg: int) -> None:
        self._model, self._body, self._exchange = model, body, exchange
        self._chat = "messages" in body
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        self._head = {"id": f"x-{leg}", "object": kind, "created": leg, "model": "m"}
        self._thinks = model.reasons and model.parses

    def _send(self, choices: list[Any], **more: Any) -> None:
        self._exchange.write(
            b"data: " + json.dumps({**self._head, "choices": choices, **more}).encode() + b"\n\n"
        )

    def opening(self, prompt: list[int]) -> None:
        more = {"prompt_token_ids": prompt} if self._body.get("return_token_ids") else {}
        delta = {"role": "assistant", "content": ""}
        self._send([{"index": 0, "delta": delta, "finish_reason": None}], **more)

    def token(self, token: int, finish: str | None) -> None:
        ids = {"token_ids": [token]} if self._body.get("return_token_ids") else {}
        if not self._chat:
            skips = self._body.get("skip_special_tokens", True)
            text = self._model.tokenizer.decode([token], skip_special_tokens=skips)
            self._send([{"index": 0, "text": text, "finish_reason": finish, **ids}])
            return
        text = self._model.tokenizer.decode([token], skip_special_tokens=False)
        delta: dict[str, Any] = {"reasoning_content" if self._thinks else "content": text}
        if text in ("<think>", "</think>") and self._model.parses:
            self._thinks, delta = text == "<think>", {}
            if not ids:
                return
        self._send([{"index": 0, "delta": delta, "finish_reason": finish, **ids}])

    def end(self, prompt: int, made: int) -> None:
        if (self._body.get("stream_options") or {}).get("include_usage"):
            usage = {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
            self._send([], usage=usage)
        self._exchange.write(b"data: [DONE]\n\n")


@dataclass
class Heard:
    """What a client read."""

    thoughts: str = ""
    text: str = ""
    ids: list[int] = field(default_factory=list)
    finishes: list[str] = field(default_factory=list)
    heads: set[tuple[Any, ...]] = field(default_factory=set)
    roles: int = 0
    usage: dict[str, int] | None = None
    error: str = ""
    dones: int = 0


async def ask(front: Front, body: dict[str, Any]) -> Heard:
    response = await front.post("/v1/chat/completions", body)
    assert response.status == 200, response.body
    heard = Heard()
    for part in response.body.decode().strip().split("\n\n"):
        data = part.removeprefix("data: ")
        if data == "[DONE]":
            heard.dones += 1
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            heard.error = chunk["error"]["message"]
            continue
        heard.heads.add(tuple(chunk[name] for name in ("id", "object", "created", "model")))
        heard.usage = chunk.get("usage") or heard.usage
        for choice in chunk["choices"]:
            delta = choice["delta"]
            heard.roles += "role" in delta
            heard.thoughts += delta.get("reasoning_content") or ""
            heard.text += delta.get("content") or ""
            heard.ids += choice.get("token_ids") or []
            if choice["finish_reason"]:
                heard.finishes.append(choice["finish_reason"])
    return heard


def check(heard: Heard, thinker: Thinker, opens: bool, limit: int = 1000) -> None:
    """It reads as if nothing had happened."""
    whole = thinker.answer(opens)
    made = whole[:limit]
    text = thinker.tokenizer.decode(made, skip_special_tokens=False)
    thought, _, speech = text.removeprefix("<think>").rpartition("</think>")
    if "</think>" not in text and thinker.reasons:
        thought, speech = speech, ""
    assert (heard.thoughts, heard.text, heard.error) == (thought, speech, "")
    assert heard.finishes == ["stop" if len(made) == len(whole) else "length"]
    assert (heard.roles, heard.dones, len(heard.heads)) == (1, 1, 1)
    assert heard.heads.pop()[1] == "chat.completion.chunk"
    prompt = len(thinker.prompt(opens))
    assert heard.usage is not None
    assert (heard.usage["prompt_tokens"], heard.usage["completion_tokens"]) == (prompt, len(made))


def spec(folder: Path, mode: Any = "kv", **fields: Any) -> Any:
    card = ModelCard(name="m", path=str(folder), block_size=16, max_model_len=500)
    return make_spec(model=card, router=RouterSpec(mode=mode), **fields)


@pytest.mark.parametrize("opens", [False, True])
@pytest.mark.parametrize("dies", [[1], [3], [9, 4], [20, 5, 6], [12]])
async def test_reasoning_that_has_begun_goes_on_as_reasoning_and_then_as_text(
    model: Path, dies: list[int], opens: bool
) -> None:
    thinker = Thinker(model, dies=list(dies))
    body = {**CHAT, "chat_template_kwargs": {"opens": opens}}
    async with frontend(spec(model), aggregated=[Engine(thinker.script), Engine(thinker.script)]) as front:
        heard = await ask(front, body)
        await front.idle()
        text = await front.metrics()
    check(heard, thinker, opens)
    assert len(thinker.asked) == 1 + len(dies)
    assert 'endpoint="completions"' not in text


async def test_text_after_reasoning_goes_on_as_text(model: Path) -> None:
    length = len(Thinker(model).answer(False))
    for left in (3, 6):
        thinker = Thinker(model, dies=[length - left])
        async with frontend(spec(model), aggregated=[Engine(thinker.script)]) as front:
            heard = await ask(front, CHAT)
        check(heard, thinker, False)
        assert "</think>\n\nHe" in thinker.tokenizer.decode(
            thinker.asked[1][1]["prompt"], skip_special_tokens=False
        )


@pytest.mark.parametrize("mode", ["kv", "round_robin"])
@pytest.mark.parametrize("limit", [8, 15, 40])
async def test_the_limit_holds_for_all_legs_together(model: Path, limit: int, mode: str) -> None:
    thinker = Thinker(model, dies=[4, 3])
    async with frontend(spec(model, mode), aggregated=[Engine(thinker.script)]) as front:
        heard = await ask(front, {**CHAT, "max_tokens": limit})
    check(heard, thinker, False, limit)


@pytest.mark.parametrize("dies", [2, 9, 21, 24])
async def test_exact_token_ids_are_gone_on_with_where_the_client_was_told_them(
    model: Path, dies: int
) -> None:
    thinker = Thinker(model, dies=[dies])
    async with frontend(spec(model), aggregated=[Engine(thinker.script)]) as front:
        heard = await ask(front, {**CHAT, "return_token_ids": True})
    check(heard, thinker, False)
    assert heard.ids == thinker.answer(False)
    assert thinker.asked[1][1]["prompt"] == thinker.prompt(False) + thinker.answer(False)[:dies]


@pytest.mark.parametrize("opens", [False, True])
@pytest.mark.parametrize("left", [0, 3, 13])
async def test_usage_of_an_answer_that_lost_its_worker_after_its_finish_counts_its_reasoning(
    model: Path, opens: bool, left: int
) -> None:
    made = len(Thinker(model).answer(opens)) - left
    for dies in ([made], [7, made - 7]):
        thinker = Thinker(model, dies=list(dies))
        body = {**CHAT, "max_tokens": made, "chat_template_kwargs": {"opens": opens}}
        async with frontend(
            spec(model), aggregated=[Engine(thinker.script), Engine(thinker.script)]
        ) as front:
            heard = await ask(front, body)
        check(heard, thinker, opens, made)
        assert len(thinker.asked) == len(dies)


@pytest.mark.parametrize("opens", [False, True])
@pytest.mark.parametrize("dies", [2, 20, 30])
async def test_reasoning_told_as_text_goes_on_behind_the_very_text(
    model: Path, dies: int, opens: bool
) -> None:
    thinker = Thinker(model, dies=[dies], parses=False)
    body = {**CHAT, "skip_special_tokens": False, "chat_template_kwargs": {"opens": opens}}
    async with frontend(spec(model), aggregated=[Engine(thinker.script), Engine(thinker.script)]) as front:
        heard = await ask(front, body)
    whole = thinker.answer(opens)
    assert heard.text == thinker.tokenizer.decode(whole, skip_special_tokens=False)
    assert (heard.thoughts, heard.error, heard.finishes, heard.dones) == ("", "", ["stop"], 1)
    assert heard.usage is not None
    assert heard.usage["completion_tokens"] == len(whole)
    path, rest = thinker.asked[1]
    assert (path, rest["prompt"]) == (PATHS["completion"], thinker.prompt(opens) + whole[:dies])


async def test_reasoning_told_as_text_ends_with_the_reason_where_a_tool_could_be_called(model: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    for opens in (False, True):
        thinker = Thinker(model, dies=[4], parses=False)
        body = {**CHAT, "tools": tools, "chat_template_kwargs": {"opens": opens}}
        async with frontend(spec(model), aggregated=[Engine(thinker.script)]) as front:
            heard = await ask(front, body)
        assert "tools offered" in heard.error


@pytest.mark.parametrize("dies", [5, 12])
async def test_usage_tells_the_prompt_where_routing_does_not_count_it(model: Path, dies: int) -> None:
    thinker = Thinker(model, dies=[dies], reasons=False)
    async with frontend(spec(model, "round_robin"), aggregated=[Engine(thinker.script)]) as front:
        heard = await ask(front, {**CHAT, "max_tokens": dies})
    check(heard, thinker, False, dies)
    assert len(thinker.asked) == 1


async def test_no_usage_is_told_where_the_prompt_cannot_be_counted(model: Path) -> None:
    thinker = Thinker(model, dies=[5], reasons=False)
    async with frontend(make_spec(), aggregated=[Engine(thinker.script)]) as front:
        heard = await ask(front, {**CHAT, "max_tokens": 5})
    assert (heard.usage, heard.finishes, heard.error, heard.dones) == (None, ["length"], "", 1)


async def test_a_chat_goes_on_where_the_engine_continues_no_message(model: Path) -> None:
    thinker = Thinker(model, dies=[4, 3], reasons=False)
    async with frontend(spec(model, backend="trtllm"), aggregated=[Engine(thinker.script)]) as front:
        heard = await ask(front, CHAT)
    check(heard, thinker, False)
    path, rest = thinker.asked[1]
    assert path == PATHS["completion"]
    assert set(rest) == {"model", "stream", "prompt", "max_tokens", "stream_options"}


async def test_tools_on_offer_end_such_a_chat_with_the_reason(model: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    for backend, reasons, why in (("external", True, "tools offered"), ("trtllm", False, "with tools")):
        thinker = Thinker(model, dies=[4], reasons=reasons)
        async with frontend(spec(model, backend=backend), aggregated=[Engine(thinker.script)]) as front:
            heard = await ask(front, {**CHAT, "tools": tools})
        assert why in heard.error
        assert (heard.dones, len(thinker.asked)) == (0, 1)


@pytest.mark.parametrize(
    ("fields", "why"), [({"chat_template": "x"}, "chat_template"), ({}, "template_missing")]
)
async def test_a_prompt_that_cannot_be_made_here_ends_the_stream_with_the_reason(
    model: Path, fields: dict[str, Any], why: str
) -> None:
    thinker = Thinker(model, dies=[4], reasons=bool(not fields))
    card = ModelCard(name="m", path=str(model) if fields else "")
    backend = "trtllm" if fields else "external"
    async with frontend(make_spec(model=card, backend=backend), aggregated=[Engine(thinker.script)]) as front:
        heard = await ask(front, {**CHAT, **fields})
    assert f"prompt cannot be made here: {why}" in heard.error


NIXL = {
    "do_remote_prefill": True,
    "remote_engine_id": "e",
    "remote_request_id": "r",
    "remote_block_ids": [[1]],
    "remote_host": "h",
    "remote_port": 1,
    "tp_size": 1,
}


@pytest.mark.parametrize(
    ("backend", "field"), [("vllm", "kv_transfer_params"), ("trtllm", "disaggregated_params")]
)
async def test_prefill_and_decode_apart_begin_the_rest_with_a_new_prefill(
    model: Path, backend: str, field: str
) -> None:
    thinker = Thinker(model, dies=[7])
    prefilled: list[dict[str, Any]] = []

    async def prefills(engine: Engine, request: Request, exchange: Exchange) -> None:
        body = json.loads(request.body)
        prefilled.append({"path": request.path, **body})
        choice = {"index": 0, "text": "", "finish_reason": "length"}
        choice["disaggregated_params"] = {"ctx_request_id": len(prefilled)}
        ids = body.get("prompt") or thinker.prompt(False)
        answer = {"choices": [choice], "prompt_token_ids": ids, "kv_transfer_params": NIXL}
        exchange.respond(200, json.dumps(answer).encode())

    roles = spec(model, backend=backend, roles={"prefill": 1, "decode": 1})
    decodes = [Engine(thinker.script), Engine(thinker.script)]
    async with frontend(roles, prefill=[Engine(prefills)], decode=decodes) as front:
        heard = await ask(front, CHAT)
        await front.idle()
    check(heard, thinker, False)
    assert [one["path"] for one in prefilled] == [PATHS["chat"], PATHS["completion"]]
    path, rest = thinker.asked[1]
    assert (path, rest["prompt"]) == (PATHS["completion"], prefilled[1]["prompt"])
    assert field in rest
