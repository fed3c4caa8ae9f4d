"""One attempt at a call: which worker, what it is asked, and the simplest way to have it answered."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random

from dynctl.errors import Rejected
from dynctl.frontend.admission import Models
from dynctl.frontend.answer import Answer, Tell
from dynctl.frontend.call import Call
from dynctl.frontend.gate import Gate
from dynctl.frontend.migrate import Migrations
from dynctl.frontend.prompt.preprocess import UNKNOWN, Preprocessor, PromptFacts
from dynctl.frontend.retry import Attempts
from dynctl.frontend.series import Choices, Stages
from dynctl.frontend.upstream import Leg, Upstream
from dynctl.observability.metrics import Metrics
from dynctl.protocol.instances import Role
from dynctl.router.request import Choice, RouteRequest
from dynctl.router.service import Router


@dataclass(frozen=True, slots=True)
class Parts:
    """What the pipeline works with. `preprocessor` None: the router has no use for tokens. `tell` puts an
    error into the body a client gets.
    """

    router: Router
    gate: Gate
    upstream: Upstream
    models: Models
    metrics: Metrics
    stages: Stages
    choices: Choices
    rng: Random
    preprocessor: Preprocessor | None
    migrations: Migrations
    tell: Tell
    request_timeout_s: float


class Attempt:
    """What one attempt of one call has at hand; the flows below work on it."""

    __slots__ = ("answer", "attempts", "call", "moves", "parts", "prompt", "waits_until_s")

    def __init__(self, parts: Parts, call: Call, answer: Answer) -> None:
        self.parts = parts
        self.call = call
        self.answer = answer
        self.prompt: PromptFacts = UNKNOWN
        self.attempts = Attempts(parts.rng)
        self.moves = 0
        self.waits_until_s = 0.0

    def choose(self, role: Role, *, reads_prompt: bool = False) -> Choice:
        """A worker of `role` that has not failed this call. Raises Rejected, or the last failure.

        `reads_prompt`: a decode worker that is to compute the prompt too.
        """
        with self.parts.stages.enter("route", self.call.trace.span("route"), role) as span:
            choice = self._choose(role, reads_prompt)
            if span.data is not None:
                span.set("dynctl.role", role)
                span.set("dynctl.worker", choice.instance.id)
                span.set("dynctl.candidates", choice.candidates)
                span.set("dynctl.overlap_blocks", choice.overlap_blocks)
            return choice

    def _choose(self, role: Role, reads_prompt: bool) -> Choice:
        router, choices = self.parts.router, self.parts.choices
        choices.begun()
        started = time.perf_counter()
        refused: Rejected | None = None
        avoided = self.parts.upstream.shunned() | self.parts.gate.crowded(role)
        for exclude in self.attempts.exclusions(avoided):
            try:
                choice = router.choose(self.request(role, exclude, reads_prompt))
            except Rejected as error:
                refused = error
                continue
            self._note(role, choice, time.perf_counter() - started)
            return choice
        assert refused is not None
        raise self.attempts.last or refused

    def request(
        self, role: Role, exclude: frozenset[str] = frozenset(), reads_prompt: bool = False
    ) -> RouteRequest:
        """What the router is asked for this call."""
        prompt, hints = self.prompt, self.call.hints
        pinned, rank = hints.pin(role)
        known = prompt.tokens > 0
        return RouteRequest(
            role,
            prompt.hashes if known else prompt.approximate,
            prompt.tokens or prompt.estimate,
            self._expected_output(),
            exclude,
            self.call.adapter,
            hints.session,
            pinned,
            rank,
            hints.priority,
            reads_prompt,
        )

    def _expected_output(self) -> int | None:
        """What the client expects, as far as it can come true: others are routed by it too."""
        told = self.call.hints.expected_output
        if told is None:
            return None
        asked, context = self.call.asked, self.parts.models.max_model_len
        return min(told, told if asked is None else asked, context or told)

    def skips_prefill(self) -> bool:
        """Whether the prompt is better computed where it is decoded. Not if the client names its prefill."""
        if self.call.hints.prefill_worker:
            return False
        full = self.parts.gate.spills and self.parts.gate.full("prefill")
        return self.parts.router.skips_prefill(self.request("decode"), full=full)

    def _note(self, role: Role, choice: Choice, seconds: float) -> None:
        choices = self.parts.choices
        choices.chosen(role, choice.instance.id, seconds)
        if self.prompt.hashes and role != "decode":
            choices.overlap(role, choice, len(self.prompt.hashes), self.parts.router.block_size)

    def need(self, role: Role) -> None:
        """Raises Rejected when there is no worker of `role`: asked before work that would be in vain."""
        if self.parts.router.ready({role: 1}):
            raise Rejected(f"no worker of role {role} is ready", hint="try again later")

    def leg(self, choice: Choice, body: bytes, *, once: bool = False) -> Leg:
        """The call's request to the chosen worker, with `body`; `once` as in `Leg`."""
        call, worker = self.call, choice.instance
        span = call.trace.span(worker.role, "client")
        if span.data is not None:
            span.set("dynctl.worker", worker.id)
            span.set("dynctl.rank", choice.rank)
            span.set("server.address", worker.url)
        headers = (*call.headers, *call.trace.headers(span))
        ends_s = call.account.started_s + self.parts.request_timeout_s
        return Leg(choice, call.endpoint.path, headers, body, ends_s, span, once)


Flow = Callable[[Attempt], Awaitable[None]]
"""Has an attempt answered, or raises AttemptFailed."""
Roles = Callable[[Attempt], tuple[Role, ...]]
"""The roles that an attempt's prompt goes through, in order."""


def single_leg(role: Role) -> Flow:
    """One worker does it all."""

    async def flow(attempt: Attempt) -> None:
        choice = attempt.choose(role)
        try:
            await attempt.answer.by(
                attempt.parts.upstream, attempt.leg(choice, attempt.call.body.original), choice.ticket
            )
        finally:
            choice.ticket.finish()

    return flow
