"""What vLLM is known to refuse or to do wrongly. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    value_of,
)

OWNED_ENV = {
    "CUDA_VISIBLE_DEVICES": "the placement of roles on GPUs",
    "VLLM_HOST_IP": "hosts",
    "VLLM_NIXL_SIDE_CHANNEL_HOST": "hosts",
    "VLLM_NIXL_SIDE_CHANNEL_PORT": "its own port allocation",
    "VLLM_MOONCAKE_BOOTSTRAP_PORT": "its own port allocation",
}
_BLOCK = ("block-size",)
_CONTEXT = ("max-model-len",)
_BLOCKS = ("num-gpu-blocks-override",)
_HASH = ("prefix-caching-hash-algo",)
_ALGORITHMS = ("sha256", "sha256_cbor", "xxhash", "xxhash_cbor")
_OTHER_BALANCING = ("data-parallel-rank", "data-parallel-external-lb", "data-parallel-hybrid-lb")
_CACHE_DTYPE = Setting(
    ("kv-cache-dtype",), "auto", "the KV cache cannot be handed over, decode refuses the handshake"
)
_PAIR = (
    Setting(("dtype",), "auto", "the KV cache cannot be handed over, decode refuses the handshake"),
    _CACHE_DTYPE,
    Setting(_BLOCK, None, "prefill's blocks do not fit decode's, and the router counts in one block size"),
    Setting(("quantization", "q"), None, "both sides must compute the same KV values"),
    Setting(_HASH, "sha256", "the two name the same block by different hashes", "warning"),
)


def check_role(role: RoleSettings, facts: ModelFacts | None, owned: Mapping[str, str]) -> list[Finding]:
    """Findings of one role alone."""
    return [
        *check_names(role, owned),
        *check_env(role, OWNED_ENV),
        *check_heads([role], facts),
        *check_context(role, _CONTEXT, facts),
        *_balancing(role),
        *_block_size(role),
        *_cache_holds_context(role),
        *_hash_algorithm(role),
    ]


def _balancing(role: RoleSettings) -> list[Finding]:
    reason = (
        "is refused: external and hybrid balancing need one endpoint per rank and vLLM refuses the former for"
        " dense models; give the role more replicas, or data_parallel for ranks behind one endpoint"
    )
    return [
        error(role, f"args.{found[0]}", reason)
        for name in _OTHER_BALANCING
        if (found := argument(role, (name,)))
    ]


def _block_size(role: RoleSettings) -> list[Finding]:
    found = argument(role, _BLOCK)
    if found is None or found[1] is None:
        return []
    on_cpu = any(name.startswith("VLLM_CPU_") for name in role.env)
    step = 32 if on_cpu else 16
    size = number(found[1])
    if size is not None and size > 0 and size % step == 0:
        return []
    kind = "on a CPU" if on_cpu else "on a GPU"
    text = f"{found[1]!r} is refused: vLLM's attention {kind} takes multiples of {step}"
    return [error(role, f"args.{found[0]}", text)]


def _cache_holds_context(role: RoleSettings) -> list[Finding]:
    values = [argument(role, names) for names in (_BLOCKS, _BLOCK, _CONTEXT)]
    blocks, size, context = (number(found[1]) if found else None for found in values)
    if not (values[0] and blocks and size and context) or blocks * size >= context:
        return []
    text = f"{blocks} blocks of {size} tokens hold less than one request of max-model-len {context}"
    return [error(role, f"args.{values[0][0]}", text)]


def _hash_algorithm(role: RoleSettings) -> list[Finding]:
    found = argument(role, _HASH)
    if found is None:
        return []
    if found[1] not in _ALGORITHMS:
        return [error(role, f"args.{found[0]}", f"{found[1]!r} is none of {', '.join(_ALGORITHMS)}")]
    if str(found[1]).startswith("xxhash") and "PYTHONHASHSEED" not in role.env:
        return [
            error(role, f"args.{found[0]}", f"{found[1]} needs env PYTHONHASHSEED, the same for every worker")
        ]
    return []


def check_transfer(roles: Sequence[RoleSettings], facts: ModelFacts | None) -> list[Finding]:
    """What the NIXL hand-over between prefill and decode needs."""
    pair = prefill_and_decode(roles)
    if pair is None:
        return []
    return [*check_pair(roles, _PAIR), *_transfer_sizes(*pair, facts)]


def _transfer_sizes(prefill: RoleSettings, decode: RoleSettings, facts: ModelFacts | None) -> list[Finding]:
    ours, theirs = prefill.parallel.tensor, decode.parallel.tensor
    if max(ours, theirs) % min(ours, theirs):
        text = f"{theirs} and prefill's {ours}: one must divide the other for the KV cache to be handed over"
        return [error(decode, "tensor_parallel", text)]
    if ours > theirs and facts is not None and 0 < facts.kv_heads < ours:
        text = (
            f"{ours} is more than decode's {theirs} and than the model's {facts.kv_heads} KV heads: NIXL"
            " cannot hand over replicated heads to fewer ranks"
        )
        return [error(prefill, "tensor_parallel", text)]
    if ours != theirs and "nvfp4" in str(value_of(prefill, _CACHE_DTYPE)):
        return [
            error(
                decode,
                "tensor_parallel",
                f"{theirs} and prefill's {ours}: an NVFP4 KV cache needs equal ones",
            )
        ]
    return []
