"""Which worker a session goes to. Pure: `now_s` is passed in.

A frontend alone remembers where each session went last; the longest unused are forgotten. Several must agree
without asking each other, also when one of them has just been started: there a session has a home, by hash.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from dynctl.kv.index import SlotKey
from dynctl.protocol.instances import Role
from dynctl.protocol.specs import AffinitySpec, GuardSpec
from dynctl.router.guard import crowded
from dynctl.router.modes import home, session_seed
from dynctl.router.request import Candidate, RouteRequest

_ROLES: tuple[Role, ...] = ("prefill", "decode", "aggregated")


class Sessions:
    """The (worker, rank) of each session and role, for `ttl_s` after its last request."""

    def __init__(self, spec: AffinitySpec) -> None:
        self._spec = spec
        self._places: OrderedDict[tuple[Role, str], tuple[SlotKey, float]] = OrderedDict()

        self.several = False
        """Whether other frontends have to come to the same answer."""

    def __len__(self) -> int:
        return len(self._places)

    def narrowed(
        self, request: RouteRequest, candidates: Sequence[Candidate], guard: GuardSpec, now_s: float
    ) -> Sequence[Candidate]:
        """The one of `candidates` that the request's session is at; all when it may go anywhere.

        Soft: that is so as well while the guard keeps requests from it.
        """
        key = self._home(request, candidates) or self.place(request.role, request.session, now_s)
        place = next((i for i, one in enumerate(candidates) if one.key == key), None) if key else None
        if place is None:
            return candidates
        if self._spec.mode != "hard":
            out = crowded(guard, [one.load for one in candidates])
            if out is not None and out[place]:
                return candidates
        return [candidates[place]]

    def _home(self, request: RouteRequest, candidates: Sequence[Candidate]) -> SlotKey | None:
        """Where all frontends send the session; None where each remembers for itself."""
        if not self.several or not request.session or self._spec.mode == "off" or not candidates:
            return None
        return home(session_seed(request.session), candidates).key

    def place(self, role: Role, session: str, now_s: float) -> SlotKey | None:
        """Where the session is, None when that is not known (any more)."""
        if not session or self._spec.mode == "off":
            return None
        found = self._places.get((role, session))
        if found is None or found[1] <= now_s:
            return None
        return found[0]

    def note(self, role: Role, session: str, key: SlotKey, now_s: float) -> None:
        """A request of the session went there."""
        if not session or self._spec.mode == "off" or self.several:
            return
        places = self._places
        places[role, session] = (key, now_s + self._spec.ttl_s)
        places.move_to_end((role, session))
        while places and (len(places) > self._spec.sessions or _first_end(places) <= now_s):
            places.popitem(last=False)

    def end(self, session: str) -> None:
        """No further request of the session comes."""
        for role in _ROLES:
            self._places.pop((role, session), None)


def _first_end(places: OrderedDict[tuple[Role, str], tuple[SlotKey, float]]) -> float:
    return next(iter(places.values()))[1]
