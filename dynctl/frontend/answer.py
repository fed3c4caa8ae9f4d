"""The client's side of a call: exactly one answer, made of one engine's answer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

from dynctl.errors import DynctlError, EngineFailed, TransportError
from dynctl.frontend.call import Call
from dynctl.frontend.refusal import openai_error
from dynctl.frontend.stream import (
    SSE_HEADERS,
    Load,
    Relay,
    Ways,
    as_events,
    cached_tokens,
    is_refusal,
    output_tokens,
)
from dynctl.frontend.upstream import Leg, Upstream
from dynctl.http.client import Response, Stream
from dynctl.http.heads import end_to_end
from dynctl.http.server import Exchange

logger = logging.getLogger(__name__)

Headers = list[tuple[bytes, bytes]]
Tell = Callable[[DynctlError], bytes]
"""The JSON body that tells a client of an error."""

_REFUSAL_BYTES = 1024 * 1024

_ENGINE_ONLY = frozenset((b"server", b"date", b"content-length", b"x-request-id"))
_OF_A_BODY = frozenset((b"content-type", b"content-encoding", b"content-language", b"etag"))


class Answer:
    """`error_type` is the metric's word for an engine's own refusal that was passed on; "" = none."""

    def __init__(self, call: Call, exchange: Exchange, tell: Tell) -> None:
        self._call = call
        self._exchange = exchange
        self._tell = tell
        self._relay: Relay | None = None
        self._workers: list[str] = []
        self.error_type = ""

    @property
    def begun(self) -> bool:
        """Whether the client has been sent anything of a stream."""
        return self._relay is not None and self._relay.begun

    def prefilled_by(self, worker: str) -> None:
        """Name the prefill worker of this attempt in the answer's headers."""
        self._workers = [worker]

    async def by(self, upstream: Upstream, leg: Leg, load: Load) -> None:
        """Send `leg` and answer the client with what comes back. Raises AttemptFailed, also once begun."""
        workers = [*self._workers, leg.worker]
        self._call.account.served_by(leg.worker, leg.choice.rank, leg.choice.instance.role)
        if self._call.stream:
            await self._stream(upstream, leg, load, workers)
            return
        response = await upstream.whole(leg)
        if response.status == 200 and is_refusal(response.body):
            raise upstream.failed(leg, EngineFailed("the engine aborted the request: it is draining"))
        self.whole(response, workers)

    def whole(self, response: Response, workers: list[str]) -> None:
        """Give an engine's whole answer to the client, its refusals (4xx) too: these in OpenAI's shape."""
        self._judge(response.status)
        headers = self._headers(response.headers, workers)
        if response.status >= 400:
            headers = [pair for pair in headers if pair[0] not in _OF_A_BODY]
            self._exchange.respond(response.status, openai_error(response.body), headers=headers)
            return
        self._count(response.body)
        self._exchange.respond(response.status, response.body, headers=headers)

    def finished_by_prefill(self, response: Response, worker: str) -> None:
        """Prefill's answer is the whole answer: give it in the form the client asked for."""
        if not self._call.stream or response.status != 200:
            self.whole(response, [worker])
            return
        options = self._call.body.get("stream_options", dict) or {}
        events = as_events(response.body, usage=bool(options.get("include_usage")))
        self._count(response.body)
        self._exchange.start(200, self._headers(SSE_HEADERS, [worker]), framing="chunked")
        self._exchange.write(events)
        self._exchange.end()

    def break_off(self, error: DynctlError) -> bool:
        """End a stream that the client has begun to read, and tell why. False when nothing was sent yet."""
        if self._relay is None or not self._relay.begun:
            return False
        logger.warning("stream.broken id=%s why=%s", self._call.request_id, error)
        self._relay.break_off(self._tell(error))
        return True

    async def _stream(self, upstream: Upstream, leg: Leg, load: Load, workers: list[str]) -> None:
        self._relay = None
        with leg.span:
            await self._relay_stream(upstream, leg, load, workers)

    async def _relay_stream(self, upstream: Upstream, leg: Leg, load: Load, workers: list[str]) -> None:
        stream = await upstream.open(leg)
        try:
            if stream.status >= 400:
                told = await stream.read(_REFUSAL_BYTES)
                self.whole(Response(stream.status, stream.headers, told), workers)
                return
            await self._relay_all(upstream, leg, stream, load, workers)
        except TransportError as error:
            raise upstream.failed(leg, self._refusal() or error) from error
        finally:
            stream.abort()

    def _refusal(self) -> EngineFailed | None:
        """The engine's own refusal, for which the stream was given up."""
        refusal = self._relay.refusal if self._relay is not None else ""
        return EngineFailed(f"the engine refused in its stream: {refusal}") if refusal else None

    async def _relay_all(
        self, upstream: Upstream, leg: Leg, stream: Stream, load: Load, workers: list[str]
    ) -> None:
        exchange = self._exchange

        def head() -> None:
            framing: Literal["chunked", "raw"] = "chunked" if stream.framing == "close" else "raw"
            exchange.start(stream.status, self._headers(stream.headers, workers, stream), framing=framing)

        ways = Ways(head=head, give_up=stream.abort, first_token=load.first_token)
        relay = self._relay = Relay(exchange, self._call.account, ways)
        exchange.on_pause, exchange.on_resume = stream.pause, stream.resume
        try:
            await stream.relay(relay)
        finally:
            exchange.on_pause = exchange.on_resume = None
            relay.count_tokens()
        refusal = self._refusal()
        if refusal is not None:
            raise upstream.failed(leg, refusal)
        relay.complete()

    def _count(self, body: bytes) -> None:
        account = self._call.account
        account.output_tokens = output_tokens(body)
        account.cached_tokens = cached_tokens(body)

    def _judge(self, status: int) -> None:
        if status >= 400:
            self.error_type = "not_found" if status == 404 else "validation"

    def _headers(self, given: Headers, workers: list[str], stream: Stream | None = None) -> Headers:
        headers = [pair for pair in end_to_end(given) if pair[0] not in _ENGINE_ONLY]
        if stream is not None:
            if stream.framing == "chunked":
                headers.append((b"transfer-encoding", b"chunked"))
            elif stream.framing == "length":
                headers += [pair for pair in given if pair[0] == b"content-length"]
        headers.append((b"x-dynctl-workers", ",".join(workers).encode()))
        return headers
