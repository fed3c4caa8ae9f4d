"""KV blocks that a prefill engine keeps for a decode engine, under a lease. Pure: `now_s` is passed in.

The contract is vLLM's with NIXL: blocks stay until they were read, or until the lease ends; a sign of life of
the reader prolongs the lease by two thirds. Where the real engine gives wrong text (parameters used twice,
for another prompt, after the lease), this one refuses and counts, so that a caller at fault is caught.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import ClassVar

from dynctl.errors import EngineFailed


class TransferRefused(EngineFailed):
    """A hand-off broke the contract; `reason` is one of REASONS, as the metric labels it."""

    kind: ClassVar[str] = "transfer_refused"

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


REASONS = ("incomplete", "engine", "model", "unknown", "reused", "expired", "prompt", "unreachable")


@dataclass(slots=True)
class Pin:
    """The blocks of one finished prefill. `digest` identifies the prompt's token ids."""

    blocks: list[int]
    tokens: int
    digest: str
    deadline_s: float
    claimed: bool = False


@dataclass(slots=True)
class PinBoard:
    """All pinned prefills of one rank by request id; remembers the last `memory` of those that are gone."""

    lease_s: float
    memory: int = 4096
    expired: int = 0
    _pins: dict[str, Pin] = field(init=False, default_factory=dict)
    _gone: OrderedDict[str, str] = field(init=False, default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self._pins)

    def add(self, request_id: str, pin: Pin) -> None:
        """Keep a prefill's blocks."""
        self._pins[request_id] = pin

    def claim(self, request_id: str, digest: str, now_s: float) -> Pin:
        """Let one reader read. Raises TransferRefused: unknown, expired, reused, prompt."""
        pin = self._pins.get(request_id)
        if pin is None:
            reason = self._gone.get(request_id, "unknown")
            raise TransferRefused(reason, f"KV blocks of {request_id}: {_GONE_TEXT[reason]}")
        if now_s >= pin.deadline_s:
            raise TransferRefused("expired", f"KV blocks of {request_id}: {_GONE_TEXT['expired']}")
        if pin.claimed:
            raise TransferRefused("reused", f"KV blocks of {request_id}: {_GONE_TEXT['reused']}")
        if digest != pin.digest:
            raise TransferRefused("prompt", f"KV blocks of {request_id} belong to another prompt")
        pin.claimed = True
        self._prolong(pin, now_s)
        return pin

    def renew(self, request_id: str, now_s: float) -> bool:
        """A reader's sign of life; False when nothing is kept for it."""
        pin = self._pins.get(request_id)
        if pin is None:
            return False
        self._prolong(pin, now_s)
        return True

    def release(self, request_id: str) -> list[int]:
        """The reader is done or will not come: the blocks to free, [] when they are gone already."""
        pin = self._pins.pop(request_id, None)
        if pin is None:
            return []
        self._forget(request_id, "reused")
        return pin.blocks

    def expire(self, now_s: float) -> list[list[int]]:
        """The blocks of all leases that have ended."""
        ended = [request_id for request_id, pin in self._pins.items() if now_s >= pin.deadline_s]
        for request_id in ended:
            self._forget(request_id, "expired")
        self.expired += len(ended)
        return [self._pins.pop(request_id).blocks for request_id in ended]

    def next_deadline_s(self) -> float | None:
        """When the next lease ends."""
        return min((pin.deadline_s for pin in self._pins.values()), default=None)

    def _prolong(self, pin: Pin, now_s: float) -> None:
        pin.deadline_s = max(pin.deadline_s, now_s + self.lease_s * 2 / 3)

    def _forget(self, request_id: str, how: str) -> None:
        self._gone[request_id] = how
        while len(self._gone) > self.memory:
            self._gone.popitem(last=False)


_GONE_TEXT = {
    "unknown": "this engine never kept any under that id",
    "expired": "the lease has ended and they were freed",
    "reused": "they were pulled already, parameters are good for one use",
}
