"""What a model is made of: the sizes that memory and time follow from, read from its config.json. Pure but
for the table of known models beside it.

Parameters are counted without biases, norms and router (below 1 % together). Formulas for the KV of one
token: grouped-query attention 2 · layers · kv_heads · head_dim, latent attention (MLA) layers ·
(kv_lora_rank + rope_dim), times the bytes of one value.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

import msgspec

from dynctl.errors import ProfileError
from dynctl.perfmodel.precision import Precision

_NEEDED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")


class Latent(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of multi-head latent attention. `query` 0: queries are not compressed."""

    query: int
    kv: int
    rope: int
    nope: int
    value: int


class Experts(msgspec.Struct, frozen=True, kw_only=True):
    """Of each mixture-of-experts layer. `shared_width`: of the shared experts together, 0 = none."""

    count: int
    chosen: int
    width: int
    shared_width: int = 0


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder. `dense_layers` have a feed-forward of `ffn_width`, the others `experts`.

    `window`: of the `window_layers` that look back no farther, in tokens. `sparse_tokens`: an indexer
    chooses so many tokens to attend to, 0 = all. `native`: the precision its weights are published in.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    ffn_width: int
    dense_layers: int
    latent: Latent | None = None
    experts: Experts | None = None
    window: int = 0
    window_layers: int = 0
    sparse_tokens: int = 0
    index_width: int = 0
    tied: bool = False
    max_context: int = 0
    native: Precision = Precision()

    @property
    def moe_layers(self) -> int:
        """Layers with experts."""
        return self.layers - self.dense_layers

    @property
    def attention_params(self) -> float:
        """Weights of one attention block that tensor parallelism cuts."""
        if self.latent is None:
            return float(self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads))
        at = self.latent
        q_in = at.query or self.hidden
        return float(
            self.heads * (q_in * (at.nope + at.rope) + at.kv * (at.nope + at.value) + at.value * self.hidden)
        )

    @property
    def replicated_params(self) -> float:
        """Weights of one attention block that every tensor-parallel GPU holds whole: down-projections of
        MLA.
        """
        if self.latent is None:
            return 0.0
        return float(self.hidden * (self.latent.query + self.latent.kv + self.latent.rope + self.index_width))

    @property
    def ffn_params(self) -> float:
        """Weights of one dense feed-forward (gate, up, down)."""
        return 3.0 * self.hidden * self.ffn_width

    @property
    def shared_params(self) -> float:
        """Weights of the shared experts of one layer."""
        return 3.0 * self.hidden * self.experts.shared_width if self.experts else 0.0

    @property
    def expert_params(self) -> float:
        """Weights of one routed expert."""
        return 3.0 * self.hidden * self.experts.width if self.experts else 0.0

    @property
    def head_params(self) -> float:
        """Weights of the output layer; the embedding has as many, unless tied."""
        return float(self.hidden * self.vocab)

    @property
    def params(self) -> float:
        """All weights."""
        routed = self.expert_params * self.experts.count if self.experts else 0.0
        return (
            self.layers * (self.attention_params + self.replicated_params)
            + self.dense_layers * self.ffn_params
            + self.moe_layers * (self.shared_params + routed)
            + self.head_params * (1 if self.tied else 2)
        )

    @property
    def kv_values(self) -> int:
        """Numbers that one layer keeps of one token."""
        if self.latent is None:
            return 2 * self.kv_heads * self.head_dim
        return self.latent.kv + self.latent.rope

    def kv_bytes_per_token(self, precision: Precision) -> float:
        """Of all layers and heads; windowed layers count as whole ones."""
        return self.layers * self.kv_values * precision.kv_bytes

    def weight_bytes(self, precision: Precision) -> dict[str, float]:
        """Of the whole model by part: attention, ffn (dense and shared), experts, embedding (16 bit)."""
        routed = self.expert_params * self.experts.count * self.moe_layers if self.experts else 0.0
        return {
            "attention": self.layers
            * (self.attention_params + self.replicated_params)
            * precision.weight_bytes,
            "ffn": (self.dense_layers * self.ffn_params + self.moe_layers * self.shared_params)
            * precision.weight_bytes,
            "experts": routed * precision.expert_bytes,
            "embedding": self.head_params * (1 if self.tied else 2) * 2.0,
        }


