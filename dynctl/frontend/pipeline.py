"""One request from start to end. Read this first.

    prompt = tokens and hashes of the prompt, where the router can use them
    refuse what does not fit the model; wait while all workers are busy (`gate`)
    as often as it is worth it:
        choose worker(s)  →  [prefill]  →  the leg that answers  →  bytes to the client

Until the client has seen the first byte, a failed attempt is made again elsewhere (`retry`). After it,
another worker says the rest (`migrate`), or the stream ends with an error event. Whatever happens, tickets
are given back, the other leg is cancelled, and the client hears within the request's deadline.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from functools import partial

from dynctl.errors import DeadlineExceeded, DynctlError, PeerLost, Rejected
from dynctl.frontend.admission import check_context
from dynctl.frontend.answer import Answer
from dynctl.frontend.attempt import Attempt, Flow, Parts, Roles, single_leg
from dynctl.frontend.call import Call
from dynctl.frontend.migrate import PATIENCE_S
from dynctl.frontend.preview import preview
from dynctl.frontend.prompt.images import has_images
from dynctl.frontend.prompt.preprocess import UNKNOWN, PromptFacts, likeness
from dynctl.frontend.queue import Ask
from dynctl.frontend.retry import AttemptFailed, Attempts, Budget
from dynctl.http.server import Exchange
from dynctl.protocol.instances import Role

logger = logging.getLogger(__name__)

_LOOK_AGAIN_S = 0.1


class Pipeline:
    """Serves calls. `flow` makes an attempt at a prompt, which goes through `roles`; other endpoints go to a
    worker of `other_role`.
    """

    def __init__(self, parts: Parts, flow: Flow, roles: Roles, other_role: Role) -> None:
        self._parts = parts
        self._flow = flow
        self._roles = roles
        self._other_role = other_role
        self._other = single_leg(other_role)
        self._budget = Budget()

    async def serve(self, call: Call, exchange: Exchange) -> None:
        """Answer a call, or raise the DynctlError to answer it with. Ends when the client goes away, and by a
        word of it when the server is closed.
        """
        task = asyncio.current_task()
        assert task is not None
        exchange.on_disconnect = partial(_cancel, task)
        answer = Answer(call, exchange, self._parts.tell, self._parts.migrations.story(call))
        error_type = "internal"
        try:
            async with asyncio.timeout(self._parts.request_timeout_s):
                error_type = await self._serve(call, answer)
        except TimeoutError:
            error_type = "response_timeout"
            late = DeadlineExceeded(f"not answered within {self._parts.request_timeout_s:g} s")
            if not answer.break_off(late):
                raise late from None
        except asyncio.CancelledError:
            task.uncancel()
            if exchange.disconnected:
                error_type = "cancelled"
                answer.left()
                return
            error_type = "unavailable"
            stopping = Rejected("this frontend is stopping", hint="send the request again")
            if not answer.break_off(stopping):
                raise stopping from None
        except DynctlError as error:
            error_type = error_type_of(error)
            if not answer.break_off(error):
                raise
        finally:
            exchange.on_disconnect = None
            if call.hints.session_final:
                self._parts.router.end_session(call.hints.session)
            call.account.close(error_type)
            if error_type:
                call.trace.root.set("error.type", error_type)

    async def _serve(self, call: Call, answer: Answer) -> str:
        """Attempt until answered; gives back the error type, "" for a success."""
        preprocessor = self._parts.preprocessor
        if preprocessor is not None and call.endpoint.kind == "chat" and has_images(call.body):
            call = replace(call, body=await preprocessor.named(call.body))
        attempt = Attempt(self._parts, call, answer)
        self._budget.earn()
        flow, gate = self._other, self._parts.gate
        if call.endpoint.waits:
            gate.check_room()
        if call.endpoint.kind != "other":
            flow = self._flow
            with self._parts.stages.enter("preprocess", call.trace.span("preprocess")) as span:
                attempt.prompt = await self._prompt(call)
                span.set("gen_ai.usage.input_tokens", attempt.prompt.tokens)
            call.account.prompt(attempt.prompt.tokens)
            answer.asked(attempt.prompt.tokens)
            field = "messages" if call.endpoint.kind == "chat" else "prompt"
            check_context(attempt.prompt.tokens, call.asked, self._parts.models.max_model_len, field)
        else:
            attempt.prompt = await self._prompt(call)
        if call.endpoint.waits and not call.hints.dry_run and gate.closed():
            await self._wait_for_turn(attempt)
        if call.hints.dry_run:
            answer.said(self._preview(attempt))
            return ""
        while True:
            try:
                await flow(attempt)
                return answer.error_type
            except AttemptFailed as failure:
                if not answer.leg_begun:
                    await self._before_next(attempt, failure)
                elif not await self._move(call, attempt, failure):
                    return answer.error_type
            except (Rejected, PeerLost):
                if not answer.begun or time.monotonic() > attempt.waits_until_s:
                    raise
                # No worker is left just now, and half the answer was said: one may come.
                attempt.attempts = Attempts(self._parts.rng)
                await asyncio.sleep(_LOOK_AGAIN_S)

    def _preview(self, attempt: Attempt) -> bytes:
        other = attempt.call.endpoint.kind == "other"
        roles = (self._other_role,) if other else self._roles(attempt)
        request = partial(attempt.request, reads_prompt=not other and len(roles) == 1)
        return preview(self._parts.router, attempt.prompt, roles, request)

    async def _move(self, call: Call, attempt: Attempt, failure: AttemptFailed) -> bool:
        """Have the rest of the answer said elsewhere; False when there is none. Raises what prevents it."""
        with call.trace.span("migration") as span:
            span.set("error.type", failure.cause.kind)
            return await self._take_up(call, attempt, failure)

    async def _take_up(self, call: Call, attempt: Attempt, failure: AttemptFailed) -> bool:
        answer = attempt.answer
        story = answer.told()
        if story is None:
            raise failure.cause
        rest, move = await self._parts.migrations.next(call, story, attempt.moves, failure.cause)
        if rest is None:
            answer.finish(move)
            return False
        answer.go_on(move)
        attempt.moves += 1
        attempt.waits_until_s = time.monotonic() + PATIENCE_S
        attempt.attempts = Attempts(self._parts.rng, failed=failure.failed, suspects=failure.suspects)
        attempt.call = rest
        attempt.prompt = await self._prompt(rest)
        return True

    async def _prompt(self, call: Call) -> PromptFacts:
        preprocessor, kind, router = self._parts.preprocessor, call.endpoint.kind, self._parts.router
        if not router.compares_prompts:
            return UNKNOWN
        if preprocessor is None or kind == "other":
            return likeness(call.body, router.block_size, call.adapter)
        return await preprocessor.prepare(
            kind,
            call.body,
            router.block_size,
            call.adapter,
            context=self._parts.models.max_model_len,
        )

    async def _wait_for_turn(self, attempt: Attempt) -> None:
        """Wait while all workers are busy. Raises Overloaded."""
        gate, prompt = self._parts.gate, attempt.prompt
        cached = self._parts.router.cached_tokens(prompt.hashes or ()) if gate.by_length else 0
        span = attempt.call.trace.span("queue")
        with self._parts.stages.enter("queue", span):
            tokens = prompt.tokens or prompt.estimate
            await gate.wait(Ask(tokens, cached, attempt.call.hints.priority))

    async def _before_next(self, attempt: Attempt, failure: AttemptFailed) -> None:
        """Wait a little, or raise the failure's cause when enough has been tried.

        A deadline that has passed is not tried again: the client has waited long enough, and the prompt may
        be what hangs the engine.
        """
        pause_s = attempt.attempts.note(failure)
        if pause_s is None or isinstance(failure.cause, DeadlineExceeded):
            raise failure.cause
        # A worker that is gone is no sign of load: whoever it had is sent elsewhere, however many they are.
        if not isinstance(failure.cause, PeerLost) and not self._budget.spend(time.monotonic()):
            self._parts.metrics.counter("retries_refused_total", reason=failure.cause.kind).inc()
            raise failure.cause
        self._parts.metrics.counter("retries_total", reason=failure.cause.kind).inc()
        if not attempt.answer.begun:
            self._parts.migrations.counted_retry()
        logger.info("request.retried id=%s why=%s", attempt.call.request_id.decode(), failure.cause)
        await asyncio.sleep(pause_s)


def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()


_ERROR_TYPES = {
    "unauthorized": "unauthorized",
    "unknown_path": "not_found",
    "method_not_allowed": "validation",
    "request": "validation",
    "context_length_exceeded": "validation",
    "model_not_found": "not_found",
    "rejected": "unavailable",
    "overloaded": "overload",
    "forbidden": "validation",
    "deadline_exceeded": "response_timeout",
    "engine_failed": "engine",
    "peer_lost": "engine",
    "connect_failed": "engine",
}


def error_type_of(error: DynctlError) -> str:
    """The metric's word for an error."""
    return _ERROR_TYPES.get(error.kind, "internal")
