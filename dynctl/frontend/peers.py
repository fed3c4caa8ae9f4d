"""Several frontends: each publishes what it has in flight and listens to the others.

`router.peers` knows what to say and what to make of what is heard; here are the socket and the clock.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from dynctl.protocol.inflight import INFLIGHT_TOPIC, Inflight
from dynctl.protocol.instances import Instance
from dynctl.protocol.registry import Member
from dynctl.protocol.specs import FrontendSpec
from dynctl.router.peers import Peers
from dynctl.transport.event_plane import Publisher, Subscriber
from dynctl.transport.keys import Keys

logger = logging.getLogger(__name__)

CHANGES_S = 0.04
"""Between two messages with changes, at least, for each peer: a request after a pause is told at once, a
storm of them in batches. So what hearing the peers costs is bounded, however many they and the requests are
(tests/perf/frontends_cpu.py)."""
CHANGES_LIMIT_S = 0.25
WHOLE_S = 1.0
GREETING_S = 0.1
"""Until a frontend that has just come is told all: it needs that long to listen."""


class PeerTalk:
    """One frontend's part in the talk. Make it inside a running loop; `subscriber` stays the caller's.

    A peer's messages must be handed to `Peers.take` by whoever reads `subscriber`.
    """

    def __init__(
        self, keys: Keys, spec: FrontendSpec, incarnation: int, peers: Peers, subscriber: Subscriber
    ) -> None:
        self._me = (spec.id, incarnation)
        address = f"[{spec.address}]" if ":" in spec.address else spec.address
        self._publisher = Publisher(keys, f"tcp://{address}:{spec.events_port}")
        self._peers = peers
        self._subscriber = subscriber
        self._others: dict[str, Instance] = {}
        self._loop = asyncio.get_running_loop()
        self._sent_at = 0.0
        self._gap_s = CHANGES_S
        self._flushing: asyncio.TimerHandle | None = None
        self._beating: asyncio.TimerHandle | None = None

    def start(self) -> str:
        """Publish from now on; where. Raises PortInUse."""
        endpoint = self._publisher.start()
        self._peers.begin(*self._me, self._wake)
        self._beat()
        return endpoint

    def members_changed(self, members: Iterable[Member]) -> None:
        """Take over the membership: listen to all other frontends."""
        now = {
            member.instance.id: member.instance
            for member in members
            if member.instance.role == "frontend"
            and member.instance.events
            and member.instance.id != self._me[0]
        }
        dialled = {instance.events for instance in now.values()}
        for gone in {instance.events for instance in self._others.values()} - dialled:
            self._subscriber.disconnect(gone)
        for endpoint in dialled:
            self._subscriber.connect(endpoint)
        if not now.keys() <= self._others.keys():
            self._beat_in(GREETING_S)
        self._others = now
        self._gap_s = min(CHANGES_LIMIT_S, CHANGES_S * max(1, len(now)))
        self._peers.expect(now)

    def close(self) -> None:
        """Say no more. What peers have told stays as it is."""
        for timer in (self._flushing, self._beating):
            if timer is not None:
                timer.cancel()
        self._publisher.close()

    def _wake(self) -> None:
        if self._flushing is None:
            wait_s = self._sent_at + self._gap_s - self._loop.time()
            self._flushing = self._loop.call_later(max(0.0, wait_s), self._flush)

    def _flush(self) -> None:
        self._flushing = None
        changes = self._peers.changes()
        if changes is not None:
            self._publish(changes)

    def _beat(self) -> None:
        """All there is, now and every second; and whoever was not heard of for long is forgotten."""
        self._beat_in(WHOLE_S)
        self._publish(self._peers.whole())
        for silent in self._peers.expire(self._loop.time()):
            logger.warning("peer.silent id=%s: its requests are not counted any more", silent)

    def _beat_in(self, seconds: float) -> None:
        if self._beating is not None:
            self._beating.cancel()
        self._beating = self._loop.call_later(seconds, self._beat)

    def _publish(self, message: Inflight) -> None:
        self._sent_at = self._loop.time()
        self._publisher.publish(INFLIGHT_TOPIC, message)
