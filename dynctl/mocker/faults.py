"""Switches that make the mocker fail on purpose, set by flags and by `POST /mock/faults`."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import msgspec

from dynctl.errors import RequestError


class FaultPatch(msgspec.Struct, forbid_unknown_fields=True):
    """What can be switched while running; what is left out stays as it is."""

    crash_after_tokens: int | msgspec.UnsetType = msgspec.UNSET
    hang: bool | msgspec.UnsetType = msgspec.UNSET
    refuse: bool | msgspec.UnsetType = msgspec.UNSET
    refuse_adapters: bool | msgspec.UnsetType = msgspec.UNSET
    event_loss: float | msgspec.UnsetType = msgspec.UNSET


@dataclass(slots=True)
class Faults:
    """`crash_after_tokens` counts output tokens of all ranks from when it is set; 0 = never.

    `hang`: requests are accepted and not answered; health checks go on. `refuse`: 503. `refuse_adapters`: no
    LoRA adapter is loaded. `event_loss`: part of the KV event batches, 0..1, that take a number but are not
    sent live; a replay still has them.
    """

    crash_after_tokens: int = 0
    hang: bool = False
    refuse: bool = False
    refuse_adapters: bool = False
    event_loss: float = 0.0
    lost_batches: int = 0
    _random: Random = field(default_factory=lambda: Random(0))
    _tokens: int = 0

    def patch(self, body: bytes) -> None:
        """Apply a JSON FaultPatch. Raises RequestError for anything else, and then changes nothing."""
        try:
            patch = msgspec.json.decode(body, type=FaultPatch)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            fields = ", ".join(FaultPatch.__struct_fields__)
            raise RequestError(f"no such faults: {error}", hint=f"an object of {fields}") from error
        for name in FaultPatch.__struct_fields__:
            value = getattr(patch, name)
            if value is not msgspec.UNSET:
                setattr(self, name, value)
        if patch.crash_after_tokens is not msgspec.UNSET:
            self._tokens = 0

    def loses(self, _number: int) -> bool:
        """Whether the next batch of events is lost on the way."""
        lost = self.event_loss > 0 and self._random.random() < self.event_loss
        self.lost_batches += lost
        return lost

    def crashes(self, tokens: int) -> bool:
        """Whether the process is to crash after `tokens` more output tokens."""
        self._tokens += tokens
        return 0 < self.crash_after_tokens <= self._tokens

    def shown(self) -> bytes:
        """The switches as JSON."""
        return msgspec.json.encode({name: getattr(self, name) for name in FaultPatch.__struct_fields__})
