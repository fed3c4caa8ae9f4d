"""What an OpenAI request asks for, as far as prefill/decode contracts depend on it. Pure."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from dynctl.engines.base import Canary, Json


def one_sequence(request: Json) -> bool:
    """Whether one prompt is continued once: no batch of prompts, no `n`, no beams."""
    if any(_above_one(request.get(name)) for name in ("n", "best_of")) or request.get("use_beam_search"):
        return False
    return all(_single(request.get(name)) for name in ("prompt", "prompt_embeds"))


def prompt_logprobs(request: Json) -> bool:
    """Whether the answer must tell probabilities of the prompt's tokens, which only computing them gives."""
    asked = request.get("prompt_logprobs")
    echoed = request.get("echo") and request.get("logprobs") is not None
    return bool(echoed) or (asked is not None and asked is not False)


def transferable(request: Json) -> bool:
    """Whether one worker can compute the prompt and another one answer from its KV blocks."""
    return one_sequence(request) and not prompt_logprobs(request)


def _above_one(value: object) -> bool:
    return value is not None and value != 1


def _single(prompt: object) -> bool:
    """A text, one list of token ids, or a list with one of them."""
    if not isinstance(prompt, list) or len(prompt) == 1:
        return True
    return all(isinstance(item, int) for item in prompt)


def prompts(request: Json) -> int:
    """How many prompts a completion request holds; 1 for a chat."""
    given = request.get("prompt")
    return 1 if _single(given) or not isinstance(given, list) else len(given)


def host_of(url: str) -> str:
    """The host of a worker's base URL as it is written in one; "" when there is none."""
    host = urlsplit(url).hostname or ""
    return f"[{host}]" if ":" in host else host


def one_token(model: str, **fields: Any) -> Canary:
    """A completion of one token from a prompt too short to fill a block, so that no cache keeps it."""
    body: Json = {"model": model, "prompt": "1", "max_tokens": 1, "temperature": 0, "stream": False}
    return Canary("/v1/completions", {**body, **fields})
