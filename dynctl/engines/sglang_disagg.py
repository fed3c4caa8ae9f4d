"""SGLang's prefill/decode request contract. Pure.

Both legs get the same body at the same time, tied by a room at prefill's bootstrap server; decode's answer is
the client's, prefill's is read and dropped. A lost leg is ended by `/abort_request`: a closed connection is
looked at every 4 s only. Contract: sglang/srt/disaggregation, managers/io_struct.py, tokenizer_manager.py.
"""

from __future__ import annotations

from math import inf
from typing import Literal

from dynctl.engines.base import Abort, Handoff, Json, Meeting, Naming
from dynctl.engines.requests import host_of, prompts
from dynctl.errors import EngineFailed, RequestError

LINK_FIELDS = frozenset(
    {
        "bootstrap_host",
        "bootstrap_port",
        "bootstrap_room",
        "bootstrap_pair_key",
        "decode_tp_size",
        "disagg_prefill_dp_rank",
        "rid",
    }
)
_LARGEST_ROOM = 2**63 - 1
NAMING = Naming("rid", "/abort_request")


class BootstrapRoom:
    """Prefill pushes the KV cache to the decode worker that comes to the same room."""

    order: Literal["prefill_first", "concurrent"] = "concurrent"
    peers_path = "/route?prefill_dp_rank=-1&prefill_cp_rank=-1&target_tp_rank=-1&target_pp_rank=-1"

    def peers(self, answer: bytes) -> tuple[str, ...]:
        """None: ranks are found by the room. The server answers 503 until all of them have registered."""
        return ()

    def splits(self, request: Json) -> bool:
        """Always, as decode takes no request without a room. Raises RequestError for several samples.

        The engine would use one room for its warm-up and for every sample of a prompt.
        """
        samples = request.get("n")
        if request.get("use_beam_search") or (samples is not None and samples != 1):
            raise RequestError(
                "this engine cannot give several samples of one prompt with prefill and decode apart",
                where="n",
                hint="ask n times, or serve the model with the role `aggregated`",
            )
        return True

    def link(self, request: Json, meeting: Meeting) -> Json:
        """Prefill's bootstrap server, the room, which no other request may use, and the name to abort by.

        A batch has a room for each prompt, all of the rank that prefills.
        """
        host, port, count = host_of(meeting.url), meeting.bootstrap_port, prompts(request)
        rooms = [meeting.room + number * meeting.ranks for number in range(count)]
        if not host or not 0 < port < 65536 or not 0 < rooms[0] <= rooms[-1] <= _LARGEST_ROOM:
            raise EngineFailed(
                f"no bootstrap address from {meeting.url!r}, port {port}, room {meeting.room}",
                hint="prefill workers of SGLang need a bootstrap port, rooms are 1 to 2**63 - 1",
            )
        names = [f"{room:032x}" for room in rooms]  # of one length: a name also aborts those it begins
        one = count == 1
        return {
            "bootstrap_host": host,
            "bootstrap_port": port,
            "bootstrap_room": rooms[0] if one else rooms,
            "rid": names[0] if one else names,
        }

    def abort(self, link: Json) -> tuple[Abort, ...]:
        """One call for each prompt."""
        names = link["rid"] if isinstance(link["rid"], list) else [link["rid"]]
        return tuple(NAMING.abort(name) for name in names)

    def prefill_body(self, request: Json, link: Json) -> Json:
        """The request as it is, with the room: prefill stops by itself after its token."""
        return _linked(request, link)

    def handoff(self, answer: Json, now_s: float) -> Handoff:
        """Nothing to hand over; a leg that failed or was aborted ends the request's: decode waits in vain."""
        if "error" in answer or answer.get("object") == "error":
            raise EngineFailed(f"prefill answered with an error: {str(answer)[:300]}")
        choices = answer.get("choices")
        for choice in choices if isinstance(choices, list) else []:
            if isinstance(choice, dict) and choice.get("finish_reason") == "abort":
                raise EngineFailed("prefill aborted the request")
        return Handoff(params={}, expires_at_s=inf)

    def decode_body(self, request: Json, handoff: Handoff | None, link: Json) -> Json:
        """The request as it is, with the room."""
        return _linked(request, link)


def _linked(request: Json, link: Json) -> Json:
    return {key: value for key, value in request.items() if key not in LINK_FIELDS} | link
