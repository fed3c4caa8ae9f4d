"""`/busy_threshold`: from where on workers are busy, shown and changed while running, as at NVIDIA Dynamo's.

A change is for all frontends, of which the one that is asked tells the others, and until the last one of them
ends; the recipe is what holds after that.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import msgspec

from dynctl.errors import ModelNotFound, RequestError
from dynctl.frontend.gate import Gate
from dynctl.protocol.specs import BusySpec
from dynctl.router.peers import Peers

logger = logging.getLogger(__name__)


class _Change(msgspec.Struct, forbid_unknown_fields=True):
    """What is left out stays as it is, null takes a threshold away."""

    model: str | None = None
    active_decode_blocks_threshold: float | msgspec.UnsetType | None = msgspec.UNSET
    active_prefill_tokens_threshold: int | msgspec.UnsetType | None = msgspec.UNSET
    active_prefill_tokens_threshold_frac: float | msgspec.UnsetType | None = msgspec.UNSET


_NAMES = {
    "active_decode_blocks_threshold": "decode_blocks",
    "active_prefill_tokens_threshold": "prefill_tokens",
    "active_prefill_tokens_threshold_frac": "prefill_share",
}


class Thresholds:
    """Those of one frontend, which is named in its answers. `peers`: to whom a change is told."""

    def __init__(self, gate: Gate, peers: Peers, model: str, frontend: str) -> None:
        self._gate = gate
        self._peers = peers
        peers.on_busy = self._told
        self._model = model
        self._frontend = frontend

    def shown(self) -> dict[str, Any]:
        """The answer to GET."""
        return {"thresholds": [self._entry()]}

    def change(self, body: bytes) -> dict[str, Any]:
        """The answer to POST. Raises RequestError for what is no change, ModelNotFound."""
        try:
            change = msgspec.json.decode(body, type=_Change)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            fields = ", ".join(("model", *_NAMES))
            raise RequestError(
                f"not a change of thresholds: {error}", hint=f"an object of {fields}"
            ) from error
        if change.model not in (None, self._model):
            raise ModelNotFound(f"The model `{change.model}` does not exist", where="model")
        given = {own: getattr(change, name) for name, own in _NAMES.items()}
        given = {name: value for name, value in given.items() if value is not msgspec.UNSET}
        for name, own in _NAMES.items():
            value = given.get(own)
            if value is not None and (value < 0 or (own == "decode_blocks" and value > 1)):
                valid = "0 to 1" if own == "decode_blocks" else "0 or more"
                raise RequestError(f"`{name}` must be {valid}, not {value}", where=name)
        self._gate.thresholds = msgspec.structs.replace(self._gate.thresholds, **given)
        self._peers.set_busy(self._gate.thresholds, time.time())
        return self._entry()

    def _told(self, thresholds: BusySpec) -> None:
        logger.info("thresholds.changed by=another frontend to=%s", thresholds)
        self._gate.thresholds = thresholds

    def _entry(self) -> dict[str, Any]:
        thresholds: BusySpec = self._gate.thresholds
        values = {name: getattr(thresholds, own) for name, own in _NAMES.items()}
        return {"model": self._model, **values, "frontend": self._frontend}
