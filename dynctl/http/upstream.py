"""One connection to an upstream server."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol, cast

from dynctl.errors import DeadlineExceeded, PeerLost
from dynctl.http.direct import Readers, delay_acknowledgements, own_socket
from dynctl.http.framing import BodyReader, ChunkReader, CloseReader, Framing, FramingError, LengthReader
from dynctl.http.heads import HEAD_END, HeadError, ResponseHead, parse_response_head
from dynctl.http.stream import Feed, Stream
from dynctl.http.tap import tap
from dynctl.native.load import Tap

LONG_PIECES: Final = 4
"""After so many pieces a body is one of many: from then on it is read past the transport."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds to connect, until the head of the answer is there, and between bytes of its body."""

    connect_s: float = 5.0
    first_byte_s: float = 600.0
    stall_s: float = 300.0

    def sweep_interval_s(self) -> float:
        """How often deadlines are looked at: a quarter of the shortest, between 10 ms and 1 s."""
        return min(1.0, max(0.01, min(self.first_byte_s, self.stall_s) / 4))


class Owner(Protocol):
    """What a connection needs of its client."""

    header_bytes: int
    readers: Readers

    def idle(self, connection: UpstreamConnection) -> None: ...

    def closed(self, connection: UpstreamConnection) -> None: ...


