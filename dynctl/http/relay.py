"""Pass an upstream's answer on to a client, byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from dynctl.http.exchange import Exchange
from dynctl.http.heads import Headers, end_to_end
from dynctl.http.stream import Stream

_CHUNKED: Final = (b"transfer-encoding", b"chunked")


class ToClient:
    """A sink that is the client's own write: no call in between."""

    __slots__ = ("feed",)

    def __init__(self, feed: Callable[[bytes], None]) -> None:
        self.feed = feed


def begin_relay(stream: Stream, exchange: Exchange, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """Start the answer with the upstream's status and end-to-end headers, and `headers` in place of its own.

    A body delimited by the connection's end is framed anew, others go through as they are. From here on the
    client's slowness pauses the upstream, and its leaving aborts it.
    """
    ours = {name for name, _ in headers}
    sent: Headers = [pair for pair in end_to_end(stream.headers) if pair[0] not in ours]
    sent.extend(headers)
    if stream.framing == "close":
        exchange.start(stream.status, sent, framing="chunked")
    else:
        if stream.framing == "chunked":
            sent.append(_CHUNKED)
        exchange.start(stream.status, sent, framing="raw")
    exchange.on_pause = stream.pause
    exchange.on_resume = stream.resume
    exchange.on_disconnect = stream.abort


async def relay(stream: Stream, exchange: Exchange, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """The whole answer, start to end. Raises as `Stream.relay`; the exchange is then cut, not completed.

    When the client has left, the upstream's loss is not an error.
    """
    begin_relay(stream, exchange, headers)
    try:
        await stream.relay(ToClient(exchange.write))
    finally:
        if not stream.complete:
            exchange.abort()
    exchange.end()
