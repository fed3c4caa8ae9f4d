"""What TensorRT-LLM is known to refuse or to do wrongly, and the arguments that dynctl sets itself. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dynctl.engines.arguments import both_spellings, normalised
from dynctl.engines.base import ArgValue, Finding, ModelFacts, RoleSettings
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

_PLACED = "hosts and the parallel sizes (dynctl places ranks)"
_DISAGG = "roles (prefill and decode)"
OWNED = both_spellings(
    {
        "model": "model.path",
        "served-model-name": "model.served_name",
        "revision": "model.revision",
        "tokenizer": "model.tokenizer",
        "chat-template": "model.chat_template",
        "host": "hosts (the engine's address)",
        "port": "nothing: dynctl allocates it",
        "config": "engine.args",
        "extra-llm-api-options": "engine.args",
        "tp-size": "roles.<role>.tensor_parallel",
        "tensor-parallel-size": "roles.<role>.tensor_parallel",
        "pp-size": "roles.<role>.pipeline_parallel",
        "pipeline-parallel-size": "roles.<role>.pipeline_parallel",
        "ep-size": "roles.<role>.expert_parallel",
        "moe-expert-parallel-size": "roles.<role>.expert_parallel",
        "gpus-per-node": _PLACED,
        "server-role": _DISAGG,
        "metadata-server-config-file": _DISAGG,
        "disagg-cluster-uri": _DISAGG,
        "enable-iter-perf-stats": "nothing: the router reads these statistics",
    }
)
OWNED_ENV = {"CUDA_VISIBLE_DEVICES": "the placement of roles on GPUs"}
FLAGS = frozenset(
    {
        "backend",
        "cluster_size",
        "cp_size",
        "custom_tokenizer",
        "enable_chunked_prefill",
        "kv_cache_free_gpu_memory_fraction",
        "log_level",
        "max_batch_size",
        "max_beam_width",
        "max_num_tokens",
        "max_seq_len",
        "media_io_kwargs",
        "num_postprocess_workers",
        "otlp_traces_endpoint",
        "reasoning_parser",
        "tool_parser",
        "trust_remote_code",
    }
)
"""What `trtllm-serve` 1.2 takes on its command line; everything else is a key of its YAML."""
_TRANSCEIVER = "cache_transceiver_config"
_BUFFER = "max_tokens_in_buffer"
_PAIR = (
    Setting(("dtype",), "auto", "the KV cache of one cannot be read by the other"),
    Setting(("quantization",), None, "both sides must compute the same KV values"),
)


def longest_input(args: Mapping[str, ArgValue]) -> int:
    """The longest prompt that these arguments let in, in tokens; 0 when they do not say."""
    known = normalised(args, "_")
    lengths = [number(known.get(name)) or 0 for name in ("max_input_len", "max_seq_len")]
    stated = [length for length in lengths if length > 0]
    return min(stated, default=0)


def check_role(role: RoleSettings, facts: ModelFacts | None) -> list[Finding]:
    """Findings of one role alone."""
    found = [
        *check_names(role, OWNED),
        *check_env(role, OWNED_ENV),
        *check_heads([role], facts),
        *check_context(role, ("max-seq-len",), facts),
    ]
    if role.parallel.data > 1:
        text = "TensorRT-LLM has no data-parallel ranks behind one endpoint: give the role more replicas"
        found.append(error(role, "data_parallel", text))
    if argument(role, ("enable-attention-dp",)):
        text = "requests cannot be sent to an attention rank in this release: the router sees one worker"
        found.append(warning(role, "args.enable_attention_dp", text))
    block = _section(role, "kv_cache_config").get("tokens_per_block")
    size = number(block)
    if block is not None and (size is None or size < 1 or size & (size - 1)):
        path = "args.kv_cache_config.tokens_per_block"
        found.append(
            error(role, path, f"{block!r} is no block size: give a power of two (the default is 32)")
        )
    return found


def check_transfer(roles: Sequence[RoleSettings], facts: ModelFacts | None) -> list[Finding]:
    """What the KV transceiver between context and generation workers needs."""
    pair = prefill_and_decode(roles)
    if pair is None:
        return []
    found = [*check_pair(roles, _PAIR), *_same_cache(*pair)]
    for role in pair:
        found += _buffer(role, facts)
        if (number(normalised(role.args, "_").get("max_beam_width")) or 1) > 1:
            found.append(error(role, "args.max_beam_width", "must be 1 with prefill and decode apart"))
    return found


def _section(role: RoleSettings, name: str) -> dict[str, Any]:
    value = normalised(role.args, "_").get(name)
    return value if isinstance(value, dict) else {}


def _buffer(role: RoleSettings, facts: ModelFacts | None) -> list[Finding]:
    """`max_tokens_in_buffer` below the longest input: such a prompt's KV cache cannot be handed over."""
    path = f"args.{_TRANSCEIVER}.{_BUFFER}"
    given = _section(role, _TRANSCEIVER).get(_BUFFER)
    longest = longest_input(role.args) or (facts.max_position if facts else 0)
    if given is None:
        if longest_input(role.args):
            return []
        text = "is not set and neither is max_seq_len: set one, or long prompts cannot be handed over"
        return [warning(role, path, text)]
    size = number(given)
    if size is None or size < 1:
        return [error(role, path, f"{given!r} is no number of tokens")]
    if longest > size:
        text = (
            f"{size} is below the longest input of {longest} tokens: the KV cache of such a prompt does not"
            " fit the transfer buffer and the request fails or hangs; raise it or lower max_seq_len"
        )
        return [error(role, path, text)]
    return []


def _same_cache(prefill: RoleSettings, decode: RoleSettings) -> list[Finding]:
    """Keys of `kv_cache_config` and the transceiver that both sides must share."""
    found: list[Finding] = []
    for section, key, default in (
        ("kv_cache_config", "dtype", "auto"),
        ("kv_cache_config", "tokens_per_block", 32),
        (_TRANSCEIVER, "backend", "NIXL"),
    ):
        ours = _section(prefill, section).get(key, default)
        theirs = _section(decode, section).get(key, default)
        if str(ours) != str(theirs):
            text = f"{theirs} and prefill's {ours}: the KV cache of one cannot be read by the other"
            found.append(error(decode, f"args.{section}.{key}", text))
    return found
