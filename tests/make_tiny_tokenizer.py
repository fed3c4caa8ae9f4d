"""Makes the mocker's tiny tokenizer again: `python tests/make_tiny_tokenizer.py [--check]`.

For maintainers. Trains a byte-level BPE on `tests/data/tiny_corpus.txt`, a frozen sample of this project's
own prose, so the same corpus gives the same bytes. `--check` writes nothing and fails when assets differ.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "tests" / "data" / "tiny_corpus.txt"
ASSETS = ROOT / "dynctl" / "mocker" / "assets" / "tiny"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 2048
MAX_POSITIONS = 8192

TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def build() -> dict[str, str]:
    """File name → text of each asset."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
    )
    tokenizer.train_from_iterator(CORPUS.read_text(encoding="utf-8").splitlines(keepends=True), trainer)
    config = {
        "architectures": ["DynctlTinyForCausalLM"],
        "model_type": "dynctl-tiny",
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_hidden_layers": 2,
        "num_key_value_heads": 8,
        "max_position_embeddings": MAX_POSITIONS,
        "torch_dtype": "bfloat16",
        "vocab_size": tokenizer.get_vocab_size(),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=False) + "\n",
        "tokenizer_config.json": json.dumps(tokenizer_config, indent=2) + "\n",
        "config.json": json.dumps(config, indent=2) + "\n",
        "chat_template.jinja": TEMPLATE,
    }


def main(arguments: list[str]) -> int:
    """Write the assets, or with `--check` compare them; 1 when they differ."""
    files = build()
    if "--check" in arguments:
        stale = [n for n, text in files.items() if (ASSETS / n).read_text(encoding="utf-8") != text]
        if stale:
            sys.stderr.write(f"stale in {ASSETS}: {', '.join(stale)}; run this script without --check\n")
        return 1 if stale else 0
    ASSETS.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (ASSETS / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
