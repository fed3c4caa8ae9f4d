"""A supervisor for tests, with a clock that is turned by hand."""

from __future__ import annotations

from typing import Any

from dynctl.controller.moves import (
    Begin,
    Event,
    Exited,
    Finish,
    Instruction,
    Note,
    Seen,
    Start,
    Started,
    Tick,
)
from dynctl.controller.supervise import Supervisor
from dynctl.deploy.state import RunState, SeatKind, SeatRecord
from dynctl.protocol.exits import LastWords


def seat(seat_id: str, kind: SeatKind = "worker", **fields: Any) -> SeatRecord:
    role, _, index = seat_id.partition("-")
    number = int(index.split(".")[0])
    return SeatRecord(
        id=seat_id, kind=kind, role=role, index=number, node="n", start_timeout_s=100.0, **fields
    )


def run_state(*seats: SeatRecord) -> RunState:
    return RunState(
        name="d",
        run_id="r",
        url="http://h",
        registry="tcp://h",
        backend="b",
        model="m",
        roles={"decode": 1},
        created_at=0.0,
        seats=list(seats),
    )


class Bench:
    """A supervisor with a clock, whose starts succeed at once unless told otherwise."""

    def __init__(self, *seats: SeatRecord, begin: bool = True) -> None:
        self.state = run_state(*(seats or (seat("frontend-0", "frontend"), seat("decode-0"))))
        self.supervisor = Supervisor(self.state)
        self.now = 1000.0
        self.pid = 100
        self.notes: list[Note] = []
        self.finished = False
        if begin:
            self.tell(Begin())

    def tell(self, event: Event, *, start: bool = True) -> list[Instruction]:
        """The instructions but notes; starts are answered with Started."""
        done: list[Instruction] = []
        for instruction in self.supervisor.handle(event, self.now):
            if isinstance(instruction, Note):
                self.notes.append(instruction)
                continue
            done.append(instruction)
            self.finished = self.finished or isinstance(instruction, Finish)
            if isinstance(instruction, Start) and start:
                self.pid += 1
                started = Started(instruction.id, instruction.incarnation, self.pid, 1, self.pid, 0.0)
                done += self.tell(started)
        return done

    def after(self, seconds: float, *, start: bool = True) -> list[Instruction]:
        self.now += seconds
        return self.tell(Tick(), start=start)

    def seat(self, seat_id: str = "decode-0") -> SeatRecord:
        found = self.state.seat(seat_id)
        assert found is not None
        return found

    def phase(self) -> str:
        return self.state.phase

    def ready(self, *ids: str) -> None:
        for seat_id in ids or ("frontend-0", "decode-0"):
            self.tell(Seen(seat_id, self.seat(seat_id).incarnation, "ready", "http://x", 7))

    def exit(
        self,
        seat_id: str = "decode-0",
        code: int | None = -9,
        words: LastWords | None = None,
        lines: str = "",
    ) -> list[Instruction]:
        kept = tuple(lines.splitlines())
        return self.tell(Exited(seat_id, self.seat(seat_id).incarnation, code, words, kept))

    def noted(self) -> list[str]:
        return [note.event for note in self.notes]


def words(message: str = "no memory", kind: str = "launch", **fields: Any) -> LastWords:
    return LastWords(id="decode-0", incarnation=1, kind=kind, message=message, lines=["boom"], **fields)
