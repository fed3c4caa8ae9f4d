"""A LoRA adapter of random weights for the tiny model, large enough that greedy output changes visibly."""

from __future__ import annotations

import json
import random
from array import array
from pathlib import Path

from tests.engines.tiny_model import HEAD_SIZE, HEADS, HIDDEN, KV_HEADS, LAYERS, write_tensors

RANK = 8
_SPREAD = 0.3


def write(folder: Path, seed: int = 1) -> None:
    """Fill `folder` (made when missing) as PEFT saves an adapter of the query and value projections."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    outputs = {"q_proj": HEADS * HEAD_SIZE, "v_proj": KV_HEADS * HEAD_SIZE}
    tensors: dict[str, tuple[tuple[int, ...], array[float]]] = {}
    for layer in range(LAYERS):
        for name, size in outputs.items():
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for part, shape in (("lora_A", (RANK, HIDDEN)), ("lora_B", (size, RANK))):
                values = array("f", (chance.gauss(0.0, _SPREAD) for _ in range(shape[0] * shape[1])))
                tensors[f"{at}.{part}.weight"] = (shape, values)
    write_tensors(folder / "adapter_model.safetensors", tensors)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": sorted(outputs),
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
