"""Prefill and decode on different workers: the two orders an engine may want them in.

prefill_first: prefill's answer carries the hand-off, which decode gets once, for this prompt, in time; every
other use gives wrong text with status 200 or ends the decode engine. So it is checked where it is read
(`PrefillDecode.handoff`) and guarded until it is sent (`HandoffGuard`); when in doubt, prefill runs again.

concurrent: both legs at once, tied by a link; prefill's answer is dropped. The end of one leg by error ends
the other.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec

from dynctl.engines.base import Handoff, Meeting, Naming, PrefillDecode
from dynctl.errors import EngineFailed, LaunchError
from dynctl.frontend.answer import Answer
from dynctl.frontend.attempt import Attempt, Flow, Roles, single_leg
from dynctl.frontend.body import encode
from dynctl.frontend.retry import AttemptFailed
from dynctl.frontend.upstream import Leg
from dynctl.http.client import Response
from dynctl.protocol.instances import Role
from dynctl.protocol.sse import DATA, event_data, split_events
from dynctl.router.prefill import HandoffGuard, Refused
from dynctl.router.request import Choice

_ROOMS_BITS = 48
_NAME_BITS = 127


def flow_for(roles: frozenset[str], contract: PrefillDecode | None, naming: Naming | None = None) -> Flow:
    """How prompts are served with these roles. Raises LaunchError when the backend cannot split them."""
    if "prefill" not in roles:
        return single_leg("aggregated") if naming is None else _named_leg("aggregated", naming)
    if contract is None:
        raise LaunchError(
            "this backend has no prefill/decode contract", where="roles", hint="use the role `aggregated`"
        )
    return _split_flow(contract)


def roles_for(roles: frozenset[str], contract: PrefillDecode | None) -> Roles:
    """Through which roles a prompt would go now, as `flow_for` has it go."""

    def through(attempt: Attempt) -> tuple[Role, ...]:
        if "prefill" not in roles or contract is None:
            return ("aggregated",)
        splits = contract.splits(attempt.call.body.opened())
        alone = not splits or (can_skip(contract) and attempt.skips_prefill())
        return ("decode",) if alone else ("prefill", "decode")

    return through


def can_skip(contract: PrefillDecode | None) -> bool:
    """Whether decode workers of this engine read prompts themselves."""
    return contract is not None and contract.order == "prefill_first"


def _named_leg(role: Role, naming: Naming) -> Flow:
    """One worker does it all, and is told by name when nobody waits any more."""

    async def flow(attempt: Attempt) -> None:
        choice = attempt.choose(role)
        name = f"{attempt.parts.rng.getrandbits(_NAME_BITS):032x}"
        body = b'{"%b":"%b",' % (naming.field.encode(), name.encode())
        leg = attempt.leg(choice, body + attempt.call.body.original.lstrip()[1:])
        answered = False
        try:
            await attempt.answer.by(attempt.parts.upstream, leg, choice.ticket)
            answered = True
        finally:
            if not answered:
                attempt.parts.upstream.abort(leg, (naming.abort(name),))
            choice.ticket.finish()

    return flow


def _split_flow(contract: PrefillDecode) -> Flow:
    """The flow of an engine's prefill/decode contract. A request it cannot split goes to decode alone."""
    split: Flow = _Concurrent(contract) if contract.order == "concurrent" else _PrefillFirst(contract)

    async def flow(attempt: Attempt) -> None:
        splits = contract.splits(attempt.call.body.opened())
        if splits and can_skip(contract) and attempt.skips_prefill():
            attempt.parts.choices.skipped_prefill()
            splits = False
        await (split if splits else decode_alone)(attempt)

    async def decode_alone(attempt: Attempt) -> None:
        decode = attempt.choose("decode", reads_prompt=True)
        try:
            body = encode(contract.decode_body(attempt.call.body.opened(), None, {}))
            await attempt.answer.by(attempt.parts.upstream, attempt.leg(decode, body), decode.ticket)
        finally:
            decode.ticket.finish()

    return flow


