"""The HTTP/1.1 server: `serve` a handler on a port."""

from __future__ import annotations

import asyncio
import errno
import logging
import ssl
from collections.abc import Awaitable, Callable
from typing import Final

from dynctl.errors import LaunchError, PortInUse
from dynctl.http.connection import ServerConnection
from dynctl.http.exchange import Exchange
from dynctl.http.limits import Limits
from dynctl.http.request import Request
from dynctl.http.sweep import Sweeper
from dynctl.protocol.openai import error_body

__all__ = ["Exchange", "Handler", "Limits", "Request", "Server", "serve"]

logger = logging.getLogger(__name__)

Handler = Callable[[Request, Exchange], Awaitable[None]]

BACKLOG: Final = 4096
LAST_WORDS_S: Final = 1.0
"""What clients have, at the end, to read why their answer is not complete and to close."""


class Server:
    """A listening server. `drain` and then `close` it.

    `on_refused` is called with the code of each request that is refused for its HTTP alone.
    """

    def __init__(self, handler: Handler, limits: Limits) -> None:
        self._handler = handler
        self._listener: asyncio.Server | None = None
        self._connections: set[ServerConnection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._settled: asyncio.Future[None] | None = None
        self._emptied: asyncio.Future[None] | None = None
        self.loop = asyncio.get_running_loop()
        self._sweeper = Sweeper(self.loop, self._look)
        self.limits = limits
        self.idle_s = limits.idle_timeout_s
        self.on_refused: Callable[[str], None] | None = None
        self.draining = False
        self.port = 0

    @property
    def connections(self) -> int:
        """Open client connections."""
        return len(self._connections)

    @property
    def inflight(self) -> int:
        """Handlers at work."""
        return len(self._tasks)

    def stop_accepting(self) -> None:
        """Close the listening socket; answers from now on carry `Connection: close`."""
        self.draining = True
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    async def drain(self, deadline_s: float, idle_s: float = 0.0) -> int:
        """Stop accepting, let requests finish, and give back how many had not when the deadline passed.

        A connection without a request is closed after `idle_s`: what a client that could not know of the end
        was about to send on it is answered, with word that it was the last.
        """
        self.stop_accepting()
        self.idle_s = idle_s
        for connection in [one for one in self._connections if not one.busy]:
            connection.wind_up()
        if idle_s and self._connections:
            self._sweeper.ensure(idle_s / 4)
            self._emptied = self.loop.create_future()
            await asyncio.wait([self._emptied], timeout=deadline_s)
            self._emptied = None
        elif self._busy():
            self._settled = self.loop.create_future()
            await asyncio.wait([self._settled], timeout=deadline_s)
            self._settled = None
        return self._busy()

    async def close(self) -> None:
        """Cancel handlers still at work, let what they say then reach its client, cut what is left."""
        self.stop_accepting()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
            if self._connections:
                self._emptied = self.loop.create_future()
                await asyncio.wait([self._emptied], timeout=LAST_WORDS_S)
                self._emptied = None
        for connection in list(self._connections):
            connection.abort()
        self._sweeper.stop()

    async def listen(self, address: tuple[str, int], tls: ssl.SSLContext | None, reuse_port: bool) -> None:
        """Bind and begin to accept. Raises PortInUse or LaunchError."""
        host, port = address
        where = f"{host}:{port}"
        handshake_s = self.limits.header_timeout_s if tls is not None else None
        try:
            self._listener = await self.loop.create_server(
                lambda: ServerConnection(self),
                host,
                port,
                backlog=BACKLOG,
                ssl=tls,
                reuse_port=reuse_port or None,
                ssl_handshake_timeout=handshake_s,
            )
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortInUse(
                    "the port is in use", where=where, hint="stop what listens there, or choose another port"
                ) from error
            raise LaunchError(
                f"cannot listen: {error}", where=where, hint="a local address and port"
            ) from error
        self.port = self._listener.sockets[0].getsockname()[1]
        self._sweeper.ensure(self.limits.sweep_interval_s())
        logger.info("server.listening address=%s:%d", host, self.port)

    # --- from the connections

    def opened(self, connection: ServerConnection) -> bool:
        """Count a connection in; False when there are too many."""
        self._connections.add(connection)
        return len(self._connections) <= self.limits.max_connections

    def closed(self, connection: ServerConnection) -> None:
        """Count a connection out."""
        self._connections.discard(connection)
        self.settled(connection)
        if self._emptied is not None and not self._emptied.done() and not self._connections:
            self._emptied.set_result(None)

    def begun(self, request: Request, exchange: Exchange) -> None:
        """Hand a whole request to the handler."""
        task = self.loop.create_task(self._run(request, exchange))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def refused(self, code: str) -> None:
        """A request was answered here, for its HTTP alone."""
        if self.on_refused is not None:
            self.on_refused(code)

    def settled(self, connection: ServerConnection) -> None:
        """A connection may have become idle: wake whoever drains."""
        if self._settled is not None and not self._settled.done() and not self._busy():
            self._settled.set_result(None)

    # --- inside

    def _busy(self) -> int:
        return sum(1 for connection in self._connections if connection.busy)

    def _look(self, now: float) -> bool:
        for connection in [one for one in self._connections if one.deadline <= now]:
            connection.check(now)
        return self._listener is not None or bool(self._connections)

    async def _run(self, request: Request, exchange: Exchange) -> None:
        try:
            await self._handler(request, exchange)
        except asyncio.CancelledError:
            exchange.abort()
            raise
        except Exception:  # the top of a request's task: no request may take the server down
            logger.exception("request.failed method=%s path=%s", request.method, request.path)
        if exchange.ended or exchange.disconnected:
            return
        if exchange.started:
            exchange.abort()
        else:
            exchange.respond(
                500, error_body("the server failed on this request", "server_error", code="internal")
            )


async def serve(
    handler: Handler,
    *,
    host: str,
    port: int,
    limits: Limits,
    tls: ssl.SSLContext | None = None,
    reuse_port: bool = False,
) -> Server:
    """Listen on host:port (port 0 = any free one, see `Server.port`); call `handler` for each whole request.

    Raises PortInUse with host:port, LaunchError for an address that cannot be listened on.
    """
    server = Server(handler, limits)
    await server.listen((host, port), tls, reuse_port)
    return server
