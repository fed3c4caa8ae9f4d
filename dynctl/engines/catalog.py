"""Which engines there are: the recipe's `backend` name to the engine's contract."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import cast

from dynctl.engines.base import Engine
from dynctl.errors import RecipeError

_ENGINES = {
    "vllm": "dynctl.engines.vllm:Vllm",
    "sglang": "dynctl.engines.sglang:Sglang",
    "trtllm": "dynctl.engines.trtllm:Trtllm",
    "mocker": "dynctl.engines.mocker:Mocker",
    "external": "dynctl.engines.external:External",
}


def names() -> tuple[str, ...]:
    """All backend names, in the order the documentation lists them."""
    return tuple(_ENGINES)


@cache
def get(backend: str) -> Engine:
    """The engine of that name; one object per process. Raises RecipeError for a name that is none."""
    try:
        module, _, attribute = _ENGINES[backend].partition(":")
    except KeyError:
        raise RecipeError(f"unknown backend {backend!r}", hint=f"one of {', '.join(_ENGINES)}") from None
    return cast(Engine, getattr(import_module(module), attribute)())