class _PrefillFirst:
    def __init__(self, contract: PrefillDecode) -> None:
        self._contract = contract

    async def __call__(self, attempt: Attempt) -> None:
        """Prefill, then decode with its hand-off."""
        attempt.need("decode")
        prefill = attempt.choose("prefill")
        try:
            link = _link(self._contract, attempt, prefill)
            body = encode(self._contract.prefill_body(attempt.call.body.opened(), link))
            response = await _prefill(attempt, prefill, attempt.leg(prefill, body))
        finally:
            prefill.ticket.finish()
        if response.status != 200:
            attempt.answer.whole(response, [prefill.instance.id])
            return
        handoff = self._read(attempt, prefill, response)
        if handoff.finished:
            attempt.answer.finished_by_prefill(response, prefill.instance.id)
            return
        guard = HandoffGuard(handoff, attempt.call.body.original)
        attempt.answer.prefilled_by(prefill.instance.id)
        attempt.call.account.handed_off()
        await self._decode(attempt, prefill, guard, link)

    def _read(self, attempt: Attempt, prefill: Choice, response: Response) -> Handoff:
        """The hand-off, or a failed attempt: params that are not whole never reach decode."""
        try:
            answer = msgspec.json.decode(response.body, type=dict[str, Any])
            return self._contract.handoff(answer, time.monotonic())
        except (EngineFailed, msgspec.DecodeError) as error:
            attempt.parts.metrics.counter("handoffs_refused_total", reason="incomplete").inc()
            cause = error if isinstance(error, EngineFailed) else EngineFailed("prefill's answer is not JSON")
            raise AttemptFailed(cause, failed=frozenset((prefill.instance.id,))) from error

    async def _decode(
        self, attempt: Attempt, prefill: Choice, guard: HandoffGuard, link: dict[str, Any]
    ) -> None:
        decode = attempt.choose("decode")
        try:
            handoff = guard.take(attempt.call.body.original, time.monotonic())
            if isinstance(handoff, Refused):
                attempt.parts.metrics.counter("handoffs_refused_total", reason=handoff.reason).inc()
                raise AttemptFailed(EngineFailed(f"prefill's hand-off is not usable: {handoff.reason}"))
            body = encode(self._contract.decode_body(attempt.call.body.opened(), handoff, link))
            leg = attempt.leg(decode, body, once=True)
            await attempt.answer.by(attempt.parts.upstream, leg, decode.ticket)
        except AttemptFailed as failure:
            raise _shared_blame(failure, prefill) from failure
        finally:
            decode.ticket.finish()


class _Concurrent:
    def __init__(self, contract: PrefillDecode) -> None:
        self._contract = contract

    async def __call__(self, attempt: Attempt) -> None:
        """Both legs at once; decode's answer is the client's."""
        prefill = attempt.choose("prefill")
        try:
            decode = attempt.choose("decode")
            try:
                await self._both(attempt, prefill, decode)
            finally:
                decode.ticket.finish()
        except AttemptFailed as failure:
            raise _shared_blame(failure, prefill) from failure
        finally:
            prefill.ticket.finish()

    async def _both(self, attempt: Attempt, prefill: Choice, decode: Choice) -> None:
        contract, request = self._contract, attempt.call.body
        link = _link(contract, attempt, prefill)
        prefill_body = encode(contract.prefill_body(request.opened(), link))
        decode_body = encode(contract.decode_body(request.opened(), None, link))
        prefill_leg = attempt.leg(prefill, prefill_body, once=True)
        decode_leg = attempt.leg(decode, decode_body, once=True)
        attempt.answer.prefilled_by(prefill.instance.id)
        first = asyncio.create_task(self._first(attempt, prefill, prefill_leg))
        second = asyncio.create_task(attempt.answer.by(attempt.parts.upstream, decode_leg, decode.ticket))
        try:
            refusal = await _race(attempt.answer, first, second)
        finally:
            over = _went_well(second) and not attempt.answer.error_type
            for task, leg in ((first, prefill_leg), (second, decode_leg)):
                if not (over or _went_well(task)):
                    attempt.parts.upstream.abort(leg, contract.abort(link))
                task.cancel()
            await asyncio.gather(first, second, return_exceptions=True)
        if refusal is not None:
            attempt.answer.whole(refusal, [prefill.instance.id])

    async def _first(self, attempt: Attempt, prefill: Choice, leg: Leg) -> Response:
        """Prefill's answer. Raises AttemptFailed also for one after which decode would wait in vain."""
        try:
            response = await _prefill(attempt, prefill, leg)
        finally:
            prefill.ticket.finish()
        try:
            for event in _events(response):
                self._contract.handoff(event, time.monotonic())
        except (EngineFailed, msgspec.DecodeError) as error:
            cause = error if isinstance(error, EngineFailed) else EngineFailed("prefill's answer is not JSON")
            raise attempt.parts.upstream.failed(leg, cause) from error
        return response


