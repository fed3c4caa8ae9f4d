"""A model directory for engines that see images: the mocker's tokenizer and three tokens more, a template."""

from __future__ import annotations

import base64
import json
import random
import shutil
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from tests.make_tiny_tokenizer import ASSETS

START, IMAGE, END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
TEMPLATE = f"""\
{{%- for message in messages -%}}
{{{{- '<|im_start|>' + message.role + '\\n' -}}}}
{{%- if message.content is string -%}}{{{{- message.content -}}}}
{{%- else -%}}{{%- for part in message.content -%}}
{{%- if part.type == 'image' -%}}{{{{- '{START}{IMAGE}{END}' -}}}}
{{%- else -%}}{{{{- part.text -}}}}{{%- endif -%}}
{{%- endfor -%}}{{%- endif -%}}
{{{{- '<|im_end|>\\n' -}}}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{- '<|im_start|>assistant\\n' -}}}}{{%- endif -%}}
"""


def write(folder: Path) -> int:
    """Fill `folder`; returns the token that stands for an image."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(ASSETS / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in (START, IMAGE, END)])
    tokenizer.save(str(folder / "tokenizer.json"))
    shutil.copy(ASSETS / "tokenizer_config.json", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    token = int(tokenizer.token_to_id(IMAGE) or 0)
    config = json.loads((ASSETS / "config.json").read_text())
    config |= {"vocab_size": tokenizer.get_vocab_size(), "image_token_id": token}
    (folder / "config.json").write_text(json.dumps(config))
    return token


def image(number: int, size_bytes: int = 3000) -> dict[str, Any]:
    """A content part with an image (for what engines make of it here any bytes will do)."""
    data = base64.b64encode(random.Random(number).randbytes(size_bytes)).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def text(words: str) -> dict[str, Any]:
    """A content part with text."""
    return {"type": "text", "text": words}
