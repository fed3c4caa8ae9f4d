"""vLLM's prefill/decode request contract with the Mooncake connector. Pure.

Prefill answers with no params: the caller invents a transfer id that both legs carry, so both start at once
and prefill's engine writes the blocks when decode asks its bootstrap server's entry for them. Contract:
vllm/distributed/kv_transfer/kv_connector/v1/mooncake.
"""

from __future__ import annotations

from math import inf
from typing import Any, Literal

import msgspec

from dynctl.engines.base import Abort, Handoff, Json, Meeting
from dynctl.engines.requests import host_of, transferable
from dynctl.engines.vllm_disagg import PARAMS, error_text, one_token
from dynctl.errors import EngineFailed

ABORT_S = 120
"""How long prefill keeps blocks that decode does not fetch; the connector's own 480 s starve it too long."""
_ENDERS = ("stop", "stop_token_ids", "stop_reason", "bad_words")
_TRANSFER, _ENGINE, _ADDRESS = "transfer_id", "remote_engine_id", "remote_bootstrap_addr"


class Mooncake:
    """Both legs at once, tied by a transfer id; prefill's engine pushes to decode's."""

    order: Literal["prefill_first", "concurrent"] = "concurrent"
    peers_path = "/query"

    def peers(self, answer: bytes) -> tuple[str, ...]:
        """The engine id of each data-parallel rank; decode keeps them for good, so they are new per start."""
        try:
            ranks = msgspec.json.decode(answer, type=dict[str, dict[str, Any]])
            names = tuple(str(ranks[str(rank)]["engine_id"]) for rank in range(len(ranks)))
        except (msgspec.DecodeError, KeyError) as error:
            raise EngineFailed(
                f"the bootstrap server's answer lists no engine ids: {answer[:200]!r}"
            ) from error
        if not names:
            raise EngineFailed("no rank has registered at the bootstrap server yet")
        return names

    def splits(self, request: Json) -> bool:
        """One sequence without prompt logprobs: a transfer id serves one request."""
        return transferable(request)

    def link(self, request: Json, meeting: Meeting) -> Json:
        """A transfer id, and where and under which name decode finds the rank that prefills."""
        rank = meeting.room % meeting.ranks
        if rank >= len(meeting.peers) or not 0 < meeting.bootstrap_port < 65536:
            raise EngineFailed(
                f"no engine id is known of rank {rank} of {meeting.url}",
                hint="the sidecar reads them from prefill's bootstrap server when the engine is ready",
            )
        return {
            _TRANSFER: f"dynctl-{meeting.room:016x}",
            _ENGINE: meeting.peers[rank],
            _ADDRESS: f"http://{host_of(meeting.url)}:{meeting.bootstrap_port}",
        }

    def abort(self, link: Json) -> tuple[Abort, ...]:
        """None: the engine notices a closed connection at once."""
        return ()

    def prefill_body(self, request: Json, link: Json) -> Json:
        """The same prompt, ended by length whatever the token is: any other end frees the blocks unread."""
        body = {key: value for key, value in one_token(request).items() if key not in _ENDERS}
        body["ignore_eos"] = True
        body[PARAMS] = {"do_remote_decode": True, "do_remote_prefill": False, _TRANSFER: link[_TRANSFER]}
        return body

    def handoff(self, answer: Json, now_s: float) -> Handoff:
        """Nothing to hand over; an answer that did not end by length leaves decode waiting in vain."""
        if "error" in answer:
            raise EngineFailed(f"prefill answered with an error: {error_text(answer['error'])}")
        choices = answer.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else None
        reason = first.get("finish_reason") if isinstance(first, dict) else None
        if reason != "length":
            raise EngineFailed(f"prefill ended with finish_reason {reason!r}: its blocks are gone")
        return Handoff(params={}, expires_at_s=inf)

    def decode_body(self, request: Json, handoff: Handoff | None, link: Json) -> Json:
        """The client's request with where its blocks come from; plain without a link."""
        body = {key: value for key, value in request.items() if key != PARAMS}
        if link:
            body[PARAMS] = {"do_remote_prefill": True, "do_remote_decode": False, **link}
        return body
