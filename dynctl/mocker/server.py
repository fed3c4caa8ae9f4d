"""The mocker's HTTP face: OpenAI's API as vLLM serves it, and `/mock/*` to steer and look into it."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from dynctl.errors import RequestError
from dynctl.http.server import Exchange, Request
from dynctl.mocker.blocks import event_hash
from dynctl.mocker.engine import SimulatedEngine
from dynctl.mocker.exposition import metrics_page
from dynctl.mocker.leases import TransferRefused
from dynctl.mocker.requests import (
    ApiError,
    TokenizeBody,
    chat_tokens,
    check_model,
    decode_body,
    parse_generation,
)
from dynctl.mocker.transfer import CLAIM, RELEASE, RENEW, TransferError

logger = logging.getLogger(__name__)

VERSION: Final = "dynctl-mocker"
_EMBEDDING_SIZE: Final = 16
_TEXT: Final = b"text/plain; version=0.0.4; charset=utf-8"


class _Embeddings(msgspec.Struct):
    input: str | list[Any]
    model: str | None = None


class _Detokenize(msgspec.Struct):
    tokens: list[int]


class _LoadAdapter(msgspec.Struct):
    lora_name: str
    lora_path: str


class _UnloadAdapter(msgspec.Struct):
    lora_name: str


Route = Callable[[Request, Exchange], Awaitable[None]]


class Api:
    """Routes requests. `event_sources`: what `/kv_event_sources` tells, by rank; `key`: what /v1 asks for."""

    def __init__(self, engine: SimulatedEngine, event_sources: dict[str, Any], key: str = "") -> None:
        self._key = key.encode()
        self._engine = engine
        self._serving = engine.serving
        self._event_sources = event_sources
        self._started = int(time.time())
        self._routes: dict[tuple[str, str], Route] = {
            ("POST", "/v1/chat/completions"): self._chat,
            ("POST", "/v1/completions"): self._completions,
            ("POST", "/v1/embeddings"): self._guarded(self._embeddings),
            ("POST", "/tokenize"): self._guarded(self._tokenize),
            ("POST", "/detokenize"): self._guarded(self._detokenize),
            ("POST", "/v1/load_lora_adapter"): self._guarded(self._load_adapter),
            ("POST", "/v1/unload_lora_adapter"): self._guarded(self._unload_adapter),
            ("GET", "/v1/models"): self._models,
            ("GET", "/health"): self._health,
            ("GET", "/ping"): self._health,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/version"): self._version,
            ("GET", "/kv_event_sources"): self._kv_event_sources,
            ("POST", "/reset_prefix_cache"): self._reset,
            ("GET", "/mock/faults"): self._faults,
            ("POST", "/mock/faults"): self._guarded(self._set_faults),
            ("GET", "/mock/state"): self._state,
            ("POST", CLAIM): self._transfer,
            ("POST", RENEW): self._transfer,
            ("POST", RELEASE): self._transfer,
        }

    async def __call__(self, request: Request, exchange: Exchange) -> None:
        """Answer one request."""
        if self._key and request.path.startswith("/v1") and not self._knows(request):
            exchange.respond(401, b'{"error":"Unauthorized"}')
            return
        route = self._routes.get((request.method, request.path))
        if route is not None:
            await route(request, exchange)
        elif any(path == request.path for _, path in self._routes):
            exchange.respond(405, _detail("Method Not Allowed"))
        else:
            exchange.respond(404, _detail("Not Found"))

    def _knows(self, request: Request) -> bool:
        """As vLLM checks its API key."""
        scheme, _, key = (request.header(b"authorization") or b"").partition(b" ")
        return scheme.lower() == b"bearer" and secrets.compare_digest(key, self._key)

    # --- answers

    async def _chat(self, request: Request, exchange: Exchange) -> None:
        await self._generate(request, exchange, chat=True)

    async def _completions(self, request: Request, exchange: Exchange) -> None:
        await self._generate(request, exchange, chat=False)

    async def _generate(self, request: Request, exchange: Exchange, *, chat: bool) -> None:
        engine = self._engine
        if engine.faults.refuse:
            error = ApiError("The engine refuses requests.", status=503, kind="ServiceUnavailableError")
            exchange.respond(503, error.body())
            return
        if engine.faults.hang:
            await _until_gone(exchange)
            return
        try:
            asked = parse_generation(request.body, chat, self._serving)
            rank = engine.choose_rank(request.header(b"x-data-parallel-rank"))
            given = request.header(b"x-request-id")
            request_id = given.decode("latin-1") if given else secrets.token_hex(16)
            await engine.generate(exchange, asked, rank, request_id)
        except ApiError as error:
            if error.status < 500:
                engine.spare(_transfer_params(request.body))
            exchange.respond(error.status, error.body())

    def _guarded(self, answer: Callable[[bytes], bytes]) -> Route:
        """A route that answers 200 with what `answer` makes of the body, or with its refusal."""

        async def route(request: Request, exchange: Exchange) -> None:
            try:
                exchange.respond(200, answer(request.body))
            except ApiError as error:
                exchange.respond(error.status, error.body())
            except RequestError as error:
                exchange.respond(400, ApiError(str(error)).body())

        return route

    def _tokenize(self, body: bytes) -> bytes:
        asked = decode_body(body, TokenizeBody)
        vocabulary = self._serving.vocabulary
        if asked.messages is not None:
            generate, resume = asked.add_generation_prompt, asked.continue_final_message
            tokens = chat_tokens(asked.messages, vocabulary, generate=generate, resume=resume)
        elif asked.prompt is not None:
            tokens = vocabulary.encode(asked.prompt, special=asked.add_special_tokens)
        else:
            raise ApiError("prompt or messages is needed", param="prompt")
        length = self._serving.max_model_len
        answer = {"count": len(tokens), "max_model_len": length, "tokens": tokens, "token_strs": None}
        return msgspec.json.encode(answer)

    def _detokenize(self, body: bytes) -> bytes:
        asked = decode_body(body, _Detokenize)
        if any(not 0 <= token < self._serving.vocabulary.size for token in asked.tokens):
            raise ApiError("a token id is out of vocabulary", param="tokens")
        return msgspec.json.encode({"prompt": self._serving.vocabulary.decode(asked.tokens)})

    def _embeddings(self, body: bytes) -> bytes:
        asked = decode_body(body, _Embeddings)
        check_model(asked.model, self._serving)
        single = isinstance(asked.input, str) or (bool(asked.input) and isinstance(asked.input[0], int))
        inputs = [asked.input] if single else list(asked.input)
        rows = [_tokens_of(item, self._serving.vocabulary.encode) for item in inputs]
        total = sum(map(len, rows))
        data = [
            {"object": "embedding", "index": index, "embedding": _embedding(row)}
            for index, row in enumerate(rows)
        ]
        usage = {"prompt_tokens": total, "total_tokens": total}
        answer = {"object": "list", "model": self._serving.model, "data": data, "usage": usage}
        return msgspec.json.encode(answer)

    # --- about the engine

    async def _models(self, _request: Request, exchange: Exchange) -> None:
        card = {
            "id": self._serving.model,
            "object": "model",
            "created": self._started,
            "owned_by": "dynctl",
            "root": self._engine.options.model or self._serving.model,
            "parent": None,
            "max_model_len": self._serving.max_model_len,
            "permission": [],
        }
        adapters = [
            {**card, "id": name, "root": path, "parent": self._serving.model}
            for name, path in self._serving.adapters.items()
        ]
        exchange.respond(200, msgspec.json.encode({"object": "list", "data": [card, *adapters]}))

    def _load_adapter(self, body: bytes) -> bytes:
        asked, adapters = decode_body(body, _LoadAdapter), self._serving.adapters
        if self._engine.faults.refuse_adapters:
            raise ApiError("adapters are refused on purpose", status=500, kind="InternalServerError")
        if asked.lora_name in adapters:
            raise ApiError(f"The lora adapter '{asked.lora_name}' has already been loaded.")
        if not (Path(asked.lora_path) / "adapter_config.json").is_file():
            told = f"Loading lora {asked.lora_name} failed: No adapter found for {asked.lora_path}"
            raise ApiError(told, status=404, kind="NotFoundError")
        adapters[asked.lora_name] = asked.lora_path
        return f"Success: LoRA adapter '{asked.lora_name}' added successfully.".encode()

    def _unload_adapter(self, body: bytes) -> bytes:
        name = decode_body(body, _UnloadAdapter).lora_name
        if self._serving.adapters.pop(name, None) is None:
            told = f"The lora adapter '{name}' cannot be found."
            raise ApiError(told, status=404, kind="NotFoundError")
        return f"Success: LoRA adapter '{name}' removed successfully.".encode()

    async def _health(self, _request: Request, exchange: Exchange) -> None:
        exchange.respond(200)

    async def _version(self, _request: Request, exchange: Exchange) -> None:
        exchange.respond(200, msgspec.json.encode({"version": VERSION}))

    async def _metrics(self, _request: Request, exchange: Exchange) -> None:
        exchange.respond(200, metrics_page(self._engine), content_type=_TEXT)

    async def _kv_event_sources(self, _request: Request, exchange: Exchange) -> None:
        exchange.respond(200, msgspec.json.encode(self._event_sources))

    async def _reset(self, _request: Request, exchange: Exchange) -> None:
        """As in vLLM the event leaves with the next batch, after the next request that does work."""
        done = self._engine.reset_prefix_cache()
        exchange.respond(200 if done else 409, b"" if done else _detail("requests are at work"))

    # --- steering

    def _set_faults(self, body: bytes) -> bytes:
        self._engine.faults.patch(body)
        logger.warning("faults.set %s", self._engine.faults.shown().decode())
        for rank in self._engine.ranks:
            rank.wake()
        return self._engine.faults.shown()

    async def _faults(self, _request: Request, exchange: Exchange) -> None:
        exchange.respond(200, self._engine.faults.shown())

    async def _state(self, _request: Request, exchange: Exchange) -> None:
        """What each rank holds, for tests: cached block hashes as events carry them, blocks, pins."""
        ranks = [
            {
                "rank": rank.number,
                "engine_id": engine_id,
                "cached": sorted(event_hash(digest) for digest in rank.scheduler.pool.cached()),
                "free_blocks": rank.scheduler.pool.free,
                "blocks": rank.scheduler.pool.count,
                "running": len(rank.scheduler.running),
                "waiting": len(rank.scheduler.waiting),
                "receiving": len(rank.scheduler.receiving),
                "pinned": len(rank.scheduler.pins),
            }
            for rank, engine_id in zip(self._engine.ranks, self._engine.engine_ids, strict=True)
        ]
        exchange.respond(200, msgspec.json.encode({"ranks": ranks, "inflight": self._engine.inflight}))

    async def _transfer(self, request: Request, exchange: Exchange) -> None:
        try:
            self._engine.prefill_side.answer(request.path, request.body, time.monotonic())
        except TransferRefused as refusal:
            logger.error("transfer.refused reason=%s %s", refusal.reason, refusal.message)
            told = TransferError(reason=refusal.reason, message=refusal.message)
            exchange.respond(409, msgspec.json.encode(told))
        except msgspec.DecodeError as error:
            exchange.respond(400, ApiError(f"not a transfer call: {error}").body())
        else:
            exchange.respond(200, b"{}")


async def _until_gone(exchange: Exchange) -> None:
    """Wait until the client gives up."""
    gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def release() -> None:
        if not gone.done():
            gone.set_result(None)

    exchange.on_disconnect = release
    await gone


def _transfer_params(body: bytes) -> object:
    """The transfer parameters in a body that may be anything."""
    try:
        value = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return None
    return value.get("kv_transfer_params") if isinstance(value, dict) else None


def _tokens_of(item: object, encode: Callable[[str], list[int]]) -> list[int]:
    if isinstance(item, str):
        return encode(item)
    if isinstance(item, list) and all(type(token) is int for token in item):
        return item
    raise ApiError("input is text, a list of token ids, or a list of these", param="input")


def _embedding(tokens: list[int]) -> list[float]:
    """A unit-less vector that depends on the tokens alone; each value in -1..1."""
    digest = hashlib.sha512(repr(tokens).encode()).digest()
    pairs = (digest[2 * i] * 256 + digest[2 * i + 1] for i in range(_EMBEDDING_SIZE))
    return [round(pair / 32767.5 - 1, 6) for pair in pairs]


def _detail(text: str) -> bytes:
    return msgspec.json.encode({"detail": text})
