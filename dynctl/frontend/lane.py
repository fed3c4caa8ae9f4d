"""What each token of a stream takes on its way to the client: in Python, or compiled where that is there."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Protocol, cast

from dynctl.native import load
from dynctl.observability.metrics import Histogram

Feed = Callable[[bytes], None]
_DATA = b"data: "


class Client(Protocol):
    """Where the bytes go; `write` may become another one at any time."""

    write: Feed


class Lane(Protocol):
    """`feed` passes on a piece that ends with `usual`; all others are left to `unusual`.

    What was passed on is in `pieces`; `fold` is called when they are `full`. `events` counts what looks like
    a token, `last_s` is when the last one came (monotonic clock).
    """

    usual: bytes
    pieces: list[bytes] | deque[bytes]
    events: int
    last_s: float

    @property
    def feed(self) -> Feed: ...


def lane(
    client: Client, itl: Histogram, unusual: Feed, fold: Callable[[], None], full: int, usual: bytes
) -> Lane:
    """A lane to `client` that observes the time between tokens in `itl`, in seconds."""
    if load.compiled is not None:
        return cast(Lane, load.compiled.Lane(client, itl, unusual, fold, full, usual))
    return PythonLane(client, itl, unusual, fold, full, usual)


class PythonLane:
    """Per piece: a look, a write, a count, a clock."""

    __slots__ = ("_client", "_fold", "_full", "_itl", "_unusual", "events", "last_s", "pieces", "usual")

    def __init__(
        self, client: Client, itl: Histogram, unusual: Feed, fold: Callable[[], None], full: int, usual: bytes
    ) -> None:
        self._client = client
        self._itl = itl
        self._unusual = unusual
        self._fold = fold
        self._full = full
        self.usual = usual
        self.pieces: list[bytes] | deque[bytes] = []
        self.events = 0
        self.last_s = 0.0

    def feed(self, data: bytes) -> None:
        """Take what came."""
        if not data.endswith(self.usual):
            self._unusual(data)
            return
        self._client.write(data)
        now_s = monotonic()
        events = data.count(_DATA)
        if events:
            self.events += events
            waited_s, itl = now_s - self.last_s, self._itl
            # `itl.observe`, without a call for each token.
            itl.counts[bisect_left(itl.bounds, waited_s / events)] += events
            itl.total += waited_s
            self.last_s = now_s
        pieces = self.pieces
        pieces.append(data)
        if len(pieces) == self._full:
            self._fold()
