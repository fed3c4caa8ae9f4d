"""HTTP in: the routes, and the one table of HTTP statuses. What a route does is elsewhere."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import msgspec

from dynctl.errors import DynctlError, Overloaded, RequestError, TransportError
from dynctl.frontend.accounts import Accounts
from dynctl.frontend.admission import Models
from dynctl.frontend.body import excerpt
from dynctl.frontend.call import (
    CHATS,
    COMPLETIONS,
    Call,
    Endpoint,
    Headers,
    engine_headers,
    read_body,
    read_form,
    request_id,
)
from dynctl.frontend.hints import read_hints
from dynctl.frontend.keys import ApiKey, ApiKeys, check_may_change
from dynctl.frontend.pipeline import Pipeline, error_type_of
from dynctl.frontend.thresholds import Thresholds
from dynctl.frontend.upload import Upload
from dynctl.http.server import Exchange, Request
from dynctl.observability.metrics import CONTENT_TYPE, Metrics
from dynctl.observability.tracing import Trace, Tracing
from dynctl.protocol.openai import error_body

logger = logging.getLogger(__name__)


class UnknownPath(RequestError):
    """There is nothing at this path."""

    kind = "unknown_path"


class WrongMethod(RequestError):
    """The path is known, the method is not one it takes: those it takes are in `allowed`."""

    kind = "method_not_allowed"

    def __init__(self, path: str, method: str, allowed: str) -> None:
        super().__init__(f"{excerpt(path)} takes {allowed}, not {method}")
        self.allowed = allowed


@dataclass(frozen=True, slots=True)
class Told:
    """What a client is told of an error: HTTP status, OpenAI error type, and the finer code."""

    status: int
    type: str
    code: str | None = None


STATUSES: dict[str, Told] = {
    "request": Told(400, "invalid_request_error"),
    "context_length_exceeded": Told(400, "invalid_request_error", "context_length_exceeded"),
    "unauthorized": Told(401, "authentication_error", "invalid_api_key"),
    "forbidden": Told(403, "permission_error", "forbidden"),
    "model_not_found": Told(404, "invalid_request_error", "model_not_found"),
    "unknown_path": Told(404, "invalid_request_error", "unknown_path"),
    "method_not_allowed": Told(405, "invalid_request_error", "method_not_allowed"),
    "overloaded": Told(429, "rate_limit_error", "overloaded"),
    "engine_failed": Told(502, "engine_failed", "engine_failed"),
    "peer_lost": Told(502, "engine_failed", "peer_lost"),
    "connect_failed": Told(502, "engine_failed", "connect_failed"),
    "rejected": Told(503, "service_unavailable", "no_worker"),
    "deadline_exceeded": Told(504, "timeout", "deadline_exceeded"),
}
"""By `DynctlError.kind`. Bad HTTP is answered in `http.server`: 400, 408, 413, 417, 431, 501, 505."""

_INSIDE = {
    "peer_lost": "the engine failed: the connection to it was lost",
    "connect_failed": "the engine failed: it cannot be reached",
    "deadline_exceeded": "the request was not answered in time",
}
"""What clients are told of transport errors: their own words name addresses."""

INTERNAL = Told(500, "server_error", "internal")

_ENDPOINTS = (
    CHATS,
    COMPLETIONS,
    Endpoint("/v1/embeddings", "embeddings"),
    Endpoint("/v1/responses", "responses"),
    Endpoint("/v1/messages", "messages"),
    Endpoint("/v1/messages/count_tokens", "count_tokens", waits=False),
    Endpoint("/v1/rerank", "rerank"),
    Endpoint("/v2/rerank", "rerank"),
    Endpoint("/rerank", "rerank"),
    Endpoint("/v1/score", "score"),
    Endpoint("/score", "score"),
    Endpoint("/classify", "classify"),
    Endpoint("/pooling", "pooling"),
    Endpoint("/v1/audio/transcriptions", "audio_transcriptions", takes_files=True),
    Endpoint("/v1/audio/translations", "audio_translations", takes_files=True),
    Endpoint("/v1/audio/speech", "audio_speech"),
    Endpoint("/v1/images/generations", "images_generations"),
    Endpoint("/v1/images/edits", "images_edits", takes_files=True),
    Endpoint("/tokenize", "tokenize", waits=False),
    Endpoint("/detokenize", "detokenize", waits=False),
)
"""The engine paths that clients may reach. Engines' own administration is not among them."""

