"""The ways to choose a worker that need not know what it has cached. Pure but for round robin's turn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from random import Random

from xxhash import xxh3_64_intdigest

from dynctl.kv.index import SlotKey
from dynctl.protocol.instances import Role
from dynctl.protocol.specs import GuardSpec
from dynctl.router.cost import pick
from dynctl.router.guard import crowded
from dynctl.router.request import Candidate, Picked, RouteRequest, Weighed, unhashed


class _ByLoad(ABC):
    """What these modes have in common: requests in flight are the price, no block is told from another."""

    def pick(self, request: RouteRequest, candidates: Sequence[Candidate], block_size: int) -> Picked:
        among = loaded(candidates, request.adapter)
        return Picked(self._one(request, among), 0, unhashed(request, block_size))

    def weigh(self, request: RouteRequest, candidates: Sequence[Candidate], block_size: int) -> Weighed:
        return Weighed([float(one.load.requests) for one in candidates], [0] * len(candidates))

    def took(self, request: RouteRequest, picked: Picked) -> None:
        return

    @abstractmethod
    def _one(self, request: RouteRequest, candidates: Sequence[Candidate]) -> Candidate:
        """Choose among `candidates`, of which there is at least one."""


class RoundRobin(_ByLoad):
    """Each (worker, rank) of a role in turn; the turn survives members that come and go."""

    def __init__(self) -> None:
        self._last: dict[Role, SlotKey] = {}

    def _one(self, request: RouteRequest, candidates: Sequence[Candidate]) -> Candidate:
        last = self._last.get(request.role)
        if last is None:
            return candidates[0]
        return next((one for one in candidates if one.key > last), candidates[0])

    def took(self, request: RouteRequest, picked: Picked) -> None:
        self._last[request.role] = picked.candidate.key


class LeastLoaded(_ByLoad):
    """The fewest requests, ours and others'; ties at random."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def _one(self, request: RouteRequest, candidates: Sequence[Candidate]) -> Candidate:
        return candidates[pick([one.load.requests for one in candidates], 0.0, self._rng)]


class AnyOne(_ByLoad):
    """Any, with the same chance."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def _one(self, request: RouteRequest, candidates: Sequence[Candidate]) -> Candidate:
        return candidates[self._rng.randrange(len(candidates))]


class PowerOfTwo(_ByLoad):
    """Of two at random the one with fewer requests."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def _one(self, request: RouteRequest, candidates: Sequence[Candidate]) -> Candidate:
        if len(candidates) == 1:
            return candidates[0]
        first, second = self._rng.sample(candidates, 2)
        return second if second.load.requests < first.load.requests else first


class ConsistentHash(_ByLoad):
    """The same worker for the same session (or, without one, prompt beginning), while it is not crowded.

    Each (worker, rank) has a weight for each key and the highest one wins (rendezvous hashing): one that
    comes or goes moves only its own keys. Crowded as by `router.guard`. Without a key: the fewest requests.
    """

    def __init__(self, guard: GuardSpec, rng: Random) -> None:
        self._guard = guard
        self._by_load = LeastLoaded(rng)

    def _one(self, request: RouteRequest, candidates: Sequence[Candidate]) -> Candidate:
        if request.session:
            seed = session_seed(request.session)
        elif request.hashes:
            seed = request.hashes[0]
        else:
            return self._by_load._one(request, candidates)
        out = crowded(self._guard, [one.load for one in candidates])
        free = candidates if out is None else [one for one, no in zip(candidates, out, strict=True) if not no]
        return home(seed, free)


def session_seed(session: str) -> int:
    """The number that `home` is asked with for a session."""
    return xxh3_64_intdigest(session.encode())


def home(seed: int, candidates: Sequence[Candidate]) -> Candidate:
    """The one of `candidates` with the highest weight for `seed`: the same wherever they are the same."""
    return max(
        candidates, key=lambda one: xxh3_64_intdigest(b"%s %d" % (one.key[0].encode(), one.key[1]), seed)
    )


def loaded(candidates: Sequence[Candidate], adapter: str) -> Sequence[Candidate]:
    """Those that have `adapter` loaded; all when none has."""
    return ([one for one in candidates if one.has(adapter)] if adapter else None) or candidates
