"""Spans on their way to an OpenTelemetry collector: in batches, by a task of their own, never waited for."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Final

from dynctl.errors import TransportError
from dynctl.http.client import Client, Origin
from dynctl.observability.metrics import Metrics
from dynctl.observability.otlp import PATH, encode
from dynctl.observability.tracing import SpanData
from dynctl.protocol.specs import FrontendSpec

logger = logging.getLogger(__name__)

BATCH: Final = 512
WAITING: Final = 8192
INTERVAL_S: Final = 1.0
SEND_S: Final = 10.0


def exporter(spec: FrontendSpec, metrics: Metrics) -> Exporter | None:
    """What the spec asks for; None: spans are not recorded."""
    return Exporter(spec.tracing.otlp_endpoint, spec.id, metrics) if spec.tracing.otlp_endpoint else None


class Exporter:
    """Sends the spans it is given to `endpoint` ("http://host:4318"). `close` sends what is left.

    At most `WAITING` spans wait; those beyond are dropped, and so is a batch that cannot be sent. Both are
    counted: a collector that is gone costs no request anything.
    """

    def __init__(self, endpoint: str, process: str, metrics: Metrics, interval_s: float = INTERVAL_S) -> None:
        self._origin = Origin.parse(endpoint)
        self._resource = {"service.name": "dynctl-frontend", "service.instance.id": process}
        self._interval_s = interval_s
        self._sent = metrics.counter("trace_spans_total", outcome="sent")
        self._dropped = metrics.counter("trace_spans_total", outcome="dropped")
        self._waiting: list[SpanData] = []
        self._client = Client(max_idle=1)
        self._failing = False
        self._task = asyncio.create_task(self._run(), name="trace.export")

    def record(self, span: SpanData) -> None:
        """Take an ended span."""
        if len(self._waiting) < WAITING:
            self._waiting.append(span)
        else:
            self._dropped.inc()

    async def close(self) -> None:
        """Send what is left, once, and end."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await self._send_all()
        await self._client.close()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            await self._send_all()

    async def _send_all(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:BATCH], self._waiting[BATCH:]
            if not await self._send(batch):
                return

    async def _send(self, batch: list[SpanData]) -> bool:
        headers = [(b"content-type", b"application/json")]
        try:
            body = encode(batch, self._resource)
            answer = await self._client.request(
                self._origin, "POST", PATH, headers=headers, body=body, timeout_s=SEND_S
            )
            why = "" if answer.status < 300 else f"status {answer.status}"
        except TransportError as error:
            why = str(error)
        (self._dropped if why else self._sent).inc(len(batch))
        if bool(why) != self._failing:
            self._failing = bool(why)
            if why:
                logger.warning("trace.unsent collector=%s why=%s", self._origin, why)
            else:
                logger.info("trace.sent_again collector=%s", self._origin)
        return not why
