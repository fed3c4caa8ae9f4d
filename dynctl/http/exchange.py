"""The answer side of one request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final, Literal, Protocol

from dynctl.http.framing import LAST_CHUNK, ChunkReader, frame_chunk
from dynctl.http.heads import Headers, response_head
from dynctl.http.request import Request

AnswerFraming = Literal["chunked", "raw"]

_OURS: Final = frozenset((b"connection", b"keep-alive"))
_FRAMING: Final = frozenset((b"content-length", b"transfer-encoding"))
_BODYLESS: Final = frozenset((204, 304))


class Line(Protocol):
    """What an exchange needs of its connection."""

    loop: asyncio.AbstractEventLoop
    write_paused: bool

    @property
    def closes_soon(self) -> bool: ...

    def write(self, data: bytes) -> None: ...

    def raw_writer(self) -> Callable[[bytes], None]: ...

    def exchange_done(self, *, keep_alive: bool) -> None: ...

    def cut(self, *, reset: bool) -> None: ...


def _too_early(data: bytes) -> None:
    raise RuntimeError("the answer must be started before its body is written")


def _ignored(data: bytes) -> None:
    """The client is gone, or the body is not to be sent: nothing to do."""


class Exchange:
    """Answer with `respond`, or with `start`, `write` and `end`; no-ops once the client is gone.

    `write(data)` is a plain attribute, so that a relay may hand it on and pay one call per token: in raw
    framing it is the transport's own write. `on_pause`/`on_resume` are called when the client's buffer is
    full and when it has room again. `always`: headers that every answer has, whoever gives it.
    """

    __slots__ = (
        "_body_writer",
        "_decoder",
        "_head",
        "_keep_alive",
        "_line",
        "_on_disconnect",
        "_request",
        "_waiters",
        "always",
        "disconnected",
        "ended",
        "http_1_0",
        "on_pause",
        "on_resume",
        "started",
        "write",
    )

    def __init__(self, request: Request, line: Line) -> None:
        self._request = request
        self._line = line
        self._keep_alive = request.keep_alive
        self._decoder: ChunkReader | None = None
        self._head = b""
        self._body_writer: Callable[[bytes], None] = _too_early
        self._on_disconnect: Callable[[], None] | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self.always: tuple[tuple[bytes, bytes], ...] = ()
        self.http_1_0 = request.http_1_0
        self.started = False
        self.ended = False
        self.disconnected = False
        self.on_pause: Callable[[], None] | None = None
        self.on_resume: Callable[[], None] | None = None
        self.write: Callable[[bytes], None] = _too_early

    @property
    def on_disconnect(self) -> Callable[[], None] | None:
        """Called once if the client goes away before `end`; soon, if it has gone already when this is set."""
        return self._on_disconnect

    @on_disconnect.setter
    def on_disconnect(self, callback: Callable[[], None] | None) -> None:
        if self.disconnected and callback is not None:
            self._line.loop.call_soon(callback)
        else:
            self._on_disconnect = callback

    def respond(
        self,
        status: int,
        body: bytes = b"",
        *,
        content_type: bytes = b"application/json",
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        """The whole answer at once. Raises RuntimeError when one was started already."""
        self._begin()
        if self.disconnected:
            return
        sent: Headers = [pair for pair in headers if pair[0] not in _OURS and pair[0] not in _FRAMING]
        if status not in _BODYLESS:
            if body and not any(name == b"content-type" for name, _ in sent):
                sent.append((b"content-type", content_type))
            sent.append((b"content-length", b"%d" % len(body)))
        self._add_connection(sent)
        head = response_head(status, sent)
        bare = self._request.method == "HEAD" or status in _BODYLESS
        self._line.write(head if bare else head + body)
        self._finish()

    def start(
        self,
        status: int,
        headers: Sequence[tuple[bytes, bytes]],
        *,
        framing: AnswerFraming,
        with_body: bool = False,
    ) -> None:
        """Send the head; the body follows by `write` and is completed by `end`. `with_body`: its first piece
        is at hand and goes with the head, as one packet; `write` is then another one from the second on.

        "chunked": what is written is framed here. "raw": it is framed already, as `headers` say by
        content-length or transfer-encoding. An HTTP/1.0 client gets the payload alone, ended by the
        connection's end.
        """
        self._begin()
        if self.disconnected:
            return
        sent: Headers = [pair for pair in headers if pair[0] not in _OURS]
        bodyless = self._request.method == "HEAD" or status in _BODYLESS
        if framing == "chunked":
            sent = [pair for pair in sent if pair[0] not in _FRAMING]
            writer = self._start_chunked(sent, status)
        else:
            writer, sent = self._start_raw(sent, bodyless)
        self._add_connection(sent)
        head = response_head(status, sent)
        self.write = _ignored if bodyless else writer
        if with_body and not bodyless and writer != self._write_decoded:
            self._head, self._body_writer, self.write = head, writer, self._write_first
        else:
            self._line.write(head)

    def _start_chunked(self, sent: Headers, status: int) -> Callable[[bytes], None]:
        if self.http_1_0:
            self._keep_alive = False
            return self._line.raw_writer()
        if status not in _BODYLESS:
            sent.append((b"transfer-encoding", b"chunked"))
        return self._write_chunk

    def _start_raw(self, sent: Headers, bodyless: bool) -> tuple[Callable[[bytes], None], Headers]:
        names = {name for name, _ in sent}
        chunked = b"transfer-encoding" in names
        if chunked and self.http_1_0:
            self._keep_alive = False
            self._decoder = ChunkReader()
            return self._write_decoded, [pair for pair in sent if pair[0] != b"transfer-encoding"]
        if not chunked and b"content-length" not in names and not bodyless:
            self._keep_alive = False
        return self._line.raw_writer(), sent

    def _write_first(self, data: bytes) -> None:
        writer, head = self._body_writer, self._head
        self.write, self._head = writer, b""
        if writer == self._write_chunk:
            self._line.write(head + frame_chunk(data) if data else head)
        else:
            writer(head + data)

    def _write_chunk(self, data: bytes) -> None:
        if data:
            self._line.write(frame_chunk(data))

    def _write_decoded(self, data: bytes) -> None:
        assert self._decoder is not None
        payload: list[bytes] = []
        self._decoder.feed(data, payload)
        for piece in payload:
            self._line.write(piece)

    def end(self) -> None:
        """The body is complete. A second call does nothing."""
        if self.ended or self.disconnected:
            return
        if not self.started:
            raise RuntimeError("an answer must be started before it is ended")
        if self._head and self.write == self._write_first:
            self._write_first(b"")
        if self.write == self._write_chunk:
            self._line.write(LAST_CHUNK)
        self._finish()

    def abort(self) -> None:
        """Cut the connection, so that the client sees an answer that is not complete."""
        if self.ended or self.disconnected:
            return
        self._on_disconnect = None
        self.write = _ignored
        if self._head:
            self._line.write(self._head)
        close_delimited = self.started and self.http_1_0
        self.started = True
        self._line.cut(reset=close_delimited)

    async def drained(self) -> None:
        """Wait until the client's write buffer has room; a client that takes nothing is disconnected."""
        if not self._line.write_paused or self.disconnected:
            return
        waiter = self._line.loop.create_future()
        self._waiters.append(waiter)
        await waiter

    def writing_paused(self) -> None:
        """For the connection: the client's buffer is full."""
        if self.on_pause is not None:
            self.on_pause()

    def writing_resumed(self) -> None:
        """For the connection: the client's buffer has room again."""
        self._wake()
        if self.on_resume is not None:
            self.on_resume()

    def lost(self) -> None:
        """For the connection: the client has gone before `end`."""
        self.disconnected = True
        self.write = _ignored
        self._wake()
        callback, self._on_disconnect = self._on_disconnect, None
        if callback is not None:
            callback()

    def _begin(self) -> None:
        if self.started and not self.disconnected:
            raise RuntimeError("an answer was started already")
        self.started = True
        self.write = _ignored

    def _finish(self) -> None:
        self.ended = True
        self.write = _ignored
        self._on_disconnect = self.on_pause = self.on_resume = None
        self._wake()
        self._line.exchange_done(keep_alive=self._keep_alive)

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _add_connection(self, sent: Headers) -> None:
        sent += self.always
        if self._line.closes_soon:
            self._keep_alive = False
        if not self._keep_alive:
            sent.append((b"connection", b"close"))
        elif self.http_1_0:
            sent.append((b"connection", b"keep-alive"))
