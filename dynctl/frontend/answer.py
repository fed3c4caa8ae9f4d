"""The client's side of a call: exactly one answer, made of one engine's answer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Literal

from dynctl.errors import DynctlError, EngineFailed, TransportError
from dynctl.frontend.call import Call
from dynctl.frontend.migrate import Move, Rest, Story, break_off, last_words
from dynctl.frontend.refusal import openai_error
from dynctl.frontend.stream import Load, Relay, Ways
from dynctl.frontend.upstream import Leg, Upstream
from dynctl.frontend.whole import SSE_HEADERS, as_events, cached_tokens, is_refusal, output_tokens
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

    def __init__(self, call: Call, exchange: Exchange, tell: Tell, story: Story | None = None) -> None:
        self._call = call
        self._exchange = exchange
        self._tell = tell
        self._story = story
        self._move: Move | None = None
        self._relay: Relay | Rest | None = None
        self._workers: list[str] = []
        self.error_type = ""

    @property
    def begun(self) -> bool:
        """Whether the client has been sent anything of a stream."""
        return self._move is not None or self.leg_begun

    @property
    def leg_begun(self) -> bool:
        """Whether the present leg has said anything."""
        return self._relay is not None and self._relay.begun

    def told(self) -> Story | None:
        """What the client was told, for another leg to go on from; None when nothing was kept of it."""
        relay, story = self._relay, self._story
        if story is not None and isinstance(relay, Relay):
            story.unknown = relay.unkept
            if relay.kept:
                story.keep(list(relay.pieces))
                relay.pieces.clear()
                story.read()
        return story

    def asked(self, prompt_tokens: int) -> None:
        """The call's prompt has so many tokens; 0 = not known."""
        if self._story is not None:
            self._story.prompt_tokens = prompt_tokens

    def go_on(self, move: Move) -> None:
        """The next leg is to say the rest."""
        self._relay, self._move = None, move

    def finish(self, move: Move) -> None:
        """There is no rest: end the stream."""
        assert self._story is not None
        self._move = move
        self._story.write(self._exchange, last_words(self._story, move.joint))
        self._story.end(self._exchange)
        move.done("success")

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
        if response.status == 200:
            load.first_token()
        self.whole(response, workers)

    def said(self, body: bytes) -> None:
        """Answer in our own words: JSON, no engine was asked."""
        self._exchange.respond(200, body)

    def whole(self, response: Response, workers: list[str]) -> None:
        """Give an engine's whole answer to the client, its refusals (4xx) too: these in OpenAI's shape.

        Raises EngineFailed when the client has been sent the beginning of another.
        """
        if self.begun:
            told = response.body[:300].decode("utf-8", "replace")
            raise EngineFailed(f"another worker would not go on with the answer: {response.status} {told}")
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
        if self._move is not None:
            self._finished_rest(response)
            return
        options = self._call.body.get("stream_options", dict) or {}
        events = as_events(response.body, usage=bool(options.get("include_usage")))
        self._count(response.body)
        headers = self._headers(SSE_HEADERS, [worker])
        self._exchange.start(200, headers, framing="chunked", with_body=True)
        self._exchange.write(events)
        self._exchange.end()

    def _finished_rest(self, response: Response) -> None:
        """Prefill has said all that was left to be said."""
        assert self._move is not None
        assert self._story is not None
        ways = Ways(head=partial(self._move.done, "success"), give_up=_nothing, first_token=_nothing)
        rest = self._relay = Rest(
            self._exchange, self._call.account, ways, self._story, self._move.joint, "close"
        )
        rest.feed(as_events(response.body, usage=self._move.joint.wants_usage))
        rest.count_tokens()
        if rest.ended_early:
            raise EngineFailed(f"prefill's answer is none: {rest.refusal}")
        rest.complete()

    def break_off(self, error: DynctlError) -> bool:
        """End a stream that the client has begun to read, and tell why. False when nothing was sent yet."""
        if not self.begun or self._exchange.ended:
            return self._exchange.ended
        logger.warning("stream.broken id=%s why=%s", self._call.request_id.decode(), error)
        if self._move is not None and not self.leg_begun:
            assert self._story is not None
            self._move.done("failure")
            break_off(self._story, self._exchange, self._tell(error))
        elif self._relay is not None:
            self._relay.break_off(self._tell(error))
        return True

    def left(self) -> None:
        """The client has gone."""
        if self._move is not None and not self.leg_begun:
            self._move.done("cancelled")

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
            headers = self._headers(stream.headers, workers, stream)
            exchange.start(stream.status, headers, framing=framing, with_body=True)

        relay = self._relay = self._sink(stream, head, load)
        if self._move is not None:
            await (
                exchange.drained()
            )  # the client may be slow from an earlier leg on: nobody tells of that again
        exchange.on_pause, exchange.on_resume = stream.pause, stream.resume
        try:
            await stream.relay(relay)
        except TransportError:
            if not (isinstance(relay, Rest) and relay.over):
                raise
        finally:
            exchange.on_pause = exchange.on_resume = None
            relay.count_tokens()
        refusal = self._refusal()
        if refusal is not None:
            raise upstream.failed(leg, refusal)
        if relay.ended_early:
            raise upstream.failed(leg, EngineFailed("the engine's stream ended before its answer did"))
        relay.complete()

    def _sink(self, stream: Stream, head: Callable[[], None], load: Load) -> Relay | Rest:
        """What takes the leg's bytes: as they are, or as the rest of what another leg has said."""
        account, move, story = self._call.account, self._move, self._story
        if move is None or story is None:
            if story is not None:
                story.begin(stream.framing)
            ways = Ways(head=head, give_up=stream.abort, first_token=load.first_token)
            return Relay(self._exchange, account, ways, story, stream.framing)
        ways = Ways(head=partial(move.done, "success"), give_up=stream.abort, first_token=load.first_token)
        return Rest(self._exchange, account, ways, story, move.joint, stream.framing)

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


def _nothing() -> None:
    """There is no engine to tell."""
