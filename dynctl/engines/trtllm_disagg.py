"""TensorRT-LLM's prefill/decode request contract, context first. Pure.

The context leg keeps the client's `max_tokens` and answers with the prompt's ids and `disaggregated_params`;
the generation leg gets both back. Unknown fields are refused by the engine, so none is sent that a release
does not know: `disagg_request_id`, which names the request for 1.3's Python transceiver, only to an engine
that says it is of 1.3 or later. Contract: tensorrt_llm/serve/openai_protocol.py, openai_disagg_service.py.
"""

from __future__ import annotations

import re
from typing import Literal

from dynctl.engines.base import Abort, Handoff, Json, Meeting
from dynctl.engines.requests import transferable
from dynctl.errors import EngineFailed

PARAMS = "disaggregated_params"
PROMPT_IDS = "prompt_token_ids"
TRANSFER_TIMEOUT_S = 60.0
"""`kv_transfer_timeout_ms` as dynctl sets it: the context worker gives the blocks up after that."""
TRANSFER_MARGIN_S = 10.0
REQUEST_ID = "disagg_request_id"
FIRST_WITH_ID = (1, 3)
_SMALLEST_ID = 2**42
_LARGEST_ID = 2**63 - 1
_VERSION = re.compile(r"(\d+)\.(\d+)")
_GOES_ON = ("length", "not_finished")


class ContextFirst:
    """Context, then generation."""

    order: Literal["prefill_first", "concurrent"] = "prefill_first"
    peers_path = ""

    def peers(self, answer: bytes) -> tuple[str, ...]:
        """None: the context's answer names its worker."""
        return ()

    def splits(self, request: Json) -> bool:
        """One sequence, whose params the answer carries, without prompt logprobs."""
        return transferable(request)

    def link(self, request: Json, meeting: Meeting) -> Json:
        """An id of 2**42 to 2**63 - 1 for releases that know one; else the context's answer has all."""
        found = _VERSION.match(meeting.version)
        if found is None or (int(found[1]), int(found[2])) < FIRST_WITH_ID:
            return {}
        return {REQUEST_ID: _SMALLEST_ID + meeting.room % (_LARGEST_ID - _SMALLEST_ID + 1)}

    def abort(self, link: Json) -> tuple[Abort, ...]:
        """None: the engine has no other way than a closed connection."""
        return ()

    def prefill_body(self, request: Json, link: Json) -> Json:
        """The request without streaming; the engine stops after the context by itself."""
        body = {key: value for key, value in request.items() if key not in (PARAMS, "stream_options")}
        body.update(stream=False)
        body[PARAMS] = {"request_type": "context_only", **link}
        return body

    def handoff(self, answer: Json, now_s: float) -> Handoff:
        """The context's params and prompt ids; `finished` when there is nothing left to generate."""
        if "error" in answer or answer.get("object") == "error":
            raise EngineFailed(f"the context worker answered with an error: {str(answer)[:300]}")
        choices = answer.get("choices")
        if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
            raise EngineFailed("the context worker answered without choices")
        expires = now_s + TRANSFER_TIMEOUT_S - TRANSFER_MARGIN_S
        if choices[0].get("finish_reason") not in _GOES_ON:
            return Handoff(params={}, expires_at_s=expires, finished=True)
        params, ids = choices[0].get(PARAMS), answer.get(PROMPT_IDS)
        if not isinstance(params, dict) or params.get("ctx_request_id") is None:
            raise EngineFailed(f"the context worker answered without {PARAMS} and its ctx_request_id")
        if not isinstance(ids, list) or not ids:
            raise EngineFailed(f"the context worker answered without {PROMPT_IDS}")
        return Handoff(params={PARAMS: params, PROMPT_IDS: ids}, expires_at_s=expires)

    def decode_body(self, request: Json, handoff: Handoff | None, link: Json) -> Json:
        """The request with the context's params; its prompt as the ids the context worker used."""
        body = {key: value for key, value in request.items() if key not in (PARAMS, PROMPT_IDS)}
        if handoff is None or not transferable(request):
            return body
        if handoff.finished:
            raise EngineFailed("the context worker's answer is the whole one: there is nothing to generate")
        body[PARAMS] = {**handoff.params[PARAMS], "request_type": "generation_only", **link}
        body[PROMPT_IDS if "messages" in body else "prompt"] = handoff.params[PROMPT_IDS]
        return body
