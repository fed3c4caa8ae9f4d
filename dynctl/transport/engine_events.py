"""An engine's own KV event publisher, both ends: plain ZeroMQ as vLLM and SGLang speak it.

Frames: live (PUB) topic · number (8 bytes big-endian) · payload; replay request (DEALER to ROUTER) empty ·
first number; each answer empty · topic · number · payload; its end empty · empty · -1 · empty.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import zmq

from dynctl.errors import DynctlError
from dynctl.transport.engine_order import Action, AskReplay, Deliver, EngineOrder
from dynctl.transport.sockets import Channel, Frames, Socket, bind, connect, plain_socket

logger = logging.getLogger(__name__)

_END = (-1).to_bytes(8, "big", signed=True)


@dataclass(frozen=True, slots=True)
class EngineEventSource:
    """Where one rank's publisher is. `replay` "" = it has no replay socket. `topic` is a prefix.

    `replay_deadline_s` bounds the silence within a replay; a publisher that was quiet for `check_s` is asked
    whether something was missed.
    """

    endpoint: str
    replay: str = ""
    topic: str = ""
    replay_deadline_s: float = 5.0
    check_s: float = 2.0


class EngineSubscriber:
    """Hands every batch of one publisher to `on_batch(number, payload)`, in order and once.

    `on_reset(reason)` comes before the first batch that does not follow on what was handed over before:
    batches were lost for good, or the publisher began anew. `first`: the batch to begin with. Make and use it
    inside a running loop.
    """

    def __init__(
        self,
        source: EngineEventSource,
        on_batch: Callable[[int, bytes], None],
        on_reset: Callable[[str], None],
        first: int = 0,
    ) -> None:
        self._source = source
        self._on_batch = on_batch
        self._on_reset = on_reset
        self._order = EngineOrder(can_replay=bool(source.replay))
        self._order.next = first
        self._live: Channel | None = None
        self._replay: Channel | None = None
        self._replay_ended = True
        self._heard_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def expected(self) -> int:
        """The number of the batch that comes next."""
        return self._order.next

    def start(self) -> None:
        """Subscribe, then ask for all the publisher still has."""
        socket = plain_socket(zmq.SUB)
        socket.setsockopt(zmq.SUBSCRIBE, self._source.topic.encode("utf-8"))
        try:
            connect(socket, self._source.endpoint)
        except DynctlError:
            socket.close(linger=0)
            raise
        self._live = Channel(socket, self._receive_live)
        self._heard_at = asyncio.get_running_loop().time()
        self._act(self._order.start())
        self._watch_silence()

    def close(self) -> None:
        """Stop listening."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for channel in (self._live, self._replay):
            if channel is not None:
                channel.close()
        self._live = self._replay = None

    def _receive_live(self, frames: Frames) -> None:
        seq = _number(frames, 3)
        if seq is None or seq < 0:
            logger.warning("engine_events.malformed from=%s frames=%d", self._source.endpoint, len(frames))
            return
        if not self._order.replaying:
            self._heard_at = asyncio.get_running_loop().time()
        self._act(self._order.live(seq, frames[-1]))

    def _receive_replayed(self, frames: Frames) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        seq = _number(frames, 3)
        if seq is None:
            logger.warning("engine_events.malformed from=%s frames=%d", self._source.replay, len(frames))
        elif seq < 0:
            self._replay_ended = True
            self._act(self._order.replay_ended())
        else:
            self._act(self._order.replayed(seq, frames[-1]))

    def _act(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Deliver):
                self._on_batch(action.seq, action.payload)
            elif isinstance(action, AskReplay):
                self._ask(action.start)
            else:
                logger.warning("engine_events.reset from=%s reason=%s", self._source.endpoint, action.reason)
                self._on_reset(action.reason)

    def _ask(self, start: int) -> None:
        """Ask on a new socket if the replay before did not end: what is left of it must not come through."""
        if self._replay is not None and not self._replay_ended:
            self._replay.close()
            self._replay = None
        if self._replay is None:
            socket = plain_socket(zmq.DEALER)
            connect(socket, self._source.replay)
            self._replay = Channel(socket, self._receive_replayed)
        self._replay_ended = False
        self._heard_at = asyncio.get_running_loop().time()
        self._replay.send([b"", start.to_bytes(8, "big")])
        logger.debug("engine_events.replay from=%s start=%d", self._source.replay, start)

    def _watch_silence(self) -> None:
        """Once it has been quiet for too long: give the replay up, or ask whether something was missed."""
        if self._live is None:
            return
        loop = asyncio.get_running_loop()
        if self._silence_ends() <= loop.time():
            self._heard_at = loop.time()
            if self._order.replaying:
                logger.warning("engine_events.replay_late from=%s", self._source.replay)
                self._act(self._order.replay_failed())
            else:
                self._act(self._order.start())
        wake_at = min(self._silence_ends(), loop.time() + self._source.check_s)
        self._timer = loop.call_at(wake_at, self._watch_silence)

    def _silence_ends(self) -> float:
        limit = self._source.replay_deadline_s if self._order.replaying else self._source.check_s
        return self._heard_at + limit


class EnginePublisher:
    """An engine's side of it: numbers and publishes payloads, and answers replays from the last ones kept.

    `drop(number)` true keeps a batch off the live socket, as a full queue would. Use inside a running loop.
    """

    def __init__(
        self,
        source: EngineEventSource,
        *,
        buffer_steps: int = 10_000,
        drop: Callable[[int], bool] | None = None,
    ) -> None:
        self._source = source
        self._topic = source.topic.encode("utf-8")
        self._drop = drop
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=buffer_steps)
        self._next = 0
        self._live: Socket | None = None
        self._replay: Channel | None = None

    def start(self) -> tuple[str, str]:
        """Bind; returns the live and the replay endpoint ("" = none) with real ports. Raises PortInUse."""
        live = plain_socket(zmq.PUB)
        bound = bind(live, self._source.endpoint)
        self._live = live
        if not self._source.replay:
            return bound, ""
        socket = plain_socket(zmq.ROUTER)
        try:
            replay_bound = bind(socket, self._source.replay)
        except DynctlError:
            self.close()
            raise
        self._replay = Channel(socket, self._answer)
        return bound, replay_bound

    def publish(self, payload: bytes) -> int:
        """Send the next batch; returns its number."""
        seq = self._next
        self._next += 1
        self._kept.append((seq, payload))
        if self._live is not None and not (self._drop is not None and self._drop(seq)):
            self._live.send_multipart((self._topic, seq.to_bytes(8, "big"), payload), zmq.NOBLOCK)
        return seq

    def close(self) -> None:
        """Stop publishing and answering."""
        if self._live is not None:
            self._live.close(linger=0)
            self._live = None
        if self._replay is not None:
            self._replay.close()
            self._replay = None

    def _answer(self, frames: Frames) -> None:
        start = _number([*frames, b""], 4) if len(frames) == 3 else None
        if start is None or self._replay is None:
            logger.warning("replay.malformed frames=%d", len(frames))
            return
        sender = frames[0]
        for seq, payload in self._kept:
            if seq >= start:
                self._replay.send([sender, b"", self._topic, seq.to_bytes(8, "big"), payload])
        self._replay.send([sender, b"", b"", _END, b""])


def _number(frames: Frames, least: int) -> int | None:
    """The signed 8-byte number in the last frame but one; None when the frames are not of that shape."""
    if len(frames) < least or len(frames[-2]) != 8:
        return None
    return int.from_bytes(frames[-2], "big", signed=True)
