"""The router modes by name."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from dynctl.errors import RecipeError
from dynctl.protocol.specs import RouterSpec
from dynctl.router.kv_aware import Knowledge, KvAware
from dynctl.router.modes import AnyOne, ConsistentHash, LeastLoaded, PowerOfTwo, RoundRobin
from dynctl.router.request import Policy

_MODES: dict[str, Callable[[RouterSpec, Knowledge, Random], Policy]] = {
    "kv": KvAware,
    "least_loaded": lambda spec, known, rng: LeastLoaded(rng),
    "round_robin": lambda spec, known, rng: RoundRobin(),
    "random": lambda spec, known, rng: AnyOne(rng),
    "power_of_two": lambda spec, known, rng: PowerOfTwo(rng),
    "consistent_hash": lambda spec, known, rng: ConsistentHash(spec.guard, rng),
}


def policy(spec: RouterSpec, knowledge: Knowledge, rng: Random) -> Policy:
    """The policy `spec.mode` names. Raises RecipeError for a mode there is not."""
    made = _MODES.get(spec.mode)
    if made is None:
        valid = ", ".join(_MODES)
        raise RecipeError(f"unknown router mode {spec.mode!r}", where="router.mode", hint=f"valid: {valid}")
    return made(spec, knowledge, rng)
