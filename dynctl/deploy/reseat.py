"""Brings a run's seats in line with a new plan: which are new, which leave, which are started with another
command from now on. Pure; nothing is started or ended by it (see `controller.rolling`).
"""

from __future__ import annotations

from collections.abc import Collection

from dynctl.deploy.plan import Plan
from dynctl.deploy.records import SEAT_KINDS, seat_record
from dynctl.deploy.state import RunState, SeatRecord


def reseat(state: RunState, plan: Plan, restart: Collection[str] = ()) -> None:
    """Take over `plan`. Seats of `restart` are to be replaced also when nothing of theirs has changed.

    Doing it twice is doing it once. A seat beyond the replicas of its role only stands in for others.
    """
    state.url, state.backend, state.model = plan.url, plan.backend, plan.model
    state.roles = dict(plan.roles)
    planned = {p.id: seat_record(p, SEAT_KINDS[p.kind]) for p in plan.processes if p.kind in SEAT_KINDS}
    known = {seat.id: seat for seat in state.seats}
    for seat in state.seats:
        if seat.id not in planned:
            seat.asked = "leave"
        elif seat.id in restart:
            seat.asked = "restart"
    for seat_id, fresh in planned.items():
        if seat_id in known:
            _take_over(known[seat_id], fresh, stands_in=_stands_in(fresh, state))
        else:
            fresh.incarnation = state.retired.get(seat_id, 0)
    state.seats[:] = [known.get(seat_id, fresh) for seat_id, fresh in planned.items()] + [
        seat for seat in state.seats if seat.id not in planned
    ]
    for seat in state.seats:
        seat.surge = _stands_in(seat, state)


def _stands_in(seat: SeatRecord, state: RunState) -> bool:
    return seat.kind == "worker" and seat.index >= state.roles.get(seat.role, 0)


def _take_over(seat: SeatRecord, fresh: SeatRecord, *, stands_in: bool) -> None:
    """What the next incarnation of a seat is started with. One that was to leave and is wanted stays."""
    if seat.asked == "leave" and not stands_in:
        seat.asked, seat.takes = "restart", fresh.takes
    if not seat.digest:
        # A run of before there were digests: what lives was started with what is planned.
        seat.built = fresh.digest
    if not seat.pid:
        seat.node = fresh.node
    seat.digest, seat.gpus = fresh.digest, fresh.gpus
    seat.start_timeout_s = fresh.start_timeout_s
    seat.drain_timeout_s, seat.stop_timeout_s = fresh.drain_timeout_s, fresh.stop_timeout_s


def moved_seats(old: Plan, new: Plan) -> list[str]:
    """The workers that are on other nodes in `new`."""
    was = {process.id: [node for node, _ in process.spots] for process in old.processes}
    return [p.id for p in new.processes if p.kind == "worker" and was.get(p.id) != [n for n, _ in p.spots]]