def _link(contract: PrefillDecode, attempt: Attempt, prefill: Choice) -> dict[str, Any]:
    """A room nobody else has; engines derive prefill's rank from it: room modulo the number of ranks."""
    instance, ranks = prefill.instance, max(1, prefill.instance.dp_size)
    room = (1 + attempt.parts.rng.getrandbits(_ROOMS_BITS)) * ranks + prefill.rank
    meeting = Meeting(
        url=instance.url,
        bootstrap_port=instance.bootstrap_port,
        room=room,
        ranks=ranks,
        peers=tuple(instance.peers),
        version=instance.engine_version,
    )
    try:
        return contract.link(attempt.call.body.opened(), meeting)
    except EngineFailed as error:
        raise AttemptFailed(error, failed=frozenset((instance.id,))) from error


def _events(response: Response) -> list[dict[str, Any]]:
    """What a prefill leg answered, as far as it is JSON: a whole answer, or the events of a stream."""
    if response.status != 200:
        return []
    body = response.body
    told = map(event_data, split_events(body + b"\n\n")[0]) if body.startswith(DATA) else (body.lstrip(),)
    return [msgspec.json.decode(one, type=dict[str, Any]) for one in told if one.startswith(b"{")]


async def _race(
    answer: Answer, prefill: asyncio.Task[Response], decode: asyncio.Task[None]
) -> Response | None:
    """Wait for decode's answer, or for prefill's refusal (4xx), which is given back. Raises either's failure.

    Once decode answers it has all it needs: what becomes of prefill is then of no interest.
    """
    await asyncio.wait((prefill, decode), return_when=asyncio.FIRST_COMPLETED)
    if not decode.done() and not answer.leg_begun:
        response = prefill.result()
        if response.status >= 400:
            return response
    await decode
    return None


def _went_well(task: asyncio.Task[Any]) -> bool:
    """Whether a leg has come to its end; any other may still be at work in its engine."""
    return task.done() and not task.cancelled() and task.exception() is None


async def _prefill(attempt: Attempt, prefill: Choice, leg: Leg) -> Response:
    started_s = time.monotonic()
    response = await attempt.parts.upstream.whole(leg, prefill=True)
    prefill.ticket.first_token()
    model = attempt.parts.models.card.name
    attempt.parts.metrics.histogram("prefill_seconds", model=model).observe(time.monotonic() - started_s)
    return response


def _shared_blame(failure: AttemptFailed, prefill: Choice) -> AttemptFailed:
    """A decode that answers with an error may be well, and prefill gone: both are suspects, no more."""
    pair = failure.failed | {prefill.instance.id}
    if isinstance(failure.cause, EngineFailed):
        return AttemptFailed(failure.cause, suspects=frozenset(pair))
    return failure
