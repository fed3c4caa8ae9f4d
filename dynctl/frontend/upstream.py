"""HTTP to engines: every failure of a hop becomes one AttemptFailed that says who is to blame.

A worker that fails is left alone for a while (see `circuit`), before membership knows of it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from math import inf

import msgspec

from dynctl.engines.base import Abort
from dynctl.errors import (
    DeadlineExceeded,
    DynctlError,
    EngineFailed,
    Overloaded,
    PeerLost,
    Rejected,
    TransportError,
)
from dynctl.frontend.circuit import Circuits
from dynctl.frontend.retry import AttemptFailed
from dynctl.frontend.series import Stages
from dynctl.http.client import Client, Origin, Response, Stream, Timeouts
from dynctl.observability.metrics import Metrics
from dynctl.observability.tracing import UNRECORDED, Span
from dynctl.protocol.instances import Instance
from dynctl.protocol.specs import LimitsSpec
from dynctl.router.request import Choice

logger = logging.getLogger(__name__)

CONNECT_S = 5.0
_ABORT_AGAIN_S = 0.25
_BUSY = (429, 503)
_EXCERPT_BYTES = 300
_ANSWER_BYTES = 64 * 1024 * 1024

Headers = Sequence[tuple[bytes, bytes]]


class Leg(msgspec.Struct, frozen=True):
    """One request to one engine, of a call that ends at `ends_s` (monotonic): no hop waits beyond that.

    Whoever sends it ends `span`. `once`: its transfer parameters must not reach the engine a second time.
    """

    choice: Choice
    path: str
    headers: Headers
    body: bytes
    ends_s: float = inf
    span: Span = UNRECORDED
    once: bool = False

    @property
    def worker(self) -> str:
        """The worker's id."""
        return self.choice.instance.id

    def all_headers(self) -> list[tuple[bytes, bytes]]:
        """The client's headers that are passed on, and the rank where the engine has several."""
        headers = list(self.headers)
        if not any(name == b"content-type" for name, _ in headers):
            headers.append((b"content-type", b"application/json"))
        if self.choice.instance.dp_size > 1:
            headers.append((b"x-data-parallel-rank", b"%d" % self.choice.rank))
        return headers


