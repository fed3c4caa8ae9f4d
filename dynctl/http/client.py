"""The HTTP/1.1 client for engines and workers: kept-alive connections, whole answers or streams."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from dynctl.errors import CodecError, ConnectFailed, DeadlineExceeded, PeerLost
from dynctl.http.direct import Readers
from dynctl.http.heads import Headers, request_head
from dynctl.http.pool import IdlePool
from dynctl.http.stream import Sink, Stream
from dynctl.http.sweep import Sweeper
from dynctl.http.upstream import Timeouts, UpstreamConnection

__all__ = ["Client", "Origin", "Response", "Sink", "Stream", "Timeouts"]

logger = logging.getLogger(__name__)

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_BODY_METHODS: Final = frozenset(("POST", "PUT", "PATCH"))
_OURS: Final = frozenset((b"host", b"content-length", b"transfer-encoding", b"connection", b"expect"))


@dataclass(frozen=True, slots=True)
class Origin:
    """Scheme, host and port of a server. `host` is without brackets."""

    scheme: str
    host: str
    port: int

    @classmethod
    def parse(cls, url: str) -> Origin:
        """The origin of "http://host:port" or "https://host". Raises CodecError for anything else."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise _not_an_origin(url) from error
        extra = parts.path not in ("", "/") or parts.query or parts.fragment or parts.username
        if parts.scheme not in _DEFAULT_PORTS or not parts.hostname or extra:
            raise _not_an_origin(url)
        return cls(parts.scheme, parts.hostname, _DEFAULT_PORTS[parts.scheme] if port is None else port)

    @property
    def authority(self) -> str:
        """host:port, as in a Host header."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}"


def _not_an_origin(url: str) -> CodecError:
    return CodecError(f"{url!r} is not an origin", hint="http://host:port or https://host:port")


@dataclass(frozen=True, slots=True)
class Response:
    """A whole answer. Header names are lower-case."""

    status: int
    headers: Headers
    body: bytes


class Client:
    """Requests to any number of origins. `close` it at the end.

    `max_idle`: idle connections kept per origin; `idle_expiry_s` stays below the servers' own (uvicorn: 5 s).
    `body_bytes` bounds the whole answers of `request`, `header_bytes` every answer's head. `resend` false:
    requests must not reach a server twice, so a kept connection that dies unanswered is PeerLost at once.
    `readers` are how long bodies are read.
    """

    def __init__(
        self,
        *,
        max_idle: int = 256,
        idle_expiry_s: float = 4.0,
        header_bytes: int = 64 * 1024,
        body_bytes: int = 64 * 1024 * 1024,
        tls: ssl.SSLContext | None = None,
        resend: bool = True,
    ) -> None:
        self.header_bytes = header_bytes
        self._body_bytes = body_bytes
        self._tls = tls
        self._resend = resend
        self._loop = asyncio.get_running_loop()
        self.readers = Readers(self._loop)
        self._pool: IdlePool[UpstreamConnection] = IdlePool(max_idle=max_idle, idle_expiry_s=idle_expiry_s)
        self._open: dict[UpstreamConnection, Origin] = {}
        self._sweeper = Sweeper(self._loop, self._look)
        self._closed = False

    async def request(
        self,
        origin: Origin,
        method: str,
        path: str,
        *,
        headers: Sequence[tuple[bytes, bytes]] = (),
        body: bytes = b"",
        timeout_s: float,
    ) -> Response:
        """Send a request and read the whole answer. Raises PeerLost, DeadlineExceeded."""
        timeouts = Timeouts(connect_s=timeout_s, first_byte_s=timeout_s, stall_s=timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                stream = await self.open(origin, method, path, headers=headers, body=body, timeouts=timeouts)
                content = await stream.read(self._body_bytes)
        except TimeoutError as error:
            what = f"{method} {path} was not answered in {timeout_s:g} s"
            raise DeadlineExceeded(what, where=str(origin)) from error
        return Response(stream.status, stream.headers, content)

    async def open(
        self,
        origin: Origin,
        method: str,
        path: str,
        *,
        headers: Sequence[tuple[bytes, bytes]] = (),
        body: bytes = b"",
        timeouts: Timeouts,
    ) -> Stream:
        """Send a request and give back its answer once the head is there. Raises PeerLost, DeadlineExceeded.

        A kept-alive connection that turns out to be dead, before any byte of an answer, is replaced once by a
        fresh one. Headers that belong to the connection or to the body's length are set here.
        """
        message = _message(origin, method, path, headers, body)
        return await self._open_with(origin, method, message, timeouts, resend=self._resend)

    async def open_once(
        self,
        origin: Origin,
        method: str,
        path: str,
        *,
        headers: Sequence[tuple[bytes, bytes]] = (),
        body: bytes = b"",
        timeouts: Timeouts,
    ) -> Stream:
        """As `open`, for what must not reach the server twice: no connection is replaced."""
        message = _message(origin, method, path, headers, body)
        return await self._open_with(origin, method, message, timeouts, resend=False)

    async def _open_with(
        self, origin: Origin, method: str, message: bytes, timeouts: Timeouts, *, resend: bool
    ) -> Stream:
        pooled = self._pool.take(origin, self._loop.time())
        if pooled is not None and pooled.usable:
            try:
                return await self._send(pooled, message, method, timeouts)
            except PeerLost:
                if pooled.answered or self._closed or not resend:
                    raise
                logger.debug("connection.stale origin=%s", origin)
        fresh = await self._connect(origin, timeouts.connect_s)
        return await self._send(fresh, message, method, timeouts)

    async def close(self) -> None:
        """Abort what is open; streams still relayed end with PeerLost."""
        self._closed = True
        self._pool.clear()
        for connection in list(self._open):
            connection.abort()
        self.readers.close()
        self._sweeper.stop()

    def lost(self, origin: Origin, why: str, *, spare_living: bool = False) -> None:
        """The server there is known to be gone: answers awaited from it end with PeerLost."""
        for connection, where in list(self._open.items()):
            if where == origin:
                connection.lost(why, spare_living=spare_living)

    # --- from the connections

    def idle(self, connection: UpstreamConnection) -> None:
        """A connection's answer is complete: keep it."""
        origin = self._open.get(connection)
        if origin is None:
            return
        surplus = self._pool.put(origin, connection, self._loop.time())
        if surplus is not None:
            surplus.close()

    def closed(self, connection: UpstreamConnection) -> None:
        """A connection is gone."""
        origin = self._open.pop(connection, None)
        if origin is not None:
            self._pool.discard(origin, connection)

    # --- inside

    async def _send(
        self, connection: UpstreamConnection, message: bytes, method: str, timeouts: Timeouts
    ) -> Stream:
        if not connection.usable:
            raise ConnectFailed("the connection was lost as soon as it was made", where=connection.origin)
        self._sweeper.ensure(timeouts.sweep_interval_s())
        return await connection.send(message, head_only=method == "HEAD", timeouts=timeouts)

    async def _connect(self, origin: Origin, connect_s: float) -> UpstreamConnection:
        if self._closed:
            raise PeerLost("the client is closed", where=str(origin))
        tls = self._tls_context() if origin.scheme == "https" else None
        try:
            async with asyncio.timeout(connect_s):
                _, connection = await self._loop.create_connection(
                    lambda: UpstreamConnection(self, str(origin)), origin.host, origin.port, ssl=tls
                )
        except TimeoutError as error:
            raise ConnectFailed(f"no connection in {connect_s:g} s", where=str(origin)) from error
        except OSError as error:
            raise ConnectFailed(f"cannot connect: {error}", where=str(origin)) from error
        if connection.usable:  # it may have been lost already, and is then told of no more
            self._open[connection] = origin
        return connection

    def _tls_context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls

    def _look(self, now: float) -> bool:
        for stale in self._pool.expire(now):
            stale.close()
        for connection in list(self._open):
            if connection.busy:
                connection.check(now)
        return bool(self._open)


def _message(
    origin: Origin, method: str, path: str, headers: Sequence[tuple[bytes, bytes]], body: bytes
) -> bytes:
    sent: Headers = [(b"host", origin.authority.encode("latin-1"))]
    sent += [pair for pair in headers if pair[0].lower() not in _OURS]
    if body or method in _BODY_METHODS:
        sent.append((b"content-length", b"%d" % len(body)))
    return request_head(method, path, sent) + body
