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

from dynctl.native import load

logger = logging.getLogger(__name__)

READ_BYTES: Final = 64 * 1024
BUSY_READS: Final = 20.0
"""So many reads in `rest_s` are worth a rest: fewer, and looking in vain costs more than it saves."""
_RATE_S: Final = 0.05
_EDGE: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
_ENDED: Final = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR


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
    if load.compiled is not None:
        return load.compiled.Writer(own.fileno, transport.get_write_buffer_size, transport.write).write
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

    A report comes once for all that is there: its taker reads until there is less than it asked for. An end
    that came with the last bytes is not seen by that, so it is reported by a second call. While
    there are more than `BUSY_READS` in `rest_s` seconds, all are looked at that often instead of each at
    once: what came meanwhile is read together. 0 = never.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.rest_s = 0.0
        self._ready: dict[int, Callable[[], None]] = {}
        self._epoll: select.epoll | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._reads = 0
        self._since = 0.0

    @property
    def resting(self) -> bool:
        """Whether it looks from time to time only."""
        return self._timer is not None

    def add(self, own: socket.socket, ready: Callable[[], None]) -> None:
        """Report `own` by `ready()`; soon, when there is something already."""
        if self._epoll is None:
            self._epoll = select.epoll()
            self._loop.add_reader(self._epoll.fileno(), self._at_once)
        self._ready[own.fileno()] = ready
        self._epoll.register(own, _EDGE)

    def remove(self, own: socket.socket) -> None:
        """Report it no more."""
        if self._epoll is not None and self._ready.pop(own.fileno(), None) is not None:
            self._epoll.unregister(own)

    def close(self) -> None:
        """Report nothing any more."""
        self._ready.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._epoll is not None:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None

    def _at_once(self) -> None:
        self._report()
        if self.rest_s and self._epoll is not None and self._rate() * self.rest_s > BUSY_READS:
            self._loop.remove_reader(self._epoll.fileno())
            self._timer = self._loop.call_later(self.rest_s, self._rested)

    def _rested(self) -> None:
        self._timer = None
        self._report()
        if self._epoll is None:
            return
        if self._rate() * self.rest_s < BUSY_READS / 4:
            self._loop.add_reader(self._epoll.fileno(), self._at_once)
        else:
            self._timer = self._loop.call_later(self.rest_s, self._rested)

    def _rate(self) -> float:
        """Reads a second, over the last `_RATE_S`; before that has passed, neither much nor little."""
        now = self._loop.time()
        passed = now - self._since
        if passed < _RATE_S:
            return BUSY_READS / (self.rest_s or 1.0)
        rate = self._reads / passed
        self._since, self._reads = now, 0
        return rate

    def _report(self) -> None:
        assert self._epoll is not None
        ready_of = self._ready.get
        reported = self._epoll.poll(0)
        self._reads += len(reported)
        ended = [fd for fd, events in reported if events & _ENDED]
        for fd in [*(fd for fd, _ in reported), *ended]:
            ready = ready_of(fd)
            if ready is None:
                continue
            try:
                ready()
            except Exception:  # one socket's taker must not lose what was reported of the others
                logger.exception("reader.failed fd=%d", fd)
