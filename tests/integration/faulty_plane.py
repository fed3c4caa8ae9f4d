"""A bad event plane: what is published goes on dropped, delayed, doubled and out of order."""

from __future__ import annotations

import asyncio
from collections import Counter
from random import Random
from typing import cast

import msgspec

from dynctl.transport.event_plane import Publisher, Subscriber
from dynctl.transport.keys import Keys

LATE_S = 0.05


class FaultyPlane:
    """Stands between publishers and who listens to them, with the deployment's keys. `counts`: what it did.

    While `faults` is 0 all goes on at once and once; that part of the messages is dropped, and as many are
    doubled, and twice as many come up to LATE_S late, others overtaking them.
    """

    def __init__(self, keys: Keys, seed: int, faults: float) -> None:
        self.faults = faults
        self.counts: Counter[str] = Counter()
        self._keys = keys
        self._rng = Random(seed)
        self._ways: list[tuple[Subscriber, Publisher]] = []
        self._loop = asyncio.get_running_loop()

    def through(self, endpoint: str) -> str:
        """Where to listen for what is published at `endpoint`."""
        publisher = Publisher(self._keys, "tcp://127.0.0.1:0")
        bound = publisher.start()

        def receive(topic: bytes, body: bytes) -> None:
            self._pass_on(publisher, topic, cast(msgspec.Struct, msgspec.Raw(body)))

        subscriber = Subscriber(self._keys, receive)
        subscriber.connect(endpoint)
        self._ways.append((subscriber, publisher))
        return bound

    def close(self) -> None:
        """Pass nothing on any more."""
        for subscriber, publisher in self._ways:
            subscriber.close()
            publisher.close()

    def _pass_on(self, publisher: Publisher, topic: bytes, body: msgspec.Struct) -> None:
        self.counts["came"] += 1
        if self._rng.random() < self.faults:
            self.counts["dropped"] += 1
            return
        times = 1 + (self._rng.random() < self.faults)
        self.counts["doubled"] += times - 1
        for _ in range(times):
            if self._rng.random() < 2 * self.faults:
                self.counts["late"] += 1
                self._loop.call_later(self._rng.uniform(0, LATE_S), publisher.publish, topic, body)
            else:
                publisher.publish(topic, body)
