"""Whether a model fits on the GPUs of a layout, and how many tokens of KV then do. Pure.

Each GPU holds its share of the weights, workspace for one step's activations, and a fixed rest (runtime,
graphs, communication buffers); what is left of the share of memory that the engine may use is KV.
Grouped-query KV is cut by tensor parallelism down to one head a GPU and repeated beyond that; latent KV is
whole on every GPU.
"""

from __future__ import annotations

import msgspec

from dynctl.errors import ProfileError
from dynctl.perfmodel.gpus import Gpu
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.precision import Precision
from dynctl.perfmodel.shapes import ModelShape

FIXED_BYTES = 3.5e9
"""Runtime, CUDA graphs, communication buffers: of each GPU."""


class EngineLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine is told: share of a GPU's memory, sequences of a rank, tokens of a rank in one step."""

    memory_share: float = 0.9
    sequences: int = 1024
    batched_tokens: int = 8192


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """Of one GPU: bytes of weights, of workspace, left for KV. `kv_tokens`: of the replica, all ranks
    together.
    """

    weights_bytes: float
    workspace_bytes: float
    kv_bytes: float
    kv_tokens: int


def check_divides(shape: ModelShape, layout: Layout) -> None:
    """Raise ProfileError with the reason when the model's sizes cannot be cut that way."""
    tp, ep = layout.tensor, layout.expert
    if min(tp, layout.pipeline, layout.data, ep) < 1:
        raise ProfileError(f"{layout.label}: parallel sizes must be 1 or more")
    if shape.heads % tp:
        raise ProfileError(f"{layout.label}: {shape.heads} attention heads do not divide by TP{tp}")
    if shape.latent is None and shape.kv_heads % tp and tp % shape.kv_heads:
        raise ProfileError(f"{layout.label}: {shape.kv_heads} KV heads and TP{tp} do not divide")
    if layout.pipeline > shape.layers:
        raise ProfileError(f"{layout.label}: PP{layout.pipeline} is more than the {shape.layers} layers")
    if shape.dense_layers and shape.ffn_width % tp:
        raise ProfileError(
            f"{layout.label}: feed-forward of width {shape.ffn_width} does not divide by TP{tp}"
        )
    if shape.experts is None:
        if ep > 1 or layout.data > 1:
            raise ProfileError(
                f"{layout.label}: the model has no experts to spread", hint="more replicas do the same"
            )
        return
    ranks = tp * layout.data
    if ranks % ep:
        raise ProfileError(f"{layout.label}: EP{ep} does not divide the {ranks} GPUs of a stage")
    if shape.experts.count % ep:
        raise ProfileError(f"{layout.label}: {shape.experts.count} experts do not divide by EP{ep}")
    if shape.experts.width % (ranks // ep):
        raise ProfileError(
            f"{layout.label}: experts of width {shape.experts.width} do not divide by {ranks // ep}"
        )


def weights_bytes(shape: ModelShape, precision: Precision, layout: Layout) -> float:
    """Bytes of weights on one GPU of a layout (of the fullest pipeline stage)."""
    tp, stage = layout.tensor, -(-shape.layers // layout.pipeline) / shape.layers
    attention = shape.layers * (shape.attention_params / tp + shape.replicated_params)
    ffn = (shape.dense_layers * shape.ffn_params + shape.moe_layers * shape.shared_params) / tp
    routed = shape.weight_bytes(precision)["experts"] / (tp * layout.data)
    embedding = shape.weight_bytes(precision)["embedding"] / tp
    if layout.pipeline > 1:
        embedding /= 1 if shape.tied else 2
    return stage * ((attention + ffn) * precision.weight_bytes + routed) + embedding


def kv_bytes_per_gpu(shape: ModelShape, precision: Precision, layout: Layout) -> float:
    """Bytes that one token of a rank takes on each GPU of that rank."""
    stage = -(-shape.layers // layout.pipeline) / shape.layers
    cut = 1 if shape.latent else min(layout.tensor, shape.kv_heads)
    return stage * shape.kv_bytes_per_token(precision) / cut


def kv_room_tokens(shape: ModelShape, gpu: Gpu, precision: Precision, layout: Layout) -> float:
    """Tokens of KV one rank has room for when the engine is given nearly all memory, as for a benchmark; 0 or
    below when nothing is left. Windowed layers keep a window only.
    """
    limits = EngineLimits(memory_share=0.95)
    workspace = workspace_bytes(shape, layout, limits)
    left = gpu.memory_bytes * limits.memory_share - weights_bytes(shape, precision, layout) - workspace
    kept = 1.0 - shape.window_layers / shape.layers
    return left / (kv_bytes_per_gpu(shape, precision, layout) * max(kept, 1 / shape.layers))


def workspace_bytes(shape: ModelShape, layout: Layout, limits: EngineLimits) -> float:
    """Of one GPU: the fixed rest, and activations of a full step."""
    widest = max(shape.ffn_width if shape.dense_layers else 0, shape.heads * shape.head_dim, 4 * shape.hidden)
    return FIXED_BYTES + 2.0 * limits.batched_tokens * (2 * shape.hidden + 3 * widest / layout.tensor)


def fit(shape: ModelShape, gpu: Gpu, precision: Precision, layout: Layout, limits: EngineLimits) -> Fit:
    """What a layout leaves for KV. Raises ProfileError with the reason when it cannot be cut or does not
    fit.
    """
    check_divides(shape, layout)
    weights = weights_bytes(shape, precision, layout)
    workspace = workspace_bytes(shape, layout, limits)
    usable = gpu.memory_bytes * limits.memory_share
    left = usable - weights - workspace
    told = f"{gpu.memory_bytes / 1e9:.0f} GB {gpu.name} of which {limits.memory_share:.0%} may be used"
    if usable < weights + workspace:
        raise ProfileError(
            f"{layout.label}: {weights / 1e9:.1f} GB of weights and {workspace / 1e9:.1f} GB of "
            f"workspace a GPU do not fit on {told}",
            hint="more GPUs a replica or a smaller precision",
        )
    tokens = int(left / kv_bytes_per_gpu(shape, precision, layout))
    if tokens < limits.batched_tokens:
        raise ProfileError(
            f"{layout.label}: only {tokens} tokens of KV are left beside {weights / 1e9:.1f} GB of weights "
            f"on {told}",
            hint=f"room for one step of {limits.batched_tokens} tokens is the least",
        )
    return Fit(
        weights_bytes=weights, workspace_bytes=workspace, kv_bytes=left, kv_tokens=tokens * layout.data
    )
