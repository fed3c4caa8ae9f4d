"""Bytes of a body as its socket gives them, past the transport: in Python, or compiled where it can be."""

from __future__ import annotations

import socket

from dynctl.http.direct import READ_BYTES
from dynctl.native import load
from dynctl.native.load import Feed, Taker, Tap


def tap(own: socket.socket, taker: Taker) -> Tap:
    """A tap of `own`, which is non-blocking; it takes nothing before `begin`."""
    if load.compiled is not None:
        return load.compiled.Tap(own.fileno, taker)
    return PythonTap(own, taker)


class PythonTap:
    """`readable` takes what is there, while `active`, and hands it to `taker`.

    The compiled one hands whole chunks to `feed` without the taker's knowledge, and sets `heard` for it.
    """

    __slots__ = ("_own", "_taker", "active", "feed", "heard")

    def __init__(self, own: socket.socket, taker: Taker) -> None:
        self._own = own
        self._taker = taker
        self.feed: Feed | None = None
        self.active = self.heard = False

    def begin(self, feed: Feed | None) -> None:
        """A body is to be read; its bytes go to `feed`."""
        self.feed = feed
        self.active = True

    def readable(self) -> None:
        """Take what is there. What the taker raises is told to it, and raised."""
        receive, taker = self._own.recv, self._taker
        while self.active:
            try:
                data = receive(READ_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                taker.reading_failed(error)
                return
            if not data:
                taker.reading_ended()
                return
            try:
                taker.body_received(data)
            except Exception as error:
                taker.taking_failed(error)
                raise
            if len(data) < READ_BYTES:
                return
