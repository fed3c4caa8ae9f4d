"""A running engine goes on in another seat: what becomes of the two seats, and how its sidecar is asked.

The seat that takes waits until the sidecar, drained, has become its own and registers as it; the process is
the giving seat's until then. Whatever fails on the way ends that process, and the taking seat starts one.
"""

from __future__ import annotations

from dynctl.controller.moves import HandOver, Kill
from dynctl.deploy.plan import PlannedProcess
from dynctl.deploy.state import RunState, SeatRecord
from dynctl.protocol.handover import Become
from dynctl.transport.control import ControlClient
from dynctl.transport.keys import Keys

ANSWER_S = 5.0


def give(seat: SeatRecord, taker: SeatRecord) -> HandOver:
    """Begin: `taker` gets the incarnation that the sidecar of `seat` is to become."""
    seat.state = "stopping"
    taker.incarnation += 1
    taker.built = taker.digest
    taker.engine_of = seat.engine_of or (seat.id, seat.incarnation)
    return HandOver(seat.id, taker.id, taker.incarnation)


def receive(state: RunState, taker: SeatRecord) -> bool:
    """The sidecar has become `taker`'s: so is its process. False when there is none to be had."""
    giver = state.seat(taker.takes)
    if taker.state != "waiting" or giver is None or not giver.pid:
        return False
    taker.pid, taker.start_ticks, taker.pgid = giver.pid, giver.start_ticks, giver.pgid
    taker.started_at, taker.engine_pid, taker.takes = giver.started_at, giver.engine_pid, ""
    giver.state = "stopped"
    giver.pid = giver.start_ticks = giver.pgid = giver.engine_pid = 0
    return True


def kills(state: RunState, seat: SeatRecord) -> list[Kill]:
    """What is left of a seat, by all the names it goes by: its own, those that its engine was started by, and
    those of the seat that it may have become already.
    """
    started = [seat.engine_of] if seat.engine_of is not None else []
    may_be = [(one.id, one.incarnation) for one in state.seats if one.takes == seat.id and one.incarnation]
    return [Kill(*names) for names in [(seat.id, seat.incarnation), *started, *may_be]]


def handed_over(state: RunState) -> list[tuple[SeatRecord, SeatRecord]]:
    """Those that are to take an engine, with those whose process may be theirs already."""
    found = []
    for seat in state.seats:
        giver = state.seat(seat.takes) if seat.state == "waiting" and seat.incarnation else None
        if giver is not None and giver.pid:
            found.append((seat, giver))
    return found


async def ask(keys: Keys, endpoint: str, process: PlannedProcess, incarnation: int) -> None:
    """Have the sidecar at `endpoint` say yes to becoming `process`. Raises TransportError, UsageError."""
    call = Become(
        id=process.id, incarnation=incarnation, spec=process.command.files[f"specs/{process.id}.json"]
    )
    client = ControlClient(keys, endpoint)
    try:
        await client.call("worker.become", call, type(None), ANSWER_S)
    finally:
        client.close()
