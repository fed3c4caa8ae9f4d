"""A Llama checkpoint of random weights, small enough for any engine on a CPU: its text is noise.

Written without torch: a safetensors file is a length, a JSON header and raw numbers
(https://huggingface.co/docs/safetensors). Tokenizer and chat template are the mocker's. The same bytes
everywhere, so workers on different machines hold the same model.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
from array import array
from collections.abc import Mapping
from pathlib import Path

ASSETS = Path(__file__).resolve().parents[2] / "dynctl" / "mocker" / "assets" / "tiny"
HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_SIZE = 128, 256, 2, 4, 2, 32
POSITIONS = 4096
_SPREAD = 0.2
"""Standard deviation of the weights: wide, so that greedy output depends on the prompt."""


def write(folder: Path) -> None:
    """Fill `folder` (made when missing) with config, tokenizer, chat template and weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copyfile(ASSETS / name, folder / name)
    tokenizer = json.loads((ASSETS / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer["model_max_length"] = POSITIONS
    assets = json.loads((ASSETS / "config.json").read_text(encoding="utf-8"))
    vocabulary, eos = assets["vocab_size"], assets["eos_token_id"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_SIZE,
        "hidden_act": "silu",
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": vocabulary,
        "bos_token_id": 0,
        "eos_token_id": eos,
    }
    _write_json(folder / "tokenizer_config.json", tokenizer)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": eos})
    _write_weights(folder / "model.safetensors", vocabulary)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (vocabulary, HIDDEN),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        shapes |= {
            f"{at}input_layernorm.weight": (HIDDEN,),
            f"{at}post_attention_layernorm.weight": (HIDDEN,),
            f"{at}self_attn.q_proj.weight": (HEADS * HEAD_SIZE, HIDDEN),
            f"{at}self_attn.k_proj.weight": (KV_HEADS * HEAD_SIZE, HIDDEN),
            f"{at}self_attn.v_proj.weight": (KV_HEADS * HEAD_SIZE, HIDDEN),
            f"{at}self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_SIZE),
            f"{at}mlp.gate_proj.weight": (INNER, HIDDEN),
            f"{at}mlp.up_proj.weight": (INNER, HIDDEN),
            f"{at}mlp.down_proj.weight": (HIDDEN, INNER),
        }
    return shapes


def _write_weights(path: Path, vocabulary: int) -> None:
    chance = random.Random(0)
    tensors: dict[str, tuple[tuple[int, ...], array[float]]] = {}
    for name, shape in sorted(_shapes(vocabulary).items()):
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        norm = len(shape) == 1
        values = array("f", (1.0 if norm else chance.gauss(0.0, _SPREAD) for _ in range(count)))
        tensors[name] = (shape, values)
    write_tensors(path, tensors)


def write_tensors(path: Path, tensors: Mapping[str, tuple[tuple[int, ...], array[float]]]) -> None:
    """A safetensors file of float32 tensors: name to shape and values."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    blobs: list[bytes] = []
    offset = 0
    for name, (shape, values) in tensors.items():
        blob = values.tobytes()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + len(blob)]}
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))
