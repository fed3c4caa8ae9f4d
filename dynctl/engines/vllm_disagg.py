"""vLLM's prefill/decode request contract with NIXL in pull mode. Pure.

Prefill runs first, with one token and without streaming; its answer's `kv_transfer_params` go to decode once,
unchanged. Reused, expired or incomplete ones give wrong text with status 200 or end the decode engine, so
they are checked here and dated. Contract: vllm/distributed/kv_transfer/kv_connector/v1/nixl.
"""

from __future__ import annotations

from typing import Literal

from dynctl.engines.base import Abort, Handoff, Json, Meeting
from dynctl.engines.requests import transferable
from dynctl.errors import EngineFailed

PARAMS = "kv_transfer_params"
LEASE_S = 30.0
"""How long prefill keeps the blocks without a sign from decode: the default of `kv_lease_duration`."""
LEASE_MARGIN_S = 5.0
"""Kept back for decode's own queue: the lease must hold until decode has taken the request up."""
_REQUIRED = ("remote_engine_id", "remote_request_id", "remote_host", "remote_port", "tp_size")
_ENDS_WITH_PARAMS = ("length", "stop")
_NOT_FOR_PREFILL = (
    "stream_options",
    "min_tokens",
    "logprobs",
    "top_logprobs",
    "prompt_logprobs",
    "echo",
    "return_token_ids",
    "kv_transfer_params",
)


class NixlPull:
    """Prefill computes and pins the prompt's blocks, decode pulls them and produces every token."""

    order: Literal["prefill_first", "concurrent"] = "prefill_first"
    peers_path = ""

    def peers(self, answer: bytes) -> tuple[str, ...]:
        """None: prefill's answer names its rank."""
        return ()

    def splits(self, request: Json) -> bool:
        """One sequence without prompt logprobs.

        Params that several sequences share end the decode engine (an assertion) or give wrong text.
        """
        return transferable(request)

    def link(self, request: Json, meeting: Meeting) -> Json:
        """Nothing: prefill's answer is what links the legs."""
        return {}

    def abort(self, link: Json) -> tuple[Abort, ...]:
        """None: the engine notices a closed connection at once."""
        return ()

    def prefill_body(self, request: Json, link: Json) -> Json:
        """The same prompt with one token asked for, no streaming, and the wish for a remote decode."""
        body = one_token(request)
        body[PARAMS] = {"do_remote_decode": True, "do_remote_prefill": False}
        return body

    def handoff(self, answer: Json, now_s: float) -> Handoff:
        """The params of a complete answer, good until the lease less its margin has passed."""
        _check_finish(answer)
        params = answer.get(PARAMS)
        if not isinstance(params, dict):
            raise EngineFailed("prefill answered without kv_transfer_params")
        missing = [key for key in _REQUIRED if params.get(key) in (None, "")]
        if missing:
            raise EngineFailed(f"prefill's kv_transfer_params lack {', '.join(missing)}")
        if params.get("do_remote_prefill") is not True:
            raise EngineFailed("prefill's kv_transfer_params do not offer its blocks (do_remote_prefill)")
        groups = params.get("remote_block_ids")
        if not (isinstance(groups, list) and any(isinstance(group, list) and group for group in groups)):
            raise EngineFailed("prefill's kv_transfer_params name no blocks (remote_block_ids)")
        return Handoff(params=params, expires_at_s=now_s + LEASE_S - LEASE_MARGIN_S)

    def decode_body(self, request: Json, handoff: Handoff | None, link: Json) -> Json:
        """The client's request with the params as received; plain without them or when it cannot be split."""
        body = {key: value for key, value in request.items() if key != PARAMS}
        if handoff is not None and transferable(request):
            body[PARAMS] = handoff.params
        return body


def one_token(request: Json) -> Json:
    """The request as prefill is to compute it: one token, no streaming, nothing that asks for more."""
    body = {key: value for key, value in request.items() if key not in _NOT_FOR_PREFILL}
    body.update(stream=False, max_tokens=1)
    if "messages" in body or "max_completion_tokens" in body:
        body["max_completion_tokens"] = 1
    if "n" in body:
        body["n"] = 1
    return body


def _check_finish(answer: Json) -> None:
    if "error" in answer:
        raise EngineFailed(f"prefill answered with an error: {error_text(answer['error'])}")
    choices = answer.get("choices")
    if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
        raise EngineFailed("prefill answered without choices")
    reason = choices[0].get("finish_reason")
    if reason not in _ENDS_WITH_PARAMS:
        raise EngineFailed(f"prefill ended with finish_reason {reason!r}")


def error_text(error: object) -> str:
    """What an error object of the engine says, at no great length."""
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)[:300]