_HINT_FIELDS = ("nvext",)
"""Read here (see `frontend.hints`); engines know no such field."""

Health = Callable[[], dict[str, Any]]
"""The state as /health shows it; its `reasons` are empty when requests can be served."""


_THRESHOLDS = "/busy_threshold"

Action = Callable[[bytes], Awaitable[dict[str, Any]]]
"""Does what a body asks for, and tells what came of it. Raises DynctlError."""


@dataclass(frozen=True, slots=True)
class Edge:
    """What the routes need. `refresh` brings metrics up to date; only dynctl may set `owned_fields`.
    `engine_headers` go to engines with every request: the key they ask for.
    """

    pipeline: Pipeline
    thresholds: Thresholds
    models: Models
    keys: ApiKeys
    accounts: Accounts
    metrics: Metrics
    tracing: Tracing
    health: Health
    refresh: Callable[[], None]
    owned_fields: frozenset[str]
    engine_headers: Headers
    started_at: int

    @property
    def passes_keys(self) -> bool:
        """Whether clients' keys are for the engines: nobody here has one of their own."""
        return not self.engine_headers and not self.keys.asked_for


def tell(error: DynctlError) -> bytes:
    """The OpenAI body of an error. What concerns the inside of the deployment (addresses) stays inside."""
    what = STATUSES.get(error.kind, INTERNAL)
    if isinstance(error, TransportError):
        return error_body(_INSIDE.get(error.kind, "the engine failed"), what.type, code=what.code)
    message = f"{error.message} ({error.hint})" if error.hint else error.message
    return error_body(message, what.type, code=what.code, param=error.where or None)


