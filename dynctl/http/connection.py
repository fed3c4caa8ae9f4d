"""One client connection of the server: bytes in, requests out in order, one in flight at a time."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import socket
import struct
from collections.abc import Callable
from typing import Final, Protocol, cast

from dynctl.http import direct
from dynctl.http.exchange import Exchange
from dynctl.http.heads import HeadError, response_head
from dynctl.http.limits import Limits
from dynctl.http.request import Request, RequestReader, Stage
from dynctl.protocol.openai import error_body

logger = logging.getLogger(__name__)

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
PIPELINE_BYTES: Final = 64 * 1024
WRITE_HIGH_BYTES: Final = 64 * 1024
LINGER_S: Final = 2.0
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)


class Owner(Protocol):
    """What a connection needs of its server."""

    loop: asyncio.AbstractEventLoop
    limits: Limits
    draining: bool
    idle_s: float
    """How long a connection may wait for its next request; 0 = it is closed after its answer."""

    def opened(self, connection: ServerConnection) -> bool: ...

    def closed(self, connection: ServerConnection) -> None: ...

    def begun(self, request: Request, exchange: Exchange) -> None: ...

    def refused(self, code: str) -> None: ...

    def settled(self, connection: ServerConnection) -> None: ...


def refusal(status: int, code: str, message: str, id_: bytes) -> bytes:
    """A whole answer with an OpenAI error body, after which the connection is closed."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = error_body(message, kind, code=code)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
        (b"x-request-id", id_),
    ]
    return response_head(status, headers) + body


