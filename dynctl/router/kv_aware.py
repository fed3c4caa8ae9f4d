"""Mode kv: the worker with the lowest cost, by what each holds of the prompt and has to do. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import msgspec

from dynctl.kv.hashing import OF_BYTES
from dynctl.kv.index import Index
from dynctl.protocol.instances import Role
from dynctl.protocol.specs import RouterSpec
from dynctl.router.active import Footprint
from dynctl.router.approximate import Recent
from dynctl.router.cost import Demand, Standings, costs, pick
from dynctl.router.guard import crowded
from dynctl.router.modes import loaded
from dynctl.router.request import Candidate, Picked, RouteRequest, Weighed, unhashed
from dynctl.router.shared import SharedBlocks


@dataclass(frozen=True, slots=True)
class Knowledge:
    """Where prompts are known to be: by KV events, in requests that run, in those that have ended."""

    index: Index
    running: SharedBlocks
    recent: Recent
    clock: Callable[[], float]


# gc=False: numbers only, so it can be part of no cycle.
class _Holdings(msgspec.Struct, frozen=True, gc=False):
    """By candidate: blocks of the prompt in any tier, the same weighed by tier, those in use by requests."""

    overlaps: list[int]
    credits: Sequence[float]
    running: list[int]


class _Field:
    """A list of candidates and what is read of each in every choice. Made anew when the list is another."""

    __slots__ = ("_generation", "_slots", "candidates", "likenesses", "loads", "memories", "running")

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self.candidates = candidates
        self.loads = [one.load for one in candidates]
        self.running = [load.place for load in self.loads]
        self.memories = [one.memory for one in candidates]
        self.likenesses = [one.likeness for one in candidates]
        self._slots: list[int] = []
        self._generation = -1

    def slots(self, index: Index) -> list[int]:
        """Where each is in `Index.depths`."""
        if self._generation != index.generation:
            self._slots = index.places(one.key for one in self.candidates)
            self._generation = index.generation
        return self._slots


class KvAware:
    """The lowest cost by `router.cost` among those that `router.guard` lets through; by requests alone
    for a prompt of unknown length.
    """

    def __init__(self, spec: RouterSpec, knowledge: Knowledge, rng: Random) -> None:
        self._spec = spec
        self._known = knowledge
        self._rng = rng
        self._fields: dict[Role, _Field] = {}

    def pick(self, request: RouteRequest, candidates: Sequence[Candidate], block_size: int) -> Picked:
        if not request.prompt_tokens:
            candidates = loaded(candidates, request.adapter)
        weighed = self.weigh(request, candidates, block_size)
        place = self._cheapest(weighed)
        overlap = weighed.overlaps[place]
        if not request.prefills or request.hashes is None:
            return Picked(candidates[place], 0, unhashed(request, block_size))
        hashes = request.hashes
        tokens = max(0, request.prompt_tokens - overlap * block_size)
        blocks = max(0, request.blocks(block_size) - len(hashes)) if request.decodes else 0
        best = max(weighed.overlaps)
        return Picked(candidates[place], overlap, Footprint(tokens, hashes, blocks), best)

    def weigh(self, request: RouteRequest, candidates: Sequence[Candidate], block_size: int) -> Weighed:
        field = self._field(request.role, candidates)
        loads = field.loads
        out = crowded(self._spec.guard, loads)
        if not request.prompt_tokens:
            return Weighed([load.requests for load in loads], [0] * len(loads), out)
        size, prefills = block_size, request.prefills
        demand = Demand(request.prompt_tokens, request.blocks(size), size, prefills, request.decodes)
        held = self._holdings(request.hashes if prefills else None, field)
        extra = self._spec.adapter_load_tokens if request.adapter else 0
        loading = [0 if one.has(request.adapter) else extra for one in candidates] if extra else None
        standings = Standings(loads, held.credits, held.running, loading)
        return Weighed(costs(self._spec, demand, standings), held.overlaps, out)

    def took(self, request: RouteRequest, picked: Picked) -> None:
        if request.hashes and picked.overlap:
            self._known.index.touch(request.hashes, picked.overlap)

    def _cheapest(self, weighed: Weighed) -> int:
        prices, out = weighed.prices, weighed.barred
        if out is None:
            return pick(prices, self._spec.temperature, self._rng)
        free = [place for place, no in enumerate(out) if not no]
        return free[pick([prices[place] for place in free], self._spec.temperature, self._rng)]

    def _field(self, role: Role, candidates: Sequence[Candidate]) -> _Field:
        """The same one as long as the role's candidates are the same list: until the membership changes."""
        field = self._fields.get(role)
        if field is None or field.candidates is not candidates:
            field = self._fields[role] = _Field(candidates)
        return field

    def _holdings(self, hashes: Sequence[int] | None, field: _Field) -> _Holdings:
        """A prompt that runs there counts as cached: it will be, when this request's turn comes."""
        if not hashes:
            none = [0] * len(field.loads)
            return _Holdings(none, none, none)
        known = self._known
        here = known.running.depths(hashes)
        running = [here[place] for place in field.running]
        device = _deeper(running, known.index.depths(hashes), field.slots(known.index))
        recent = known.recent.depths(hashes, known.clock())
        if recent is not None:
            recent.append(0)
            device = _deeper(device, recent, field.likenesses if hashes[-1] >= OF_BYTES else field.memories)
        if not known.index.tiered:
            return _Holdings(device, device, running)
        return self._with_tiers(hashes, field, device, running)

    def _with_tiers(
        self, hashes: Sequence[int], field: _Field, device: list[int], running: list[int]
    ) -> _Holdings:
        """Host and disk count for what they hold beyond the faster tiers."""
        index, spec = self._known.index, self._spec
        slots = field.slots(index)
        host = _deeper(device, index.depths(hashes, ("G1", "G2")), slots)
        disk = _deeper(host, index.depths(hashes, ("G1", "G2", "G3")), slots)
        credits = [
            fast + spec.host_tier_credit * (middle - fast) + spec.disk_tier_credit * (all_ - middle)
            for fast, middle, all_ in zip(device, host, disk, strict=True)
        ]
        return _Holdings(disk, credits, running)


def _deeper(depths: list[int], others: Sequence[int], places: Sequence[int]) -> list[int]:
    """For each candidate the larger of its depth and the one of `others` at its place, -1 = the last."""
    return [
        other if (other := others[place]) > depth else depth
        for depth, place in zip(depths, places, strict=True)
    ]
