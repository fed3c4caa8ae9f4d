"""Bytes in and out of a connection past its transport: a token of a long stream costs its two system calls.

A transport does more for each piece than a relay has use for. What comes once in a while stays its work: the
head of a message, a peer that takes too little, the end. TLS has no such way.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import socket
from collections.abc import Callable
from typing import Final

logger = logging.getLogger(__name__)

READ_BYTES: Final = 64 * 1024
_EDGE: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET


def own_socket(transport: asyncio.Transport) -> socket.socket | None:
    """A second handle of the transport's socket, to be closed when the connection is lost; None with TLS."""
    shared = transport.get_extra_info("socket")
    if shared is None or transport.get_extra_info("sslcontext") is not None:
        return None
    own = socket.socket(fileno=os.dup(shared.fileno()))
    own.setblocking(False)
    return own


def writer(transport: asyncio.Transport, own: socket.socket) -> Callable[[bytes], None]:
    """Sends at once what the kernel takes; the transport the rest, and what comes before that has gone."""
    send, waiting = own.send, transport.get_write_buffer_size

    def write(data: bytes) -> None:
        if not waiting():
            try:
                sent = send(data)
            except OSError:  # no room: the transport waits for it; a lost connection: the transport tells
                sent = 0
            if sent == len(data):
                return
            data = data[sent:]
        transport.write(data)

    return write


def delay_acknowledgements(own: socket.socket) -> None:
    """Let the kernel acknowledge every second piece, not each as it is read: half the packets this way.

    Linux leaves this mode by itself when the peer is slow, so it is asked for with every answer.
    """
    if own.family in (socket.AF_INET, socket.AF_INET6):
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)


class Readers:
    """Sockets of which each is reported by a call when bytes, the end or an error are there to be read.

    A report comes once for all that is there: its taker reads until there is less than it asked for.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._ready: dict[int, Callable[[], None]] = {}
        self._epoll: select.epoll | None = None

    def add(self, own: socket.socket, ready: Callable[[], None]) -> None:
        """Report `own` by `ready()`; soon, when there is something already."""
        if self._epoll is None:
            self._epoll = select.epoll()
            self._loop.add_reader(self._epoll.fileno(), self._report)
        self._ready[own.fileno()] = ready
        self._epoll.register(own, _EDGE)

    def remove(self, own: socket.socket) -> None:
        """Report it no more."""
        if self._epoll is not None and self._ready.pop(own.fileno(), None) is not None:
            self._epoll.unregister(own)

    def close(self) -> None:
        """Report nothing any more."""
        self._ready.clear()
        if self._epoll is not None:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None

    def _report(self) -> None:
        assert self._epoll is not None
        ready_of = self._ready.get
        for fd, _ in self._epoll.poll(0):
            ready = ready_of(fd)
            if ready is None:
                continue
            try:
                ready()
            except Exception:  # one socket's taker must not lose what was reported of the others
                logger.exception("reader.failed fd=%d", fd)