class UpstreamConnection(asyncio.Protocol):
    """One request at a time. For each piece of a body: one look for its end and one call of the sink.

    A sweep looks at `deadline`; `_heard` tells it that bytes came since its last look.
    """

    __slots__ = (
        "_buffer",
        "_closes",
        "_direct",
        "_feed",
        "_head_only",
        "_heard",
        "_keep_alive",
        "_own",
        "_owner",
        "_paused",
        "_pieces",
        "_read",
        "_reader",
        "_stall_s",
        "_stream",
        "_tap",
        "_transport",
        "_waiter",
        "answered",
        "deadline",
        "loop",
        "origin",
    )

    def __init__(self, owner: Owner, origin: str) -> None:
        self._owner = owner
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[Stream] | None = None
        self._stream: Stream | None = None
        self._reader: BodyReader | None = None
        self._read: Callable[[bytes], int] | None = None
        self._feed: Feed | None = None
        self._buffer = bytearray()
        self._head_only = self._keep_alive = self._closes = False
        self._heard = self._paused = self._direct = False
        self._own: socket.socket | None = None
        self._tap: Tap | None = None
        self._pieces = 0
        self._stall_s = math.inf
        self.loop = asyncio.get_running_loop()
        self.origin = origin
        self.answered = False
        self.deadline = math.inf

    # --- from the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._read is None:
            self._head_received(data)
            return
        self._pieces += 1
        self.body_received(data)
        if self._pieces == LONG_PIECES and self._read is not None and not self._paused:
            self._read_directly()

    def body_received(self, data: bytes) -> None:
        """A piece of the body, however it came."""
        read = self._read
        if read is None:
            return
        self._heard = True
        try:
            end = read(data)
        except FramingError as error:
            self._fail(PeerLost(f"the answer breaks HTTP: {error}", where=self.origin))
            return
        if end < 0:
            self._feed(data)  # type: ignore[misc]  # set whenever _read is
        else:
            self._body_ended(data, end)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._lost(exc)
        if self._own is not None:
            self._own.close()
        self._owner.closed(self)

    def _lost(self, exc: Exception | None) -> None:
        if exc is None and self._closes:
            self._complete(None)
        elif self.busy:
            reason = f": {exc}" if exc is not None else ""
            stage = "its answer had ended" if self.answered else "it answered"
            lost = PeerLost(f"the connection was lost before {stage}{reason}", where=self.origin)
            # What is not the network's error was raised by the sink and belongs to whoever relays.
            self._fail(lost if exc is None or isinstance(exc, OSError) else exc)

    # --- past the transport

    def _read_directly(self) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if self._own is None:
            self._own = own_socket(transport)
            if self._own is None:
                return
            self._tap = tap(self._own, self)
        assert self._tap is not None
        transport.pause_reading()
        delay_acknowledgements(self._own)
        self._direct = True
        self._tap.begin(self._feed)
        self._owner.readers.add(self._own, self._tap.readable)

    def between_chunks(self) -> bool:
        """For the tap: whether the next byte begins a chunk of a body that goes on."""
        reader = self._reader
        return isinstance(reader, ChunkReader) and reader.between

    def reading_failed(self, error: OSError) -> None:
        """For the tap."""
        self._lost(error)

    def taking_failed(self, error: Exception) -> None:
        """For the tap: the sink has raised, and whoever relays is to see it."""
        self._fail(error)

    def reading_ended(self) -> None:
        """For the tap: an end is left to the transport, which finds it too."""
        if not self._direct:
            return
        self._direct = False
        assert self._own is not None
        assert self._tap is not None
        self._tap.active, self._tap.feed = False, None
        self._owner.readers.remove(self._own)
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    # --- from the client

    @property
    def busy(self) -> bool:
        """Whether an answer is awaited or coming."""
        return self._waiter is not None or self._stream is not None

    @property
    def _living(self) -> bool:
        """Whether bytes have come since the last look, or nobody wants to read them."""
        return self._heard or self._paused or (self._tap is not None and self._tap.heard)

    @property
    def usable(self) -> bool:
        """Whether a request can be sent now."""
        return self._transport is not None and not self._transport.is_closing() and not self.busy

    async def send(self, message: bytes, *, head_only: bool, timeouts: Timeouts) -> Stream:
        """Send a request and wait for the head of its answer. Raises PeerLost, DeadlineExceeded."""
        assert self._transport is not None
        self._head_only = head_only
        self._stall_s = timeouts.stall_s
        self.answered = False
        self._buffer.clear()
        waiter: asyncio.Future[Stream] = self.loop.create_future()
        self._waiter = waiter
        self.deadline = self.loop.time() + timeouts.first_byte_s
        self._transport.write(message)
        try:
            return await waiter
        except asyncio.CancelledError:
            self.abort()
            raise

    def check(self, now: float) -> None:
        """Act on silence that has lasted too long."""
        if self._stream is not None and self._living:
            self._heard = False
            if self._tap is not None:
                self._tap.heard = False
            self.deadline = now + self._stall_s
        elif now >= self.deadline:
            what = "its answer stalled" if self._stream is not None else "it did not answer in time"
            self._fail(DeadlineExceeded(what, where=self.origin))

    def lost(self, why: str, *, spare_living: bool) -> None:
        """The server is known to be gone: whoever waits gets PeerLost now.

        `spare_living`: not where bytes have come since the last look, or nobody wants to read them.
        """
        if not (spare_living and self._stream is not None and self._living):
            self._fail(PeerLost(why, where=self.origin))

    def close(self) -> None:
        """Close an idle connection."""
        if self._transport is not None:
            self._transport.close()

    # --- from the stream

    def redirect(self, feed: Feed) -> None:
        """Where body bytes go from now on."""
        self._feed = feed
        if self._direct and self._tap is not None:
            self._tap.feed = feed

    def pause(self, paused: bool) -> None:
        """Stop or go on reading; no stall deadline runs while paused."""
        if paused == self._paused:
            return
        self._paused = paused
        self._heard = True
        if self._transport is None or self._transport.is_closing():
            return
        if self._direct:
            assert self._own is not None
            assert self._tap is not None
            self._tap.active = not paused
            if paused:
                self._owner.readers.remove(self._own)
            else:
                self._owner.readers.add(self._own, self._tap.readable)
        elif paused:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def abort(self) -> None:
        """Close now; whoever waits for the answer gets PeerLost."""
        self._fail(PeerLost("the request was given up", where=self.origin))

    # --- inside

    def _head_received(self, data: bytes) -> None:
        if self._waiter is None:  # nothing was asked
            self._fail(PeerLost("bytes came that were not asked for", where=self.origin))
            return
        self.answered = True
        buffer = self._buffer
        scan = max(0, len(buffer) - 3)
        buffer += data
        end = buffer.find(HEAD_END, scan)
        if (end if end >= 0 else len(buffer)) > self._owner.header_bytes:
            self._fail(PeerLost("the answer's headers are too large", where=self.origin))
        elif end >= 0:
            rest = bytes(buffer[end + 4 :])
            del buffer[end + 4 :]
            self._head_ended(bytes(buffer), rest)

    def _head_ended(self, raw: bytes, rest: bytes) -> None:
        self._buffer.clear()
        try:
            head = parse_response_head(raw)
        except HeadError as error:
            self._fail(PeerLost(f"the answer breaks HTTP: {error}", where=self.origin))
            return
        if head.status == 101:
            self._fail(PeerLost("the server switched protocols without being asked", where=self.origin))
        elif head.status < 200:
            if rest:
                self._head_received(rest)
        else:
            self._begin_body(head, rest)

    def _begin_body(self, head: ResponseHead, rest: bytes) -> None:
        self._keep_alive = head.keep_alive
        framing, reader = self._body_reader(head)
        self._closes = framing == "close"
        self._pieces = 0
        self._stream = stream = Stream(self, head, framing, self.origin)
        self._heard = True
        self.deadline = self.loop.time() + self._stall_s
        waiter, self._waiter = self._waiter, None
        assert waiter is not None
        if waiter.done():
            self.abort()
            return
        waiter.set_result(stream)
        if reader is None:
            self._body_ended(rest, 0)
            return
        self._reader, self._read = reader, reader.feed
        self._feed = stream.hold
        if rest:
            self.data_received(rest)

    def _body_reader(self, head: ResponseHead) -> tuple[Framing, BodyReader | None]:
        """What finds the end of this answer's body; None = it has none (RFC 9112, 6.3)."""
        if self._head_only or head.status in (204, 304) or head.length == 0:
            return "length", None
        if head.chunked:
            return "chunked", ChunkReader()
        if head.length is None:
            return "close", CloseReader()
        return "length", LengthReader(head.length)

    def _body_ended(self, data: bytes, end: int) -> None:
        stream, transport = self._stream, self._transport
        assert stream is not None
        if end:
            stream.deliver(data if end == len(data) else data[:end])
        reusable = (
            end == len(data)
            and self._keep_alive
            and transport is not None
            and not transport.is_closing()
            and transport.get_write_buffer_size() == 0
        )
        self._complete(None)
        if reusable:
            self._owner.idle(self)
        elif transport is not None:
            transport.close()

    def _complete(self, error: Exception | None) -> None:
        """No answer is coming any more: free the connection, tell whoever waits."""
        self.pause(False)
        self.reading_ended()
        stream, self._stream = self._stream, None
        waiter, self._waiter = self._waiter, None
        self._reader = self._read = self._feed = None
        self._closes = False
        self.deadline = math.inf
        if stream is not None:
            stream.finish(error)
        if waiter is not None and not waiter.done():
            waiter.set_exception(error or PeerLost("no answer came", where=self.origin))

    def _fail(self, error: Exception) -> None:
        """The answer cannot be completed."""
        self._complete(error)
        if self._transport is not None:
            self._transport.abort()
