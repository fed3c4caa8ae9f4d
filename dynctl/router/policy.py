"""The router modes by name."""

from __future__ import annotations

from random import Random

from dynctl.errors import RecipeError
from dynctl.protocol.specs import RouterSpec
from dynctl.router.kv_aware import Knowledge, KvAware
from dynctl.router.modes import AnyOne, ConsistentHash, LeastLoaded, PowerOfTwo, RoundRobin
from dynctl.router.request import Candidate, Picked, Policy, RouteRequest

__all__ = ["Candidate", "Picked", "Policy", "RouteRequest", "policy"]

MODES = ("kv", "least_loaded", "round_robin", "random", "power_of_two", "consistent_hash")


def policy(spec: RouterSpec, knowledge: Knowledge, rng: Random) -> Policy:
    """The policy `spec.mode` names. Raises RecipeError for a mode there is not."""
    match spec.mode:
        case "kv":
            return KvAware(spec, knowledge, rng)
        case "least_loaded":
            return LeastLoaded(rng)
        case "round_robin":
            return RoundRobin()
        case "random":
            return AnyOne(rng)
        case "power_of_two":
            return PowerOfTwo(rng)
        case "consistent_hash":
            return ConsistentHash(spec.guard, rng)
    raise RecipeError(
        f"unknown router mode {spec.mode!r}", where="router.mode", hint="valid: " + ", ".join(MODES)
    )
