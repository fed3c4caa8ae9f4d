"""What one pass through a model costs at its hardware's peak: counted, nothing fitted. Pure.

A pass computes `tokens` new tokens of each attention rank. GEMM operations are 2 · weights · tokens,
attention 4 · heads · head_dim a (query, key) pair, an all-reduce among n GPUs moves 2·(n-1)/n of its bytes
through a link. Of E experts, k a token, T tokens reach E·(1 - (1 - k/E)^T).
"""

from __future__ import annotations

import math

import msgspec

from dynctl.perfmodel.gpus import Gpu
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.memory import kv_bytes_per_gpu
from dynctl.perfmodel.precision import Precision
from dynctl.perfmodel.shapes import ModelShape


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """A model on GPUs in one layout."""

    shape: ModelShape
    gpu: Gpu
    precision: Precision
    layout: Layout


class Pass(msgspec.Struct, frozen=True, kw_only=True):
    """Of one attention rank: new tokens, sequences, cached tokens read, (query, key) pairs; `decode`:
    one new token of each sequence.
    """

    tokens: float
    sequences: float
    cached: float
    pairs: float
    decode: bool = False


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds at peak of each part on the busiest GPU, then counts.

    dense_*: attention projections, feed-forward, shared experts, output layer; expert_*: routed experts;
    *_read_s: reading weights, *_math_s: operations; kv_s: reading KV; attention_s: operations of attention;
    link_s: bytes through links. `layers`, `moe_layers`: passed through one after the other; `hops`:
    collectives, each weighted by log2 of its GPUs.
    """

    dense_read_s: float
    dense_math_s: float
    expert_read_s: float
    expert_math_s: float
    kv_s: float
    attention_s: float
    link_s: float
    layers: float
    moe_layers: float
    hops: float


def decode_pass(batch: float, context: float) -> Pass:
    """One step of `batch` sequences a rank with `context` tokens each."""
    return Pass(tokens=batch, sequences=batch, cached=batch * context, pairs=batch * context, decode=True)


def prefill_pass(tokens: float, prompts: float = 1.0) -> Pass:
    """`prompts` whole prompts of `tokens` each on every rank, from empty contexts."""
    return Pass(
        tokens=tokens * prompts,
        sequences=prompts,
        cached=tokens * prompts,
        pairs=prompts * tokens * (tokens + 1) / 2,
    )


def coverage(experts: int, chosen: int, tokens: float) -> float:
    """Share of the experts that `tokens` tokens reach."""
    return 1.0 - math.exp(tokens * math.log1p(-chosen / experts)) if chosen < experts else 1.0


def work_of(machine: Machine, step: Pass) -> Work:
    """Count one pass."""
    shape, gpu, precision, layout = machine.shape, machine.gpu, machine.precision, machine.layout
    tp, tokens = layout.tensor, step.tokens / layout.pipeline
    attention = shape.layers * (shape.attention_params / tp + shape.replicated_params)
    ffn = (shape.dense_layers * shape.ffn_params + shape.moe_layers * shape.shared_params) / tp
    head = shape.head_params / tp
    flops = gpu.flops(precision.weights)
    expert_read, expert_math = _experts(machine, tokens)
    kept, pairs = _attended(shape, step)
    link_bytes, hops = _collectives(machine, tokens)
    ranks = tp * layout.data
    return Work(
        dense_read_s=((attention + ffn) * precision.weight_bytes + head * 2.0) / gpu.bandwidth,
        dense_math_s=2.0
        * ((attention + ffn) * tokens / flops + head * step.sequences / layout.pipeline / gpu.bf16),
        expert_read_s=expert_read,
        expert_math_s=expert_math,
        kv_s=kept * kv_bytes_per_gpu(shape, precision, layout) / gpu.bandwidth,
        attention_s=_attention_flops(shape, absorbed=step.decode)
        * pairs
        * shape.layers
        / tp
        / gpu.bf16
        / layout.pipeline,
        link_s=link_bytes / gpu.link_within(ranks),
        layers=float(shape.layers),
        moe_layers=float(shape.moe_layers),
        hops=hops,
    )


def _experts(machine: Machine, tokens: float) -> tuple[float, float]:
    """Seconds at peak to read and to compute the routed experts of one pass."""
    shape, layout, experts = machine.shape, machine.layout, machine.shape.experts
    if experts is None:
        return 0.0, 0.0
    ranks, everyone = layout.tensor * layout.data, tokens * layout.data
    params = shape.moe_layers * shape.expert_params / ranks
    reached = experts.count * coverage(experts.count, experts.chosen, everyone)
    read = params * reached * machine.precision.expert_bytes / machine.gpu.bandwidth
    flops = machine.gpu.flops(machine.precision.experts)
    return read, 2.0 * params * experts.chosen * everyone / flops


def _attended(shape: ModelShape, step: Pass) -> tuple[float, float]:
    """Cached tokens read and pairs, by layer on average: windows and sparse attention look at fewer."""
    context = step.cached / max(step.sequences, 1.0)
    narrow = min(1.0, shape.window / max(context, 1.0)) if shape.window else 1.0
    share = (shape.window_layers * narrow + shape.layers - shape.window_layers) / shape.layers
    if shape.sparse_tokens:
        # The indexer still looks at every key, at about a sixteenth of the cost.
        share *= min(1.0, shape.sparse_tokens / max(context, 1.0) + 1 / 16)
    return step.cached * share, step.pairs * share


def _attention_flops(shape: ModelShape, *, absorbed: bool) -> float:
    """Operations of one (query, key) pair in one layer, all heads.

    `absorbed`: latent attention on the compressed cache itself, as decoding does it.
    """
    if shape.latent is None:
        return 4.0 * shape.heads * shape.head_dim
    if absorbed:
        return 2.0 * shape.heads * (2 * shape.latent.kv + shape.latent.rope)
    return 2.0 * shape.heads * (shape.latent.nope + shape.latent.rope + shape.latent.value)


def _collectives(machine: Machine, tokens: float) -> tuple[float, float]:
    """Bytes through one GPU's link, and collectives weighted by log2 of their GPUs, of one pass."""
    shape, layout = machine.shape, machine.layout
    tp, ranks = layout.tensor, layout.tensor * layout.data
    row = shape.hidden * 2.0
    tensor_bytes = 2.0 * (tp - 1) / tp * tokens * row
    after_attention = shape.layers
    after_ffn = shape.layers if layout.data == 1 else shape.dense_layers
    count = after_attention + after_ffn
    total, hops = count * tensor_bytes, count * math.log2(tp) if tp > 1 else 0.0
    if layout.data > 1 and shape.experts is not None:
        copies = min(shape.experts.chosen, layout.expert) if layout.expert > 1 else layout.data
        total += shape.moe_layers * tokens * row * 1.5 * copies * (ranks - 1) / ranks
        hops += 2.0 * shape.moe_layers * math.log2(ranks)
    if layout.pipeline > 1:
        total += (layout.pipeline - 1) * tokens * row
        hops += layout.pipeline - 1
    return total, hops
