"""Laws for simulated engines: files that say what a layout costs, and a recipe that uses them."""

from __future__ import annotations

import json
from pathlib import Path

PREFILL, DECODE = 0.85, 0.6
"""With n GPUs, reading is n ** PREFILL and writing n ** DECODE times as fast."""
_TOKENS = (0, 128, 512, 1024, 2048, 8192)
_BATCH = (1, 8, 32, 128)
_CONTEXT = (0, 1024, 8192)


def law(tensor: int, *, reading: float = 1.0, writing: float = 1.0) -> dict[str, object]:
    """Costs of a replica on so many GPUs; `reading`, `writing`: by how much its times are longer."""
    read, write = reading / tensor**PREFILL, writing / tensor**DECODE
    prefill = [0.02 + (n * 2.5e-4 + n * n * 2e-8) * read for n in _TOKENS]
    decode = [[(0.016 + b * 2.5e-4 + b * c * 1.2e-7) * write for c in _CONTEXT] for b in _BATCH]
    return {
        "version": 1,
        "name": f"tp{tensor}",
        "prefill": {"tokens": _TOKENS, "seconds": prefill},
        "decode": {"batch": _BATCH, "context": _CONTEXT, "seconds": decode},
        "transfer": {"bytes_per_token": 131072, "bytes_per_s": 2.5e10, "latency_s": 0.002},
        "limits": {"kv_tokens": 65536, "sequences": 32, "batched_tokens": 8192},
    }


def write_law(folder: Path, tensor: int, *, slower: float = 1.0) -> Path:
    """law-tpN.json in the folder."""
    path = folder / f"law-tp{tensor}.json"
    path.write_text(json.dumps(law(tensor, reading=slower, writing=slower)))
    return path


def write_recipe(folder: Path, name: str = "cluster") -> Path:
    """A recipe of simulated engines, each with the law of its size in the folder."""
    path = folder / f"{name}.yaml"
    path.write_text(
        f"""schema: dynctl/v1
name: {name}
model: {{path: "builtin:tiny", served_name: tiny}}
backend: mocker
engine:
  args: {{profile: "{folder}/law-tp{{tensor}}.json", max-num-seqs: 32, max-model-len: 16384}}
roles: {{aggregated: {{replicas: 1}}}}
frontend: {{port: 0}}
"""
    )
    return path
