"""The answer of an upstream server, as it comes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Final, Protocol

from dynctl.errors import PeerLost
from dynctl.http.framing import ChunkReader, Framing
from dynctl.http.heads import Headers, ResponseHead

HELD_BYTES: Final = 256 * 1024

Feed = Callable[[bytes], object]


class Sink(Protocol):
    """Takes the body of an answer as it comes."""

    def feed(self, data: bytes, /) -> object: ...


class Carrier(Protocol):
    """What a stream needs of the connection it comes over."""

    loop: asyncio.AbstractEventLoop

    def redirect(self, feed: Feed) -> None: ...

    def pause(self, paused: bool) -> None: ...

    def abort(self) -> None: ...


class Stream:
    """An answer whose head has come. Use its body up by one of `relay`, `iter_body`, `read`; or `abort` it.

    `framing` says how the body is delimited, and so what `relay` passes on: "chunked" (framing and all),
    "length" (also: no body), or "close" (until the connection ends). Names in `headers` are lower-case.
    """

    __slots__ = (
        "_carrier",
        "_error",
        "_feed",
        "_held",
        "_held_bytes",
        "_waiter",
        "framing",
        "headers",
        "origin",
        "status",
    )

    def __init__(self, carrier: Carrier, head: ResponseHead, framing: Framing, origin: str) -> None:
        self._carrier: Carrier | None = carrier
        self._error: Exception | None = None
        self._feed: Feed = self._hold
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._waiter: asyncio.Future[None] | None = None
        self.status = head.status
        self.headers: Headers = head.headers
        self.framing: Framing = framing
        self.origin = origin

    @property
    def ended(self) -> bool:
        """Whether the last byte has come, or the answer was lost."""
        return self._carrier is None

    async def relay(self, sink: Sink) -> None:
        """Hand every body byte to `sink.feed` as received, and return when the body has ended.

        Raises PeerLost when the connection ends before the body does, DeadlineExceeded when it stalls, and
        whatever `feed` raised.
        """
        await self._relay(sink.feed)

    async def iter_body(self) -> AsyncGenerator[bytes, None]:
        """The payload, without chunk framing, piece by piece. Raises as `relay`.

        Leaving early aborts the stream once the generator is closed.
        """
        queue = _Queue(self, ChunkReader() if self.framing == "chunked" else None)
        self._attach(queue.feed)
        try:
            while True:
                while queue.pieces:
                    yield queue.take()
                if self._carrier is None:
                    break
                await self._wait()
            if self._error is not None:
                raise self._error
        finally:
            self.abort()

    async def read(self, limit_bytes: int) -> bytes:
        """The whole payload. Raises as `relay`, and PeerLost when it is over `limit_bytes`."""
        pieces: list[bytes] = []
        size = 0
        async for piece in self.iter_body():
            size += len(piece)
            if size > limit_bytes:
                self.abort()
                raise PeerLost(f"the answer is over {limit_bytes} bytes", where=self.origin)
            pieces.append(piece)
        return b"".join(pieces)

    def pause(self) -> None:
        """Stop reading from the upstream; its stall deadline rests meanwhile."""
        if self._carrier is not None:
            self._carrier.pause(True)

    def resume(self) -> None:
        """Read again."""
        if self._carrier is not None:
            self._carrier.pause(False)

    def abort(self) -> None:
        """Close the connection now, if the answer has not ended; whoever relays it gets PeerLost."""
        if self._carrier is not None:
            self._carrier.abort()

    @property
    def complete(self) -> bool:
        """Whether the whole body came."""
        return self._carrier is None and self._error is None

    def deliver(self, data: bytes) -> None:
        """For the connection: the last bytes of the body."""
        self._feed(data)

    def hold(self, data: bytes) -> None:
        """For the connection: bytes that nobody has asked for yet."""
        self._hold(data)

    def finish(self, error: Exception | None) -> None:
        """For the connection: the answer is complete, or broken by `error`."""
        if self._carrier is None:
            return
        self._carrier = None
        self._error = error
        self._wake()

    async def _relay(self, feed: Feed) -> None:
        try:
            self._attach(feed)
            while self._carrier is not None:
                await self._wait()
        finally:
            self.abort()
        if self._error is not None:
            raise self._error

    def _attach(self, feed: Feed) -> None:
        held, self._held = self._held, []
        self._held_bytes = 0
        self._feed = feed
        for data in held:
            feed(data)
        if self._carrier is not None:
            self._carrier.redirect(feed)
            self._carrier.pause(False)

    def _hold(self, data: bytes) -> None:
        self._held.append(data)
        self._held_bytes += len(data)
        if self._held_bytes > HELD_BYTES:
            self.pause()

    async def _wait(self) -> None:
        """Wait for `_wake`. The connection's sweep bounds the wait."""
        assert self._carrier is not None
        self._waiter = self._carrier.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def wake(self) -> None:
        """For the queue: there is something to take."""
        self._wake()


class _Queue:
    """Payload that came and was not taken yet; reading pauses while there is much of it."""

    def __init__(self, stream: Stream, reader: ChunkReader | None) -> None:
        self._stream = stream
        self._reader = reader
        self._size = 0
        self.pieces: deque[bytes] = deque()

    def feed(self, data: bytes) -> None:
        out = [data]
        if self._reader is not None:
            out = []
            self._reader.feed(data, out)
        self.pieces.extend(out)
        self._size += sum(map(len, out))
        if self._size > HELD_BYTES:
            self._stream.pause()
        self._stream.wake()

    def take(self) -> bytes:
        piece = self.pieces.popleft()
        self._size -= len(piece)
        if not self.pieces:
            self._stream.resume()
        return piece
