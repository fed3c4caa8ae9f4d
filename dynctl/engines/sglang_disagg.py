"""SGLang's prefill/decode request contract. Pure.

Both legs get the same body at the same time, tied by a room at prefill's bootstrap server; decode's answer is
the client's, prefill's is read and dropped. Contract: sglang/srt/disaggregation.
"""

from __future__ import annotations

from math import inf
from typing import Literal
from urllib.parse import urlsplit

from dynctl.engines.base import Handoff, Json
from dynctl.errors import EngineFailed

LINK_FIELDS = frozenset(
    {
        "bootstrap_host",
        "bootstrap_port",
        "bootstrap_room",
        "bootstrap_pair_key",
        "decode_tp_size",
        "disagg_prefill_dp_rank",
    }
)
_LARGEST_ROOM = 2**63 - 1


class BootstrapRoom:
    """Prefill pushes the KV cache to the decode worker that comes to the same room."""

    order: Literal["prefill_first", "concurrent"] = "concurrent"

    def splits(self, request: Json) -> bool:
        """Always: decode takes no request without a room; a batch of n uses n rooms from the one given."""
        return True

    def link(self, prefill_url: str, bootstrap_port: int, room: int) -> Json:
        """Prefill's bootstrap server and the room, which no other request may use."""
        host = urlsplit(prefill_url).hostname
        if not host or not 0 < bootstrap_port < 65536 or not 0 < room <= _LARGEST_ROOM:
            raise EngineFailed(
                f"no bootstrap address from {prefill_url!r}, port {bootstrap_port}, room {room}",
                hint="prefill workers of SGLang need a bootstrap port, rooms are 1 to 2**63 - 1",
            )
        return {"bootstrap_host": host, "bootstrap_port": bootstrap_port, "bootstrap_room": room}

    def prefill_body(self, request: Json, link: Json) -> Json:
        """The request as it is, with the room: prefill stops by itself after its token."""
        return _linked(request, link)

    def handoff(self, answer: Json, now_s: float) -> Handoff:
        """Nothing to hand over; an error of the prefill leg is the request's, its sibling must be cut."""
        if "error" in answer or answer.get("object") == "error":
            raise EngineFailed(f"prefill answered with an error: {str(answer)[:300]}")
        return Handoff(params={}, expires_at_s=inf)

    def decode_body(self, request: Json, handoff: Handoff | None, link: Json) -> Json:
        """The request as it is, with the room."""
        return _linked(request, link)


def _linked(request: Json, link: Json) -> Json:
    return {key: value for key, value in request.items() if key not in LINK_FIELDS} | link