class ServerConnection(asyncio.Protocol):
    """Reads one request, hands it on, reads the next when it is answered.

    While a request is in flight reading goes on (so that a client's leaving is seen) up to PIPELINE_BYTES.
    `deadline` is looked at by the server's sweep; infinite while the handler is at work.
    """

    __slots__ = (
        "_exchange",
        "_lingering",
        "_own",
        "_owner",
        "_peer",
        "_read_paused",
        "_reader",
        "_stage",
        "_transport",
        "_unsent",
        "deadline",
        "loop",
        "write_paused",
    )

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self.loop = owner.loop
        self._reader = RequestReader(owner.limits)
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._stage: Stage = "idle"
        self._own: socket.socket | None = None
        self._peer = ""
        self._read_paused = False
        self._lingering = False
        self._unsent = 0
        self.write_paused = False
        self.deadline = math.inf

    # --- from the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)
        peer = transport.get_extra_info("peername")
        self._peer = f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else ""
        self.deadline = self.loop.time() + self._owner.limits.header_timeout_s
        if not self._owner.opened(self):
            self._refuse(HeadError(503, "too_many_connections", "the server has no connection to spare"))

    def data_received(self, data: bytes) -> None:
        if self._lingering:
            return
        self._reader.feed(data)
        if self._exchange is None and not self.write_paused:
            self._advance()
        elif self._reader.buffered > PIPELINE_BYTES and not self._read_paused:
            self._read_paused = True
            self._pause_reading(True)

    def eof_received(self) -> bool:
        """A client that ends its side is gone: a disconnect and a half-close look the same from here."""
        if self._exchange is not None and self._transport is not None:
            self._transport.abort()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.deadline = math.inf
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.lost()
        if self._own is not None:
            self._own.close()
        self._owner.closed(self)

    def pause_writing(self) -> None:
        self.write_paused = True
        self._await_flush()
        if self._exchange is not None:
            self._exchange.writing_paused()

    def resume_writing(self) -> None:
        self.write_paused = False
        if self._exchange is not None:
            self.deadline = math.inf
            self._exchange.writing_resumed()
        elif not self._lingering:
            self._await_request()

    # --- from the exchange

    @property
    def closes_soon(self) -> bool:
        """Whether no further request will be taken."""
        return self._owner.draining

    def write(self, data: bytes) -> None:
        """Send bytes; nothing happens once the connection is gone."""
        if self._transport is not None:
            self._transport.write(data)

    def raw_writer(self) -> Callable[[bytes], None]:
        """The shortest way out, for a body that is framed already."""
        transport = self._transport
        if transport is None:
            return self.write
        if self._own is None:
            self._own = direct.own_socket(transport)
        return transport.write if self._own is None else direct.writer(transport, self._own)

    def exchange_done(self, *, keep_alive: bool) -> None:
        """The answer is complete: close, or go on to the next request."""
        self._exchange = None
        if self._transport is None:
            return
        if not keep_alive or not self._owner.idle_s:
            self._close_gracefully()
        elif not self.write_paused:
            self._await_request()
        self._owner.settled(self)

    def cut(self, *, reset: bool) -> None:
        """Close without completing the answer; `reset` where a plain end would look like a complete one."""
        if self._transport is None:
            return
        if not reset:
            self.close_idle()
            return
        sock: socket.socket | None = self._transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._transport.abort()

    # --- from the server

    @property
    def busy(self) -> bool:
        """Whether a request is in flight or half received."""
        return self._exchange is not None or (self._reader.stage != "idle" and not self._lingering)

    def check(self, now: float) -> None:
        """Act on a deadline that has passed."""
        transport = self._transport
        if transport is None or now < self.deadline:
            return
        if self._lingering or self.write_paused or transport.is_closing():
            before = self._unsent
            self._await_flush()
            if self._unsent >= before:
                transport.abort()
        elif self._stage == "idle":
            self.close_idle()
        else:
            self._refuse(
                HeadError(408, "request_timeout", f"the request's {self._stage} did not come in time")
            )

    def wind_up(self) -> None:
        """The server's end has begun: an idle connection is closed, at once or after the owner's `idle_s`."""
        if not self._owner.idle_s:
            self.close_idle()
        elif not self._lingering:
            self.deadline = min(self.deadline, self.loop.time() + self._owner.idle_s)

    def close_idle(self) -> None:
        """Close once what was written has been sent; for a connection that no request is using."""
        if self._transport is not None:
            self._transport.close()
            self._await_flush()

    def abort(self) -> None:
        """Cut the connection now."""
        if self._transport is not None:
            self._transport.abort()

    # --- inside

    def _await_flush(self) -> None:
        """From now on the client must take something of its answer within each idle time-out.

        With nothing left to send, what remains is to wait for the client to close.
        """
        assert self._transport is not None
        self._unsent = self._transport.get_write_buffer_size()
        wait_s = self._owner.limits.idle_timeout_s if self._unsent else LINGER_S
        self.deadline = self.loop.time() + wait_s

    def _await_request(self) -> None:
        self._stage = "idle"
        self.deadline = self.loop.time() + self._owner.idle_s
        if self._read_paused:
            self._read_paused = False
            self._pause_reading(False)
        if self._reader.buffered:
            self._advance()

    def _advance(self) -> None:
        """Take the next request out of the buffer, if it is whole."""
        try:
            request = self._reader.next()
        except HeadError as error:
            self._refuse(error)
            return
        if request is not None:
            self._begin(request)
            return
        if self._reader.take_continue():
            self.write(CONTINUE)
        stage = self._reader.stage
        if stage != self._stage:
            limits = self._owner.limits
            wait_s = limits.body_timeout_s if stage == "body" else limits.header_timeout_s
            self.deadline = self.loop.time() + wait_s
            self._stage = stage

    def _begin(self, request: Request) -> None:
        request.peer = self._peer
        self.deadline = math.inf
        self._exchange = exchange = Exchange(request, self)
        self._owner.begun(request, exchange)

    def _refuse(self, error: HeadError) -> None:
        id_ = secrets.token_hex(16)
        status, why = error.status, error.message
        logger.info("request.refused id=%s peer=%s status=%d why=%s", id_, self._peer, status, why)
        self._owner.refused(error.code)
        self.write(refusal(status, error.code, why, id_.encode()))
        self._close_gracefully()
        self._owner.settled(self)

    def _close_gracefully(self) -> None:
        """Close so that the answer arrives: what the client still sends is read and dropped for a while.

        Closing at once with unread bytes would reset the connection, and the client could lose the answer.
        """
        assert self._transport is not None
        self._lingering = True
        self._await_flush()
        if self._read_paused:
            self._read_paused = False
            self._pause_reading(False)
        if self._transport.can_write_eof():
            self._transport.write_eof()
        else:
            self._transport.close()

    def _pause_reading(self, pause: bool) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        if pause:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()
