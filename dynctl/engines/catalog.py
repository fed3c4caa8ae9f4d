"""Which engines there are: the recipe's `backend` name to the engine's contract."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import cast

from dynctl.engines.base import Engine, PrefillDecode
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


def takes_either_role(backend: str, transfer: str = "") -> bool:
    """Whether its engines, with that way to move the KV cache ("" = its default), are started alike for
    prefill and decode, so that one may change its role while it runs.
    """
    engine = get(backend)
    return (transfer or next(iter(engine.transfers), "")) in engine.either_role


def contract(backend: str, transfer: str = "") -> PrefillDecode | None:
    """The prefill/decode contract of that way to move the KV cache, "" the engine's default; None = none.

    Raises RecipeError for a name the engine does not have.
    """
    found = get(backend).transfers
    if not transfer:
        return next(iter(found.values()), None)
    try:
        return found[transfer]
    except KeyError:
        known = ", ".join(found) or "none"
        raise RecipeError(f"backend {backend} has no KV transfer {transfer!r}", hint=known) from None
