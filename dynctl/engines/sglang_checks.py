"""What SGLang is known to refuse or to do wrongly, and the arguments that dynctl sets itself. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from dynctl.engines.arguments import both_spellings
from dynctl.engines.base import Finding, ModelFacts, RoleSettings
from dynctl.engines.checks import (
    Setting,
    argument,
    check_context,
    check_env,
    check_heads,
    check_names,
    check_pair,
    error,
    number,
    prefill_and_decode,
    warning,
)

PAGE_SIZE = 64
"""Set unless the recipe gives one: the engine's own choice depends on its attention backend."""

_TENSOR = "roles.<role>.tensor_parallel"
_PIPELINE = "roles.<role>.pipeline_parallel"
_DATA = "roles.<role>.data_parallel"
_EXPERT = "roles.<role>.expert_parallel"
_PLACED = "hosts and the parallel sizes (dynctl places ranks)"
_DISAGG = "roles (prefill and decode)"

OWNED = both_spellings(
    {
        "model-path": "model.path",
        "model": "model.path",
        "served-model-name": "model.served_name",
        "revision": "model.revision",
        "tokenizer-path": "model.tokenizer",
        "chat-template": "model.chat_template",
        "host": "hosts (the engine's address)",
        "port": "nothing: dynctl allocates it",
        "config": "engine.args",
        "api-key": "frontend.api_key",
        "ssl-keyfile": "frontend.tls",
        "ssl-certfile": "frontend.tls",
        "ssl-ca-certs": "frontend.tls",
        "ssl-keyfile-password": "frontend.tls",
        "fastapi-root-path": "nothing: the frontend needs the plain paths",
        "tensor-parallel-size": _TENSOR,
        "tp-size": _TENSOR,
        "tp": _TENSOR,
        "pipeline-parallel-size": _PIPELINE,
        "pp-size": _PIPELINE,
        "pp": _PIPELINE,
        "data-parallel-size": _DATA,
        "dp-size": _DATA,
        "dp": _DATA,
        "expert-parallel-size": _EXPERT,
        "ep-size": _EXPERT,
        "ep": _EXPERT,
        "nnodes": _PLACED,
        "node-rank": _PLACED,
        "dist-init-addr": _PLACED,
        "nccl-init-addr": _PLACED,
        "base-gpu-id": _PLACED,
        "disaggregation-mode": _DISAGG,
        "disaggregation-transfer-backend": _DISAGG,
        "disaggregation-bootstrap-port": _DISAGG,
        "kv-events-config": "router.mode",
    }
)
OWNED_ENV = {
    "CUDA_VISIBLE_DEVICES": "the placement of roles on GPUs",
    "SGLANG_HOST_IP": "hosts",
    "SGLANG_ENABLE_REQUEST_HEADER_OVERRIDES": "nothing: clients must not reach those fields",
}
_PAGE = ("page-size",)
_PAIR = (
    Setting(("dtype",), "auto", "decode would read KV values of another type, and SGLang does not notice"),
    Setting(("kv-cache-dtype",), "auto", "decode refuses the transfer"),
    Setting(_PAGE, PAGE_SIZE, "decode refuses the transfer"),
    Setting(("quantization",), None, "both sides must compute the same KV values"),
    Setting(("disaggregation-decode-allocation-policy",), "early", "decode refuses the transfer"),
)


def check_role(role: RoleSettings, facts: ModelFacts | None) -> list[Finding]:
    """Findings of one role alone."""
    found = [
        *check_names(role, OWNED),
        *check_env(role, OWNED_ENV),
        *check_heads([role], facts),
        *check_context(role, ("context-length",), facts),
    ]
    page = argument(role, _PAGE)
    if page is not None and page[1] is not None:
        size = number(page[1])
        if size is None or size < 1 or size & (size - 1):
            found.append(error(role, f"args.{page[0]}", f"{page[1]!r} is no page size: give a power of two"))
        elif size == 1:
            text = "pages of one token make an event per token: give 16 or more with KV routing"
            found.append(warning(role, f"args.{page[0]}", text))
    for name in ("enable-dp-attention", "attn-dp-size"):
        if attention := argument(role, (name,)):
            text = (
                "is not supported: attention ranks publish on ports that no recipe field makes dynctl reserve"
            )
            found.append(error(role, f"args.{attention[0]}", text))
    return found


def check_transfer(roles: Sequence[RoleSettings]) -> list[Finding]:
    """What the bootstrap handshake between prefill and decode needs, and what it does not notice."""
    pair = prefill_and_decode(roles)
    if pair is None:
        return []
    agreed = check_pair(roles, _PAIR)
    found = argument(pair[1], ("disable-radix-cache",))
    both = argument(pair[1], ("disaggregation-decode-enable-radix-cache",))
    if found and both and found[1] and both[1]:
        agreed.append(error(pair[1], f"args.{found[0]}", f"contradicts {both[0]}"))
    return agreed
