"""What each frontend has in flight at each worker, told to the other frontends over the event plane."""

from __future__ import annotations

import msgspec

from dynctl.protocol.specs import BusySpec

INFLIGHT_TOPIC = b"inflight"


class WorkerInflight(msgspec.Struct, frozen=True, array_like=True):
    """One frontend's part of the load of one (worker, incarnation, rank), as it is now: no difference.

    `waiting` of the `requests` have had no token yet, and need `prefill_tokens` of prompt computed; `blocks`
    of KV cache are held.
    """

    worker: str
    incarnation: int
    rank: int
    requests: int
    waiting: int
    prefill_tokens: int
    blocks: int


class BusyChange(msgspec.Struct, frozen=True, array_like=True):
    """Thresholds that were set while running, at `since_s` (Unix time): the latest is what holds for all."""

    since_s: float
    busy: BusySpec


class Inflight(msgspec.Struct, frozen=True, array_like=True):
    """One numbered message of one frontend; `seq` rises by one per (frontend, incarnation), from 0.

    Each entry replaces what was told of the same (worker, incarnation, rank) by a lower number. `whole`: what
    has no entry has nothing in flight. A message that is lost is made good by the next whole one. `busy`: the
    latest change of thresholds this frontend knows of.
    """

    frontend: str
    incarnation: int
    seq: int
    whole: bool
    entries: list[WorkerInflight]
    busy: BusyChange | None = None
