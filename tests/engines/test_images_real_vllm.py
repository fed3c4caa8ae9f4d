"""Images through dynctl to real vLLM: its own names of blocks, from a LLaVA of random weights.

The CPU build comes without torchvision, which a module beside LLaVA's imports: it is replaced by an empty
one.
"""

from __future__ import annotations

import base64
import json
import random
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from tests import deployment
from tests.deployment import Cli, Deployment, counter, eventually, get
from tests.engines import environment
from tests.make_tiny_tokenizer import ASSETS
from tests.pictured_model import text

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

BLOCK = 32
SIDE, PATCH = 112, 14
TOKENS = (SIDE // PATCH) ** 2
SELECTED = "dynctl_component_router_kv_selected_cached_prefix_tokens_total"
REUSED = "dynctl_component_router_kv_worker_reused_tokens_total"
FALLBACKS = "dynctl_frontend_tokenize_fallbacks_total"
TEMPLATE = """\
{% for m in messages %}<|im_start|>{{ m['role'] }}
{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}\
{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
EMPTY_MODULE = """\
import importlib.abc
import importlib.machinery
import sys
import types

NAME = "transformers.models.pixtral.image_processing_pixtral"


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == NAME else None

    def create_module(self, spec):
        return types.ModuleType(spec.name)

    def exec_module(self, module):
        module._num_image_tokens = None


sys.meta_path.insert(0, Finder())
"""


def write_model(folder: Path) -> None:
    """All of a LLaVA but its weights, which the engine makes up (`load-format: dummy`)."""
    folder.mkdir()
    tokenizer = Tokenizer.from_file(str(ASSETS / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<image>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    shutil.copy(ASSETS / "tokenizer_config.json", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    words = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32}
    words |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2112}
    sight = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    sight |= {"image_size": SIDE, "patch_size": PATCH, "projection_dim": 64}
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": tokenizer.token_to_id("<image>"),
        "image_seq_length": TOKENS,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": {"model_type": "llama", "max_position_embeddings": 4096, **words},
        "vision_config": {"model_type": "clip_vision_model", **sight},
    }
    eye = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": SIDE},
        "crop_size": {"height": SIDE, "width": SIDE},
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_processor": eye,
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
    }
    for name, value in (("config", config), ("processor_config", processor)):
        (folder / f"{name}.json").write_text(json.dumps(value))


def picture(number: int) -> dict[str, Any]:
    """A content part with a PNG of noise."""
    rows = b"".join(b"\0" + random.Random(f"{number} {row}").randbytes(3 * SIDE) for row in range(SIDE))
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(png).decode()}"},
    }


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("llava")
    write_model(folder / "model")
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(EMPTY_MODULE)
    options = deployment.sets(
        {
            "engine.venv": environment.vllm_venv(),
            "engine.env.PYTHONPATH": folder / "site",
            "engine.args.load-format": "dummy",
            "model.path": folder / "model",
            "roles.aggregated.replicas": 1,
            "frontend.port": 0,
        }
    )
    recipe = deployment.RECIPES / "tiny-vllm-cpu.yaml"
    cli = Cli(tmp_path_factory.mktemp("home"))
    with deployment.up(cli, recipe, *options, "--timeout", "380", timeout_s=400.0) as running:
        yield running


def ask(served: Deployment, *parts: dict[str, Any]) -> tuple[int, int]:
    """Tokens of the prompt, and of these cached, as the engine tells them."""
    chat = {"model": "tiny", "messages": [{"role": "user", "content": list(parts)}], "max_tokens": 1}
    usage = served.post("/v1/chat/completions", chat)["usage"]
    return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


def metric(served: Deployment, name: str) -> float:
    return counter(get(served.url + "/metrics"), name)


def test_the_router_knows_a_prompt_with_images_block_by_block_as_vllm_does(served: Deployment) -> None:
    before, after = text("the quick brown fox jumps over the lazy dog " * 4), text("what is this? " * 8)
    cat, dog = picture(1), picture(2)
    tokens, cached = ask(served, before, cat, after)
    assert cached == 0
    assert metric(served, FALLBACKS) == 1
    full = tokens // BLOCK * BLOCK

    def known() -> bool:
        selected, reused = metric(served, SELECTED), metric(served, REUSED)
        assert ask(served, before, cat, after) == (tokens, full)
        assert metric(served, REUSED) - reused == full
        return metric(served, SELECTED) - selected == full

    assert eventually(known)
    _, cached = ask(served, before, dog, after)
    assert 0 < cached <= full - TOKENS

    def both_known() -> bool:
        """Each image was seen in another prompt: together they make one that is known."""
        selected, so_far = metric(served, SELECTED), metric(served, FALLBACKS)
        tokens, cached = ask(served, dog, text("and"), cat, after)
        return (
            metric(served, FALLBACKS) == so_far
            and metric(served, SELECTED) - selected == cached == tokens // BLOCK * BLOCK
        )

    assert eventually(both_known)