def shape_of(config: Mapping[str, Any], name: str, where: str = "") -> ModelShape:
    """The shape that a config.json states; `where` names it in messages.

    Raises ProfileError for fields that are missing or no positive numbers. Multimodal models keep those of
    the language model under "text_config".
    """
    inner = config.get("text_config")
    fields = {**config, **inner} if isinstance(inner, Mapping) else dict(config)
    missing = [key for key in _NEEDED if not _number(fields, key)]
    experts = _experts(fields)
    if not _number(fields, "intermediate_size") and experts is None:
        missing.append("intermediate_size")
    if missing:
        raise ProfileError(
            f"the config of {name} lacks {', '.join(missing)}",
            where=where,
            hint="the config.json of a decoder in the Hugging Face format, with these as positive numbers",
        )
    layers, hidden, heads = (_number(fields, key) for key in _NEEDED[:3])
    window, window_layers = _window(fields, layers)
    return ModelShape(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=_number(fields, "num_key_value_heads") or heads,
        head_dim=_number(fields, "head_dim") or hidden // heads,
        vocab=_number(fields, "vocab_size"),
        ffn_width=_number(fields, "intermediate_size"),
        dense_layers=_dense_layers(fields, layers) if experts else layers,
        latent=_latent(fields),
        experts=experts,
        window=window,
        window_layers=window_layers,
        sparse_tokens=_number(fields, "index_topk"),
        index_width=_number(fields, "index_head_dim"),
        tied=fields.get("tie_word_embeddings") is True,
        max_context=_number(fields, "max_position_embeddings"),
        native=_native(fields),
    )


def known_shape(model_id: str) -> ModelShape | None:
    """The shape of a model from the table that comes with dynctl, None when it is not there.

    An id that ends in its precision ("...-FP8", "...-NVFP4") has it.
    """
    config = _table().get(model_id.lower())
    if config is None:
        return None
    shape = shape_of(config, model_id)
    told = next((name for name in ("fp8", "fp4") if model_id.lower().endswith(name)), "")
    return msgspec.structs.replace(shape, native=Precision.named(told)) if told else shape


def known_models() -> tuple[str, ...]:
    """The ids in the table."""
    return tuple(sorted(_table()))


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    text = resources.files("dynctl.perfmodel").joinpath("known_models.json").read_text()
    return {name.lower(): entry["config"] for entry in json.loads(text)["models"] for name in entry["ids"]}


def _number(fields: Mapping[str, Any], *keys: str) -> int:
    for key in keys:
        value = fields.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0


def _experts(fields: Mapping[str, Any]) -> Experts | None:
    count = _number(fields, "n_routed_experts", "num_local_experts", "num_experts")
    chosen = _number(fields, "num_experts_per_tok", "experts_per_token", "moe_topk")
    width = _number(fields, "moe_intermediate_size", "intermediate_size")
    if count < 2 or not chosen or not width:
        return None
    shared = _number(fields, "shared_expert_intermediate_size") or width * _number(fields, "n_shared_experts")
    return Experts(count=count, chosen=min(chosen, count), width=width, shared_width=shared)


def _dense_layers(fields: Mapping[str, Any], layers: int) -> int:
    listed = fields.get("mlp_only_layers")
    step = _number(fields, "decoder_sparse_step", "moe_layer_freq") or 1
    first = _number(fields, "first_k_dense_replace")
    sparse = sum(1 for i in range(first, layers) if (i + 1) % step == 0)
    return min(layers, layers - sparse + (len(listed) if isinstance(listed, list) else 0))


def _latent(fields: Mapping[str, Any]) -> Latent | None:
    kv = _number(fields, "kv_lora_rank")
    if not kv:
        return None
    return Latent(
        query=_number(fields, "q_lora_rank"),
        kv=kv,
        rope=_number(fields, "qk_rope_head_dim"),
        nope=_number(fields, "qk_nope_head_dim"),
        value=_number(fields, "v_head_dim"),
    )


def _window(fields: Mapping[str, Any], layers: int) -> tuple[int, int]:
    window = _number(fields, "sliding_window")
    kinds = fields.get("layer_types")
    if not window or fields.get("use_sliding_window") is False:
        return 0, 0
    if isinstance(kinds, list):
        return window, sum(1 for kind in kinds if kind == "sliding_attention")
    return window, _number(fields, "sliding_layers") or layers


def _native(fields: Mapping[str, Any]) -> Precision:
    quant = fields.get("quantization_config")
    told = json.dumps(quant).lower() if isinstance(quant, Mapping) else ""
    if "mxfp4" in told or "nvfp4" in told or "fp4" in told:
        return Precision(weights="bf16", experts="fp4") if _experts(fields) else Precision.named("fp4")
    if "fp8" in told:
        return Precision.named("fp8")
    dtype = fields.get("dtype", fields.get("torch_dtype", ""))
    return Precision.named("fp16" if dtype == "float16" else "bf16")
