"""What becomes of each request: through router and engines, on one worker or by prefill and decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

from dynctl.errors import Rejected
from dynctl.frontend.queue import Ask
from dynctl.mocker.scheduler import Output
from dynctl.mocker.scheduler import Sequence as Running
from dynctl.perfmodel.trace import PRIVATE, TraceRequest
from dynctl.protocol.instances import Role
from dynctl.router.active import Ticket
from dynctl.router.request import RouteRequest
from dynctl.router.service import Router
from dynctl.simulator.clock import Clock
from dynctl.simulator.door import Door
from dynctl.simulator.fleet import Fleet

_ANSWERS = PRIVATE << 4
"""Hashes from here on are of blocks with what an engine said."""


@dataclass(slots=True)
class Answer:
    """One request's fate. `cached`: prompt tokens found in the cache of whoever computed the prompt.
    `end`: done or refused, "" while it goes on.
    """

    arrived_s: float
    first_s: float | None = None
    ended_s: float | None = None
    tokens: int = 0
    cached: int = 0
    end: str = ""

    @property
    def ttft_s(self) -> float | None:
        """From its arrival to its first token."""
        return None if self.first_s is None else self.first_s - self.arrived_s

    @property
    def itl_s(self) -> float | None:
        """Mean time between its tokens; None for one of a single token, or none."""
        if self.first_s is None or self.ended_s is None or self.tokens < 2:
            return None
        return (self.ended_s - self.first_s) / (self.tokens - 1)


@dataclass(slots=True)
class _Leg:
    """A sequence's owner: the request, where it is, whether what it says is the answer."""

    number: int
    where: str
    ticket: Ticket
    answers: bool
    prefilled_by: str = ""
    begun: bool = False


class _Source:
    """A model that says the same token all the time."""

    def next(self, eos_allowed: bool) -> int:
        return 1


_SOURCE = _Source()


class Desk:
    """All requests of a run. `hashes` are those of the prompts, `size` the tokens of a block.

    `begun` and `over` are the numbers of those with a first token, and at their end, in that order. `on_end`
    is called at each end.
    """

    def __init__(
        self,
        requests: Sequence[TraceRequest],
        hashes: Sequence[tuple[int, ...]],
        size: int,
        parts: tuple[Router, Fleet, Clock],
        on_end: Callable[[], None],
    ) -> None:
        self.answers: dict[int, Answer] = {}
        self.begun: list[int] = []
        self.over: list[int] = []
        self.door: Door
        self._requests = requests
        self._hashes = hashes
        self._size = size
        self._router, self._fleet, self._clock = parts
        self._on_end = on_end
        self._said = count(_ANSWERS)
        self._split = any(one.group.role == "prefill" for one in self._fleet.living)

    def arrive(self, number: int) -> None:
        """A request comes in now."""
        self.answers[number] = Answer(self._clock.now_s)
        self.door.come(number, Ask(tokens=self._requests[number].prompt_tokens))

    def refuse(self, number: int) -> None:
        """It is told to come again later."""
        self._over(number, "refused")

    def route(self, number: int) -> None:
        """Its turn: on to a worker, or to the two of prefill and decode."""
        if not self._split:
            self._send(number, "aggregated")
        elif self._router.skips_prefill(self._asked(number, "decode"), full=self.door.full("prefill")):
            self._send(number, "decode", reads=True)
        else:
            self._send(number, "prefill")

    def said(self, engine: str, outputs: list[Output]) -> None:
        """Tokens of a step: first ones and last ones matter."""
        now_s = self._clock.now_s
        for seq, _, reason in outputs:
            leg: _Leg = seq.owner
            if not leg.begun:
                leg.begun = True
                leg.ticket.first_token()
                answer = self.answers[leg.number]
                if leg.answers:
                    answer.first_s = now_s
                    self.begun.append(leg.number)
                if not leg.prefilled_by:
                    answer.cached = seq.cached_tokens
            if reason:
                leg.ticket.finish()
                self._ended(leg, seq)

    def fetch(self, engine: str, seq: Running) -> None:
        """The KV of a prompt moves from its prefill worker to this one."""
        group = self._fleet.replicas[engine].group
        self._clock.at(
            self._clock.now_s + group.profile.transfer_s(seq.remote_tokens), lambda: self._fetched(seq)
        )

    def _fetched(self, seq: Running) -> None:
        leg: _Leg = seq.owner
        self._fleet.replicas[leg.where].engine.received(seq)
        self._fleet.replicas[leg.prefilled_by].engine.unpin(str(leg.number))

    def _ended(self, leg: _Leg, seq: Running) -> None:
        if leg.answers:
            answer = self.answers[leg.number]
            answer.ended_s, answer.tokens = self._clock.now_s, seq.generated
            self._over(leg.number, "done")
        else:
            self._send(leg.number, "decode", prefilled_by=leg.where)

    def _send(self, number: int, role: Role, *, reads: bool = False, prefilled_by: str = "") -> None:
        """Choose a worker of the role, and give it the request's next leg."""
        try:
            choice = self._router.choose(self._asked(number, role, reads=reads))
        except Rejected:
            self._over(number, "refused")
            return
        one, where = self._requests[number], choice.instance.id
        leg = _Leg(number, where, choice.ticket, role != "prefill", prefilled_by)
        tokens = 1 if role == "prefill" else one.output_tokens
        seq = Running(
            id=str(number),
            tokens=[0] * one.prompt_tokens,
            max_tokens=tokens,
            source=_SOURCE,
            owner=leg,
            pin_digest="" if leg.answers else "-",
            remote=bool(prefilled_by),
            hashes=self._chain(number, tokens),
        )
        self._fleet.replicas[where].engine.add(seq)

    def _asked(self, number: int, role: Role, *, reads: bool = False) -> RouteRequest:
        return RouteRequest(
            role,
            self._hashes[number],
            self._requests[number].prompt_tokens,
            exclude=self.door.crowded(role),
            reads_prompt=reads,
        )

    def _chain(self, number: int, tokens: int) -> list[bytes]:
        """Hashes of all blocks it may fill, the answer's being nobody else's. The pool takes any value."""
        size, prompt = self._size, self._hashes[number]
        more = (self._requests[number].prompt_tokens + tokens) // size - len(prompt)
        chain: list[Any] = [*prompt, *islice(self._said, more)]
        return chain

    def _over(self, number: int, end: str) -> None:
        self.answers[number].end = end
        self.over.append(number)
        self._on_end()