class Upstream:
    """Sends legs. Answers with a status below 500, 429 apart, are answers; all else is a failure."""

    def __init__(self, client: Client, limits: LimitsSpec, metrics: Metrics) -> None:
        self._client = client
        self._metrics = metrics
        self._answer_s = limits.request_timeout_s
        self._first_byte_s = limits.first_byte_timeout_s
        self._timeouts = Timeouts(
            connect_s=CONNECT_S, first_byte_s=limits.first_byte_timeout_s, stall_s=limits.stall_timeout_s
        )
        self._origins: dict[str, Origin] = {}
        self._aborts: set[asyncio.Task[None]] = set()
        self._patience_s = min(limits.first_byte_timeout_s, limits.stall_timeout_s)
        self.circuits = Circuits()
        self._stages = Stages(metrics)

    def shunned(self) -> frozenset[str]:
        """Workers that are left alone just now."""
        return self.circuits.avoided(time.monotonic())

    async def whole(self, leg: Leg, *, prefill: bool = False) -> Response:
        """Send, and read the answer to its end. A prefill has the first-byte deadline for it."""
        limit_s = min(self._first_byte_s if prefill else self._answer_s, _left(leg))
        timeouts = Timeouts(connect_s=min(CONNECT_S, limit_s), first_byte_s=limit_s, stall_s=limit_s)
        try:
            with leg.span:
                async with asyncio.timeout(limit_s):
                    stream = await self._send(leg, timeouts)
                    body = await stream.read(_ANSWER_BYTES)
        except TimeoutError as error:
            late = DeadlineExceeded(f"{leg.path} was not answered in {limit_s:g} s", where=leg.worker)
            raise self.failed(leg, late) from error
        except (PeerLost, DeadlineExceeded) as error:
            raise self.failed(leg, error) from error
        self._check(leg, stream.status, body)
        self.circuits.answered(leg.worker, time.monotonic())
        return Response(stream.status, stream.headers, body)

    async def open(self, leg: Leg) -> Stream:
        """Send, and wait for the head of a streamed answer."""
        try:
            stream = await self._send(leg, self._within(_left(leg)))
            if stream.status in _BUSY or stream.status >= 500:
                self._check(leg, stream.status, await stream.read(_ANSWER_BYTES))
            self.circuits.answered(leg.worker, time.monotonic())
        except (PeerLost, DeadlineExceeded) as error:
            raise self.failed(leg, error) from error
        return stream

    def lost(self, instance: Instance, why: str, *, spare_living: bool = False) -> None:
        """A worker is known to be gone: its legs fail at once; `spare_living`: but for those that speak."""
        origin = self._origins.get(instance.url)
        if origin is not None:
            self._client.lost(origin, f"the worker {why}", spare_living=spare_living)

    def abort(self, leg: Leg, ways: Sequence[Abort]) -> None:
        """Have the engine end a request that nobody waits for, by its own means, in the background."""
        for way in ways:
            task = asyncio.get_running_loop().create_task(self._abort(leg, way), name="abort")
            self._aborts.add(task)
            task.add_done_callback(self._aborts.discard)

    async def close(self) -> None:
        """Give up aborts that are still under way."""
        for task in self._aborts:
            task.cancel()
        await asyncio.gather(*self._aborts, return_exceptions=True)

    async def _abort(self, leg: Leg, way: Abort) -> None:
        """Twice: an engine ignores the name of a request that it has not read yet."""
        await self._abort_once(leg, way)
        await asyncio.sleep(_ABORT_AGAIN_S)
        await self._abort_once(leg, way)

    async def _abort_once(self, leg: Leg, way: Abort) -> None:
        headers = [*leg.headers, (b"content-type", b"application/json")]
        try:
            await self._client.request(
                self._origin(leg),
                "POST",
                way.path,
                headers=headers,
                body=msgspec.json.encode(way.body),
                timeout_s=CONNECT_S,
            )
        except TransportError as error:
            logger.warning("abort.failed worker=%s why=%s", leg.worker, error)

    def _within(self, left_s: float) -> Timeouts:
        """The deadlines of a streamed hop, none of them beyond the request's own."""
        most = self._timeouts
        if left_s >= most.first_byte_s and left_s >= most.stall_s:
            return most
        return Timeouts(
            connect_s=min(most.connect_s, left_s),
            first_byte_s=min(most.first_byte_s, left_s),
            stall_s=min(most.stall_s, left_s),
        )

    async def _send(self, leg: Leg, timeouts: Timeouts) -> Stream:
        origin = self._origin(leg)
        headers = leg.all_headers()
        self.circuits.sent(leg.worker, time.monotonic())
        with self._stages.enter("dispatch", UNRECORDED, leg.choice.instance.role):
            send = self._client.open_once if leg.once else self._client.open
            return await send(origin, "POST", leg.path, headers=headers, body=leg.body, timeouts=timeouts)

    def failed(self, leg: Leg, error: DynctlError) -> AttemptFailed:
        """Record that `leg` failed, against its worker where it is to blame."""
        self._metrics.counter("upstream_failures_total", worker=leg.worker, reason=error.kind).inc()
        logger.warning("upstream.failed worker=%s path=%s error=%s", leg.worker, leg.path, error)
        if self.circuits.failed(leg.worker, error, time.monotonic(), self._patience_s):
            logger.warning("circuit.opened worker=%s", leg.worker)
        return AttemptFailed(error, failed=frozenset((leg.worker,)))

    def _check(self, leg: Leg, status: int, body: bytes) -> None:
        if status == 429:
            raise self.failed(leg, Overloaded(f"{leg.worker} has too much to do (status 429)"))
        if status == 503:
            raise self.failed(leg, Rejected(f"{leg.worker} takes no requests now (status 503)"))
        if status >= 500:
            told = body[:_EXCERPT_BYTES].decode("utf-8", "replace")
            raise self.failed(leg, EngineFailed(f"the engine answered {status}: {told}"))

    def _origin(self, leg: Leg) -> Origin:
        url = leg.choice.instance.url
        origin = self._origins.get(url)
        if origin is None:
            origin = self._origins[url] = Origin.parse(url)
        return origin


def _left(leg: Leg) -> float:
    """Seconds the call still has; never none, so that a deadline that has just passed shows as one."""
    return max(0.001, leg.ends_s - time.monotonic())
