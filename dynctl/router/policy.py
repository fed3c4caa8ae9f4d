"""Three ways to choose among the workers of a role. Pure but for the order that round robin remembers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

from dynctl.errors import RecipeError
from dynctl.kv.index import Index, SlotKey
from dynctl.protocol.instances import Instance, Role
from dynctl.protocol.specs import RouterSpec
from dynctl.router.active import Footprint, RankLoad
from dynctl.router.cost import Demand, costs, pick
from dynctl.router.shared import SharedBlocks

MODES = ("round_robin", "least_loaded", "kv")


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """What is to be placed.

    `hashes`: sequence hashes of the prompt's full blocks in the router's block size; None = tokens unknown.
    `prompt_tokens`: 0 = unknown. `expected_output` in tokens: an estimate, not the client's upper limit;
    None = unknown. `exclude`: instance ids not to choose (they have just failed this request).
    `adapter`: LoRA name, "" = the model itself. `session`: "" = none. `pinned`: the instance id the client
    asks for, "" = any; `pinned_rank` likewise. `priority`: higher goes first where requests wait.
    """

    role: Role
    hashes: Sequence[int] | None = None
    prompt_tokens: int = 0
    expected_output: int | None = None
    exclude: frozenset[str] = frozenset()
    adapter: str = ""
    session: str = ""
    pinned: str = ""
    pinned_rank: int | None = None
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Candidate:
    """One (worker, rank) that may be chosen."""

    key: SlotKey
    instance: Instance
    load: RankLoad


@dataclass(frozen=True, slots=True)
class Picked:
    """A choice, with the prompt's blocks cached there and what the request will add to its load."""

    candidate: Candidate
    overlap: int
    footprint: Footprint


class Policy(Protocol):
    """One router mode."""

    def pick(self, request: RouteRequest, candidates: Sequence[Candidate], block_size: int) -> Picked:
        """Choose among `candidates` (at least one, sorted by key). `block_size` in tokens, at least 1."""
        ...


def policy(spec: RouterSpec, index: Index, shared: SharedBlocks, rng: Random) -> Policy:
    """The policy `spec.mode` names. Raises RecipeError for a mode there is not."""
    if spec.mode == "round_robin":
        return RoundRobin()
    if spec.mode == "least_loaded":
        return LeastLoaded(rng)
    if spec.mode == "kv":
        return KvAware(spec, index, shared, rng)
    raise RecipeError(
        f"unknown router mode {spec.mode!r}", where="router.mode", hint="valid: " + ", ".join(MODES)
    )


class RoundRobin:
    """Each (worker, rank) of a role in turn; the turn survives members that come and go."""

    def __init__(self) -> None:
        self._last: dict[Role, SlotKey] = {}

    def pick(self, request: RouteRequest, candidates: Sequence[Candidate], block_size: int) -> Picked:
        last = self._last.get(request.role)
        chosen = candidates[0]
        if last is not None:
            chosen = next((candidate for candidate in candidates if candidate.key > last), chosen)
        self._last[request.role] = chosen.key
        return Picked(chosen, 0, _unhashed(request, block_size))


class LeastLoaded:
    """The fewest requests, ours and others'; ties at random."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def pick(self, request: RouteRequest, candidates: Sequence[Candidate], block_size: int) -> Picked:
        chosen = candidates[pick([candidate.load.requests for candidate in candidates], 0.0, self._rng)]
        return Picked(chosen, 0, _unhashed(request, block_size))


class KvAware:
    """The lowest cost by `router.cost`; by load alone for a request whose tokens are unknown."""

    def __init__(self, spec: RouterSpec, index: Index, shared: SharedBlocks, rng: Random) -> None:
        self._spec = spec
        self._index = index
        self._shared = shared
        self._rng = rng
        self._by_load = LeastLoaded(rng)

    def pick(self, request: RouteRequest, candidates: Sequence[Candidate], block_size: int) -> Picked:
        if request.role == "decode":
            return self._decode(request, candidates, block_size)
        if request.hashes is None:
            return self._by_load.pick(request, candidates, block_size)
        hashes = request.hashes
        demand = Demand(request.role, request.prompt_tokens, _blocks(request, block_size), block_size)
        overlaps = self._index.match(hashes, [candidate.key for candidate in candidates])
        spec, both = self._spec, request.role == "aggregated"
        shared = self._shared.depths(hashes if both else ())
        standings = [(one.load, overlaps.get(one.key, 0), shared[one.load.place]) for one in candidates]
        chosen = candidates[pick(costs(spec, demand, standings), spec.temperature, self._rng)]
        overlap = overlaps.get(chosen.key, 0)
        tokens = max(0, request.prompt_tokens - overlap * block_size)
        if not both:
            return Picked(chosen, overlap, Footprint(tokens))
        return Picked(chosen, overlap, Footprint(tokens, hashes, max(0, demand.blocks - len(hashes))))

    def _decode(self, request: RouteRequest, candidates: Sequence[Candidate], block_size: int) -> Picked:
        """The decode leg: blocks in use alone; each request's KV arrives whole, so none is shared."""
        if not request.prompt_tokens:
            return self._by_load.pick(request, candidates, block_size)
        demand = Demand(request.role, request.prompt_tokens, _blocks(request, block_size), block_size)
        prices = costs(self._spec, demand, [(candidate.load, 0, 0) for candidate in candidates])
        chosen = candidates[pick(prices, self._spec.temperature, self._rng)]
        return Picked(chosen, 0, Footprint(0, (), demand.blocks))


def _blocks(request: RouteRequest, block_size: int) -> int:
    """Blocks that the prompt and the expected output fill, the last one perhaps in part."""
    return -(-(request.prompt_tokens + (request.expected_output or 0)) // block_size)


def _unhashed(request: RouteRequest, block_size: int) -> Footprint:
    """The load of a request whose blocks are not told apart."""
    return Footprint(
        0 if request.role == "decode" else request.prompt_tokens,
        (),
        0 if request.role == "prefill" else _blocks(request, block_size),
    )
