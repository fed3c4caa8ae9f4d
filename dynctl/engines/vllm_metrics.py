"""vLLM's metrics and model list as load and facts; other engines that use its names share it. Pure."""

from __future__ import annotations

from collections import defaultdict

import msgspec

from dynctl.engines.base import EngineInfo, EngineLoad
from dynctl.engines.prometheus import samples, whole

_COUNTS = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:prefix_cache_queries_total": "prefix_queries",
    "vllm:prefix_cache_hits_total": "prefix_hits",
    "vllm:num_preemptions_total": "preemptions",
    "vllm:iteration_tokens_total_count": "work",
    "vllm:prompt_tokens_total": "work",
    "vllm:generation_tokens_total": "work",
}
_USAGE = "vllm:kv_cache_usage_perc"
_CONFIG = "vllm:cache_config_info"


class _Model(msgspec.Struct):
    id: str = ""
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model] = []


def load(metrics: bytes) -> list[EngineLoad]:
    """Load by data-parallel rank (label `engine`), ranks rising; [] when there is no vLLM metric."""
    counts: dict[int, dict[str, int]] = defaultdict(dict)
    usage: dict[int, float] = {}
    for sample in samples(metrics, (*_COUNTS, _USAGE, _CONFIG)):
        rank = whole(sample.labels.get("engine", "0"))
        if sample.name == _USAGE:
            usage[rank] = max(usage.get(rank, 0.0), sample.value)
        elif sample.name == _CONFIG:
            counts[rank]["kv_blocks"] = whole(sample.labels.get("num_gpu_blocks", ""))
        else:
            field = _COUNTS[sample.name]
            counts[rank][field] = counts[rank].get(field, 0) + int(sample.value)
    return [
        EngineLoad(
            rank=rank,
            running=found["running"],
            waiting=found.get("waiting", 0),
            kv_usage=usage.get(rank, 0.0),
            kv_blocks=found.get("kv_blocks", 0),
            prefix_queries=found.get("prefix_queries", 0),
            prefix_hits=found.get("prefix_hits", 0),
            preemptions=found.get("preemptions", 0),
            work=found.get("work", 0),
        )
        for rank, found in sorted(counts.items())
        if "running" in found
    ]


def info(models: bytes, metrics: bytes) -> EngineInfo:
    """Context length from the model list, block size and count from the cache configuration's labels."""
    labels = next((sample.labels for sample in samples(metrics, (_CONFIG,))), {})
    return EngineInfo(
        block_size=whole(labels.get("block_size", "")),
        max_model_len=max_model_len(models),
        kv_blocks=whole(labels.get("num_gpu_blocks", "")),
    )


def max_model_len(models: bytes) -> int:
    """The largest `max_model_len` of an OpenAI model list; 0 when it states none."""
    try:
        listed = msgspec.json.decode(models, type=_Models)
    except msgspec.DecodeError:
        return 0
    return max((model.max_model_len or 0 for model in listed.data), default=0)
