"""From tokens to bytes on a client's connection: one `Answer` per request, one `Choice` per sequence."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from dynctl.http.server import Exchange
from dynctl.mocker.requests import ApiError, Generation
from dynctl.mocker.scheduler import Sequence as Running
from dynctl.mocker.tokens import Vocabulary
from dynctl.mocker.wire import Envelope, StopScanner, usage
from dynctl.protocol.sse import LAST_EVENT, event, framed

_SSE = ((b"content-type", b"text/event-stream; charset=utf-8"),)


class Answer:
    """Collects the choices of one request and completes the exchange when all have ended.

    `offer(seq)`: the `kv_transfer_params` of a prefill that keeps its blocks, else None. `done` is set when
    nothing more will be written.
    """

    def __init__(
        self,
        exchange: Exchange,
        envelope: Envelope,
        asked: Generation,
        vocabulary: Vocabulary,
        offer: Callable[[Running], dict[str, Any] | None],
    ) -> None:
        self.exchange = exchange
        self.envelope = envelope
        self.asked = asked
        self.vocabulary = vocabulary
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.cached_tokens: int | None = None
        self._offer = offer
        self._choices: list[Choice] = []
        self._left = 0
        self._params: dict[str, Any] | None = None

    def add(self, prompt: Sequence[int]) -> Choice:
        """The next choice; it is to be the owner of a sequence."""
        choice = Choice(self, len(self._choices), prompt)
        self._choices.append(choice)
        self._left += 1
        return choice

    def open(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Send the head of a stream; a whole answer is sent at its end."""
        self.headers = headers
        if self.asked.stream:
            self.exchange.start(200, (*headers, *_SSE), framing="chunked")
            for choice in self._choices:
                choice.bind(self.exchange.write)

    def ended(self, choice: Choice, seq: Running | None, last: bytes) -> None:
        """A choice is complete; `last` is its last chunk when streaming."""
        self._left -= 1
        if seq is not None and seq.pinned is not None:
            self._params = self._offer(seq)
        if not self.asked.stream:
            if not self._left:
                self._respond()
            return
        if not self._left:
            last += (event(self._usage_chunk()) if self.asked.usage else b"") + LAST_EVENT
        self.exchange.write(last)
        if not self._left:
            self.exchange.end()
            self._finish()

    def final_chunk(self, chunk: dict[str, Any], seq: Running | None) -> bytes:
        """A choice's last chunk, with the transfer parameters if there are any."""
        if seq is not None and seq.pinned is not None:
            chunk["kv_transfer_params"] = self._offer(seq)
        return event(chunk)

    def failed(self, error: ApiError) -> None:
        """Give up: a status when nothing was sent, else an error object in the stream."""
        if self.done.done():
            return
        if self.exchange.started:
            self.exchange.write(framed(error.body()) + LAST_EVENT)
            self.exchange.end()
        else:
            self.exchange.respond(error.status, error.body(), headers=self.headers)
        self._finish()

    def dropped(self) -> None:
        """The client has gone."""
        self._finish()

    def _finish(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def _usage(self) -> dict[str, Any]:
        prompt = sum(map(len, self.asked.prompts))
        said = sum(len(choice.tokens) for choice in self._choices)
        cached = self.cached_tokens
        if cached is None:
            cached = sum(choice.cached for choice in self._choices[:: self.asked.choices])
        return usage(prompt, said, cached)

    def _usage_chunk(self) -> dict[str, Any]:
        return {**self.envelope.head(stream=True), "choices": [], "usage": self._usage()}

    def _respond(self) -> None:
        body = self.envelope.head(stream=False)
        body["choices"] = [choice.whole() for choice in self._choices]
        body["usage"] = self._usage()
        body["kv_transfer_params"] = self._params
        if self.asked.token_ids and self.asked.chat:
            body["prompt_token_ids"] = self.asked.prompts[0]
        self.exchange.respond(200, msgspec.json.encode(body), headers=self.headers)
        self._finish()


class Choice:
    """The owner of one sequence: writes or keeps what it says."""

    __slots__ = (
        "_after",
        "_answer",
        "_before",
        "_fast",
        "_index",
        "_opened",
        "_pieces",
        "_prompt",
        "_reason",
        "_scanner",
        "_texts",
        "_write",
        "cached",
        "tokens",
    )

    def __init__(self, answer: Answer, index: int, prompt: Sequence[int]) -> None:
        asked = answer.asked
        self._answer = answer
        self._index = index
        self._prompt = prompt
        self._before, self._after = answer.envelope.token_frame(index)
        self._pieces = answer.vocabulary.pieces
        self._scanner = StopScanner(asked.stop) if asked.stop else None
        self._opened = False
        self._fast = False
        self._texts: list[str] = []
        self._reason = ""
        self._write: Callable[[bytes], None] = _nowhere
        self.tokens: list[int] = []
        self.cached = 0

    def bind(self, write: Callable[[bytes], None]) -> None:
        """Where a stream's chunks go."""
        self._write = write

    def on_token(self, seq: Running, token: int, reason: str) -> bool:
        """See `rank.Owner`."""
        self.tokens.append(token)
        if self._fast and not reason:
            self._write(self._before + self._pieces[token] + self._after)
            return False
        return self._on_special_token(seq, token, reason)

    def on_abort(self, reason: str) -> None:
        """The engine ends the sequence without a token: finish_reason `reason`."""
        if not self._reason:
            self._complete(None, "", reason, ())

    def whole(self) -> dict[str, Any]:
        """The choice in an answer that is not streamed."""
        asked = self._answer.asked
        tokens = self.tokens if asked.token_ids else None
        text = "".join(self._texts)
        choice = self._answer.envelope.choice(self._index, text, self._reason, tokens)
        if tokens is not None and not asked.chat:
            choice["prompt_token_ids"] = list(self._prompt)
        return choice

    def _on_special_token(self, seq: Running, token: int, reason: str) -> bool:
        """The first and the last token, and all of requests with stop strings, token ids or no stream."""
        text = self._answer.vocabulary.texts.get(token, "")
        stopped = False
        if self._scanner is not None:
            text, stopped = self._scanner.feed(text)
            if reason and not stopped:
                text += self._scanner.rest()
        if stopped:
            reason = "stop"
        self.cached = seq.cached_tokens
        if reason:
            self._complete(seq, text, reason, (token,))
        elif self._answer.asked.stream:
            self._say(text, (token,))
        else:
            self._texts.append(text)
        return stopped

    def _say(self, text: str, tokens: Sequence[int]) -> None:
        """A chunk that is not the last."""
        asked = self._answer.asked
        first = not self._opened
        data = self._opening()
        if text or asked.token_ids:
            chunk = self._answer.envelope.chunk(self._index, text, tokens=tokens if asked.token_ids else None)
            if first and asked.token_ids and not asked.chat:
                chunk["choices"][0]["prompt_token_ids"] = list(self._prompt)
            data += event(chunk)
        if data:
            self._write(data)
        self._fast = self._scanner is None and not asked.token_ids

    def _opening(self) -> bytes:
        """A chat's first chunk, once; b"" afterwards and for completions."""
        asked = self._answer.asked
        if self._opened or not asked.chat:
            self._opened = True
            return b""
        self._opened = True
        return event(self._answer.envelope.opening(self._index, self._prompt if asked.token_ids else None))

    def _complete(self, seq: Running | None, text: str, reason: str, tokens: Sequence[int]) -> None:
        self._reason = reason
        answer = self._answer
        last = b""
        if answer.asked.stream:
            opening = self._opening()
            shown = tokens if answer.asked.token_ids else None
            chunk = answer.envelope.chunk(self._index, text, reason=reason, tokens=shown)
            last = opening + answer.final_chunk(chunk, seq)
        else:
            self._texts.append(text)
        answer.ended(self, seq, last)


def _nowhere(_data: bytes) -> None:
    """Before the stream is opened nothing can be said."""
