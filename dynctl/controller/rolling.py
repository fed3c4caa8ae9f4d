"""Which process is to be ended, started or forgotten next, so that a deployment becomes what its plan says
while it serves. Pure: only the state is looked at, so it can be gone on with from wherever it stopped.

What is added starts at once. What leaves or is drained is asked to end: the worker leaves routing, its
requests end, what is left of them goes on elsewhere; its engine may go on in a seat that is added. What is
to be replaced is so one replica at a time, a well one only while all others of its role are ready; where
there was room for one more, that stands in for it and leaves last. Frontends share a port: first those leave
that are to, then they are replaced, then more are started.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from dynctl.deploy.state import RunState, SeatRecord
from dynctl.topology.inventory import is_awaited


@dataclass(frozen=True, slots=True)
class Halt:
    """Ask the process of a seat to end; a seat without one is to stay so."""

    id: str


@dataclass(frozen=True, slots=True)
class Open:
    """Start the next incarnation of a seat."""

    id: str


@dataclass(frozen=True, slots=True)
class Part:
    """A seat that stood in for others is to leave."""

    id: str


@dataclass(frozen=True, slots=True)
class Give:
    """A seat that leaves is to hand its running engine over to seat `to`."""

    id: str
    to: str


@dataclass(frozen=True, slots=True)
class Drop:
    """A seat that has left is to be forgotten."""

    id: str


Move = Halt | Open | Part | Give | Drop


@dataclass(frozen=True, slots=True)
class Unit:
    """All seats of one replica: the head, and those of its further nodes."""

    seats: tuple[SeatRecord, ...]

    @property
    def role(self) -> str:
        """The role of all of them."""
        return self.seats[0].role

    @property
    def leaving(self) -> bool:
        """It is to be removed."""
        return any(seat.asked == "leave" for seat in self.seats)

    @property
    def held(self) -> bool:
        """It is drained, or to be."""
        return not self.leaving and any(seat.asked == "drain" for seat in self.seats)

    @property
    def stale(self) -> bool:
        """It is to be replaced."""
        return not (self.leaving or self.held) and any(map(_stale, self.seats))

    @property
    def fresh(self) -> bool:
        """It has never been started."""
        return all(seat.state == "waiting" for seat in self.seats)

    @property
    def running(self) -> bool:
        """Something of it lives, or is being started."""
        return any(map(_running, self.seats))

    @property
    def halting(self) -> bool:
        """It has been asked to end, and not been started again since."""
        return any(seat.state in ("stopping", "stopped") for seat in self.seats)

    @property
    def ready(self) -> bool:
        """It serves."""
        return all(seat.state == "ready" for seat in self.seats)

    @property
    def surge(self) -> bool:
        """It stands in for others."""
        return self.seats[0].surge

    @property
    def awaits(self) -> bool:
        """A node of it is still to be given."""
        return any(is_awaited(seat.node) for seat in self.seats)

    @property
    def spots(self) -> set[tuple[str, int]]:
        """The GPUs it has."""
        return {(seat.node, gpu) for seat in self.seats for gpu in seat.gpus}


def moves(state: RunState, frozen: Collection[str] = ()) -> list[Move]:
    """What to do now. `frozen` are nodes that cannot be reached: what is there is left alone. So is what
    awaits a node, unless it leaves.
    """
    units = units_of(state)
    reached = [unit for unit in units if not any(seat.node in frozen for seat in unit.seats)]
    able = [unit for unit in reached if unit.leaving or not unit.awaits]
    made: list[Move] = []
    for unit in able:
        if unit.leaving:
            made += _leave(unit, state)
        elif unit.held:
            made += _halt(unit)
        elif unit.surge and _stood_in(unit, units):
            made += [Part(seat.id) for seat in unit.seats]
        elif _may_open(unit, units):
            made += [Open(seat.id) for seat in unit.seats]
        elif unit.stale and unit.halting:
            made += _halt(unit)
    return made or _next_halt(able, units)


def settled(state: RunState) -> bool:
    """Whether there are no moves and nothing is changing, by one quick look at each seat."""
    return not any(
        seat.state == "waiting" or seat.asked or seat.rolled or seat.surge or _stale(seat)
        for seat in state.seats
    )


def units_of(state: RunState) -> list[Unit]:
    """The replicas, workers before frontends."""
    found: dict[tuple[bool, str, int], list[SeatRecord]] = {}
    for seat in state.seats:
        found.setdefault((seat.kind == "frontend", seat.role, seat.index), []).append(seat)
    ordered = sorted(found.items(), key=lambda item: item[0][0])
    return [Unit(tuple(sorted(seats, key=lambda s: s.follower))) for _, seats in ordered]


def changing(state: RunState, lost: Collection[str] = ()) -> str:
    """What is not as it is to be yet, for people, and on which `lost` nodes; "" when all is done."""
    said: list[str] = []
    for unit in units_of(state):
        head, before = unit.seats[0], len(said)
        if unit.leaving:
            taker = taker_of(state, head)
            said.append(f"{head.id} leaves" if taker is None else f"{head.id} becomes {taker.id}")
        elif unit.awaits:
            said.append(f"{head.id} awaits a node")
        elif unit.held:
            if any(seat.state != "drained" for seat in unit.seats):
                said.append(f"{head.id} drains")
        elif unit.surge:
            said.append(f"{head.id} stands in")
        elif unit.stale:
            said.append(f"{head.id} is to be replaced")
        elif unit.fresh and state.seat(head.takes) is not None:
            continue  # said of the one that becomes it
        elif unit.fresh or any(seat.rolled and seat.state != "ready" for seat in unit.seats):
            said.append(f"{head.id} is {head.state}")
        if len(said) > before and head.node in lost:
            said[-1] += f" (its node {head.node} does not answer)"
    return ", ".join(said)


def _stale(seat: SeatRecord) -> bool:
    return seat.asked == "restart" or bool(seat.built and seat.built != seat.digest)


def _running(seat: SeatRecord) -> bool:
    return bool(seat.pid) or seat.state == "starting"


def _ailing(seat: SeatRecord) -> bool:
    """It does not serve, and not only because its controller is new."""
    return seat.state in ("silent", "backoff", "failed") or (seat.state == "starting" and not seat.was_ready)


def _leave(unit: Unit, state: RunState) -> list[Move]:
    """Hand over to the seat that waits for its engine, if what runs is well and what is planned; else end."""
    head = unit.seats[0]
    taker = taker_of(state, head)
    well = head.state == "ready" and bool(head.pid) and head.built == head.digest
    if taker is not None and not taker.asked and well:
        return [Give(head.id, taker.id)]
    if unit.running:
        return _halt(unit)
    giver = state.seat(head.takes)
    if head.incarnation and giver is not None and _running(giver):
        return []  # it may be on its way to become this one: it is asked to leave then
    return [Drop(seat.id) for seat in unit.seats]


def taker_of(state: RunState, seat: SeatRecord) -> SeatRecord | None:
    """The seat that waits for the engine of this one."""
    return next((one for one in state.seats if one.takes == seat.id and one.state == "waiting"), None)


def _halt(unit: Unit) -> list[Move]:
    """The head first; what else there is of the replica once that has ended."""
    heads = [seat for seat in unit.seats if not seat.follower]
    wave = heads if any(map(_running, heads)) else unit.seats
    return [Halt(seat.id) for seat in wave if _to_halt(seat)]


def _to_halt(seat: SeatRecord) -> bool:
    if _running(seat):
        return bool(seat.pid) and seat.state != "stopping"
    return seat.state not in (("drained",) if seat.asked == "drain" else ("stopped", "drained"))


def _stood_in(surge: Unit, units: Sequence[Unit]) -> bool:
    """Whether a stand-in is needed no more, or is none."""
    if any(seat.state == "failed" for seat in surge.seats):
        return True
    others = [u for u in units if u.role == surge.role and not (u.surge or u.leaving or u.held)]
    return all(unit.ready and not unit.stale for unit in others)


def _may_open(unit: Unit, units: Sequence[Unit]) -> bool:
    """Whether a replica that is new, or has ended to be replaced, can start now."""
    if unit.running or not (unit.fresh or unit.stale):
        return False
    others = [other for other in units if other is not unit]
    takes = {seat.takes for seat in unit.seats}
    if any(other.running and (other.spots & unit.spots or other.seats[0].id in takes) for other in others):
        return False
    if unit.role != "frontend" or not unit.fresh:
        return True
    return not any(other.role == "frontend" and (other.leaving or other.stale) for other in others)


def _next_halt(able: Sequence[Unit], units: Sequence[Unit]) -> list[Move]:
    """The one replica to be ended next in order to be replaced."""
    stale = [unit for unit in able if unit.stale and unit.running and not unit.halting]
    ailing = [unit for unit in stale if any(map(_ailing, unit.seats))]
    if ailing:
        # It serves nobody: nothing is lost by ending it now.
        return _halt(ailing[0])
    if any(unit.stale and unit.halting for unit in units):
        return []
    staying = [unit for unit in units if not (unit.leaving or unit.held or unit.fresh)]
    if any(seat.state == "starting" for unit in staying for seat in unit.seats):
        return []
    settled = [unit for unit in staying if not unit.stale]
    for unit in stale:
        if all(other.ready for other in settled if other.role == unit.role):
            return _halt(unit)
    return []