class Routes:
    """The handler of the frontend's HTTP server."""

    def __init__(self, edge: Edge) -> None:
        self._edge = edge
        self._post = {endpoint.path: endpoint for endpoint in _ENDPOINTS}
        self._get: dict[str, Callable[[Exchange], None]] = {
            "/live": self._live,
            "/health": self._health,
            "/metrics": self._metrics,
            "/v1/models": self._models,
        }
        self.actions: dict[str, Action] = {}
        """What POST does at further paths, for those who may change the deployment."""

    async def __call__(self, request: Request, exchange: Exchange) -> None:
        """Answer one request, whatever it is."""
        id_ = request_id(request)
        exchange.always = ((b"x-request-id", id_),)
        try:
            await self._route(request, exchange, id_)
        except DynctlError as error:
            endpoint = self._post.get(request.path)
            self._edge.accounts.refused(endpoint.label if endpoint else "", error_type_of(error))
            self._refuse(error, exchange, id_)

    async def _route(self, request: Request, exchange: Exchange, id_: bytes) -> None:
        path, edge = request.path, self._edge
        endpoint, page = self._post.get(path), self._get.get(path)
        key: ApiKey | None = None
        if path.startswith("/v1/") or endpoint is not None or path == _THRESHOLDS:
            key = edge.keys.check(request.header(b"authorization"))
        if endpoint is not None:
            if request.method != "POST":
                raise WrongMethod(path, request.method, "POST")
            await self._serve_for(key, endpoint, request, exchange, id_)
        elif path in self.actions:
            if request.method != "POST":
                raise WrongMethod(path, request.method, "POST")
            check_may_change(key, request)
            exchange.respond(200, msgspec.json.encode(await self.actions[path](request.body)))
        elif path == _THRESHOLDS:
            self._busy_threshold(key, request, exchange)
        elif page is not None or path.startswith("/v1/models/"):
            if request.method not in ("GET", "HEAD"):
                raise WrongMethod(path, request.method, "GET, HEAD")
            if page is not None:
                page(exchange)
            else:
                self._model(path.removeprefix("/v1/models/"), exchange)
        else:
            raise UnknownPath(f"there is nothing at {excerpt(path)}")

    def _busy_threshold(self, key: ApiKey | None, request: Request, exchange: Exchange) -> None:
        thresholds = self._edge.thresholds
        if request.method == "POST":
            check_may_change(key, request)
            told = thresholds.change(request.body)
            logger.info("thresholds.changed key=%s to=%s", key.name if key else "", told)
        elif request.method in ("GET", "HEAD"):
            told = thresholds.shown()
        else:
            raise WrongMethod(_THRESHOLDS, request.method, "GET, HEAD, POST")
        exchange.respond(200, msgspec.json.encode(told))

    async def _serve_for(
        self, key: ApiKey | None, endpoint: Endpoint, request: Request, exchange: Exchange, id_: bytes
    ) -> None:
        """Within the limit of the key it came with. Raises Overloaded beyond."""
        if key is None:
            await self._serve(endpoint, request, exchange, id_)
            return
        key.enter()
        try:
            await self._serve(endpoint, request, exchange, id_)
        finally:
            key.leave()

    async def _serve(self, endpoint: Endpoint, request: Request, exchange: Exchange, id_: bytes) -> None:
        edge = self._edge
        trace = edge.tracing.of(request.headers)
        with trace.root as root:
            root.set("url.path", endpoint.path)
            root.set("dynctl.request_id", id_.decode())
            call = self._call(endpoint, request, id_, trace)
            root.set("gen_ai.request.model", call.adapter or edge.models.card.name)
            try:
                await edge.pipeline.serve(call, exchange)
            except DynctlError as error:
                root.fail(error)
                self._refuse(error, exchange, id_)

    def _call(self, endpoint: Endpoint, request: Request, id_: bytes, trace: Trace) -> Call:
        edge = self._edge
        form = read_form(endpoint, read_body(endpoint, request), edge.models, edge.owned_fields)
        hints = read_hints(request.headers, form.body)
        own = edge.engine_headers
        if isinstance(form.body, Upload):
            own = (*own, (b"content-type", form.body.content_type))
        return Call(
            endpoint=endpoint,
            body=form.body.without(_HINT_FIELDS),
            adapter=form.adapter,
            stream=form.stream,
            asked=form.asked,
            request_id=id_,
            headers=engine_headers(request, id_, own, pass_key=edge.passes_keys),
            account=edge.accounts.open(form.model, endpoint.label, stream=form.stream),
            trace=trace,
            hints=hints,
        )

    def _refuse(self, error: DynctlError, exchange: Exchange, id_: bytes) -> None:
        what = STATUSES.get(error.kind, INTERNAL)
        level = logging.WARNING if what.status >= 500 else logging.INFO
        logger.log(level, "request.refused id=%s status=%d why=%s", id_.decode(), what.status, error)
        if exchange.started:
            exchange.abort()
            return
        headers: list[tuple[bytes, bytes]] = []
        if isinstance(error, Overloaded):
            headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s))))
        elif what.status == 503:
            headers.append((b"retry-after", b"1"))
        elif what.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        elif isinstance(error, WrongMethod):
            headers.append((b"allow", error.allowed.encode()))
        exchange.respond(what.status, tell(error), headers=headers)

    def _live(self, exchange: Exchange) -> None:
        exchange.respond(200, b'{"status":"live"}')

    def _health(self, exchange: Exchange) -> None:
        health = self._edge.health()
        exchange.respond(503 if health["reasons"] else 200, msgspec.json.encode(health))

    def _metrics(self, exchange: Exchange) -> None:
        self._edge.refresh()
        exchange.respond(200, self._edge.metrics.render(), content_type=CONTENT_TYPE)

    def _models(self, exchange: Exchange) -> None:
        data = [self._card(name) for name in self._edge.models.names()]
        exchange.respond(200, msgspec.json.encode({"object": "list", "data": data}))

    def _model(self, name: str, exchange: Exchange) -> None:
        name = unquote(name)  # clients escape the slash of a Hugging Face id
        self._edge.models.adapter(name)
        exchange.respond(200, msgspec.json.encode(self._card(name)))

    def _card(self, name: str) -> dict[str, Any]:
        models = self._edge.models
        card: dict[str, Any] = {
            "id": name,
            "object": "model",
            "created": self._edge.started_at,
            "owned_by": "dynctl",
        }
        if models.max_model_len:
            card["max_model_len"] = models.max_model_len
        if models.adapter(name):
            card["parent"] = models.card.name
        return card
