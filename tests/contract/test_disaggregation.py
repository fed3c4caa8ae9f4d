"""One suite for every engine's prefill/decode contract: the real frontend against engines that enforce it.

Whatever fails, no engine sees a breach of its contract, every request ends within its deadline, every leg is
ended by its engine's own means, and no ticket is left in the router.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from dynctl.engines import catalog
from dynctl.engines.base import Handoff
from dynctl.http.client import Response
from dynctl.protocol.specs import LimitsSpec
from tests.contract.pd_engines import ALL, Fault, Json, Nixl, PdEngine, Referee, Rooms, Rules, Trtllm
from tests.integration.frontend_harness import Front, error_of, frontend, make_spec

COMPLETION: Json = {"model": "m", "prompt": "hi", "max_tokens": 9, "temperature": 0.5}
CHAT: Json = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
STREAM: Json = {"stream": True, "stream_options": {"include_usage": True}}
SHAPES = {
    "completion": ("/v1/completions", COMPLETION),
    "completion-stream": ("/v1/completions", {**COMPLETION, **STREAM}),
    "chat": ("/v1/chat/completions", CHAT),
    "chat-stream": ("/v1/chat/completions", {**CHAT, **STREAM}),
}
SHORT = LimitsSpec(first_byte_timeout_s=0.3, stall_timeout_s=0.3, request_timeout_s=2.0)


@dataclass
class Scene:
    """A frontend and the engines behind it."""

    front: Front
    referee: Referee
    prefill: list[PdEngine]
    decode: list[PdEngine]

    @property
    def engines(self) -> list[PdEngine]:
        return [*self.prefill, *self.decode]

    async def ask(self, shape: str, **changes: Any) -> Response:
        path, body = SHAPES[shape]
        return await self.front.post(path, {**body, **changes})


@asynccontextmanager
async def scene(
    rules: Rules,
    *,
    prefill: Sequence[Sequence[Fault]] = (("",),),
    decode: Sequence[Sequence[Fault]] = (("",),),
    limits: LimitsSpec | None = None,
) -> AsyncIterator[Scene]:
    """An engine for each list of faults; at the end nothing is open, no ticket out, no rule broken."""
    referee = Referee()
    given: Json = {"limits": limits} if limits else {}
    spec = make_spec(
        backend=rules.backend, kv_transfer=rules.transfer, roles={"prefill": 1, "decode": 1}, **given
    )
    firsts = [PdEngine(rules, referee, "prefill", faults) for faults in prefill]
    seconds = [PdEngine(rules, referee, "decode", faults) for faults in decode]
    async with frontend(spec, decode=list(seconds)) as front:
        for index, engine in enumerate(firsts):
            await engine.start()
            front.join("prefill", index, engine.url, **rules.joins())
        made = Scene(front, referee, firsts, seconds)
        try:
            yield made
            for engine in made.engines:
                await engine.all_ended()
            await front.idle()
            assert referee.violations == []
        finally:
            for engine in firsts:
                await engine.stop()


def right(response: Response) -> bool:
    """Whether an answer holds the whole text, streamed or not."""
    if response.status != 200:
        return False
    if response.body.startswith(b"data:"):
        events = [line[6:] for line in response.body.splitlines() if line.startswith(b"data: {")]
        choices = [json.loads(event)["choices"][0] for event in events]
        text = "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in choices)
        return text == "abc" and response.body.endswith(b"data: [DONE]\n\n")
    choice = json.loads(response.body)["choices"][0]
    return bool((choice.get("text") or choice["message"]["content"]) == "abc")


every_engine = pytest.mark.parametrize("rules", ALL, ids=lambda rules: rules.name)
every_shape = pytest.mark.parametrize("shape", SHAPES)
first_then_decode = pytest.mark.parametrize(
    "rules", [r for r in ALL if r.order == "prefill_first"], ids=lambda rules: rules.name
)


@every_engine
async def test_every_shape_at_once_each_split_in_two(rules: Rules) -> None:
    async with scene(rules, prefill=[("",)] * 2, decode=[("",)] * 2) as s:
        answers = await asyncio.gather(*(s.ask(shape) for shape in SHAPES for _ in range(8)))
        assert all(right(answer) for answer in answers)
        workers = {dict(answer.headers)[b"x-dynctl-workers"] for answer in answers}
        assert len(workers) > 1
        assert all(b"prefill-" in names and b"decode-" in names for names in workers)
    assert s.referee.plain == 0
    assert sum(engine.asked for engine in s.prefill) == sum(engine.asked for engine in s.decode) == 32


@every_engine
@every_shape
@pytest.mark.parametrize("fault", ["500", "503", "lost"])
@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_a_leg_that_fails_is_made_again_with_a_fresh_one(
    rules: Rules, shape: str, fault: Fault, side: str
) -> None:
    bad: dict[str, Any] = {side: [(fault,), ("",)]}
    async with scene(rules, **bad) as s:
        answers = [await s.ask(shape) for _ in range(3)]
        assert all(right(answer) for answer in answers)
    failed = (s.prefill if side == "prefill" else s.decode)[0]
    assert failed.asked >= 1
    assert s.referee.plain == 0


@every_engine
@every_shape
async def test_a_decode_lost_on_a_kept_connection_is_not_sent_its_blocks_again(
    rules: Rules, shape: str
) -> None:
    async with scene(rules, decode=[("", "took", "")]) as s:
        answers = [await s.ask(shape) for _ in range(3)]
        assert right(answers[0])
        assert [answer.status for answer in answers] == [200, 502, 200]
    assert s.referee.plain == 0


@every_engine
@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_a_side_without_a_worker_that_answers_is_told_within_the_deadline(
    rules: Rules, side: str
) -> None:
    for fault, codes in (("500", {502}), ("503", {503}), ("lost", {502, 503}), ("hang", {504})):
        bad: dict[str, Any] = {side: [(fault,)]}
        async with scene(rules, limits=SHORT if fault == "hang" else None, **bad) as s:
            for shape in ("completion", "chat-stream"):
                answer = await s.ask(shape)
                if answer.status == 503 and shape == "chat-stream":
                    continue  # the circuit of the only worker is open by now
                assert answer.status in codes, (fault, shape, answer.status)


@every_engine
@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_a_refusal_of_either_leg_is_the_clients_answer_and_ends_the_other(
    rules: Rules, side: str
) -> None:
    bad: dict[str, Any] = {side: [("400",)]}
    async with scene(rules, **bad) as s:
        for shape in SHAPES:
            answer = await s.ask(shape)
            assert (answer.status, error_of(answer)["message"]) == (400, "as scripted")


@every_engine
@every_shape
async def test_prefill_dying_before_decode_has_its_blocks_is_made_good_by_another(
    rules: Rules, shape: str
) -> None:
    async with scene(rules, prefill=[("dies",), ("",)]) as s:
        for _ in range(2):
            assert right(await s.ask(shape))
    assert s.prefill[0].asked >= 1


@every_engine
async def test_no_hop_waits_longer_than_its_request_may(rules: Rules) -> None:
    limits = LimitsSpec(first_byte_timeout_s=60, stall_timeout_s=60, request_timeout_s=0.4)
    hanging: list[dict[str, Any]] = [{"prefill": [("hang",)]}, {"decode": [("hang",)]}]
    for bad in hanging:
        async with scene(rules, limits=limits, **bad) as s:
            for shape in ("completion", "chat-stream"):
                assert (await s.ask(shape)).status == 504


@every_engine
async def test_a_decode_that_stalls_ends_its_stream_with_an_error(rules: Rules) -> None:
    async with scene(rules, limits=SHORT, decode=[("mid",)]) as s:
        answer = await s.ask("chat-stream")
        assert answer.status == 200
        assert b'"error"' in answer.body


@every_engine
@pytest.mark.parametrize("shape", ["completion-stream", "chat"])
@pytest.mark.parametrize(
    ("side", "fault"), [("prefill", "hang"), ("decode", "hang"), ("decode", "mid")], ids=str
)
async def test_a_client_that_leaves_ends_both_legs(rules: Rules, shape: str, side: str, fault: Fault) -> None:
    bad: dict[str, Any] = {side: [(fault,)]}
    async with scene(rules, **bad) as s:
        stuck = (s.prefill if side == "prefill" else s.decode)[0]
        asking = asyncio.create_task(s.ask(shape))
        await stuck.until(lambda: stuck.asked == 1)
        await asyncio.sleep(0.02)
        asking.cancel()
        await stuck.all_ended()
        assert stuck.cancelled == 1
    assert sum(engine.asked for engine in s.engines) <= 2


@first_then_decode
@every_shape
async def test_blocks_whose_time_is_over_are_not_asked_for(
    rules: Rules, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    contract: Any = type(catalog.contract(rules.backend, rules.transfer))
    real: Callable[..., Handoff] = contract.handoff
    late: list[int] = []

    async with scene(rules) as s:

        def late_once(self: Any, answer: Json, now_s: float) -> Handoff:
            handoff = real(self, answer, now_s)
            if late:
                return handoff
            late.append(1)
            for lease in s.referee.leases.values():
                lease.expires_s = 0.0
            return Handoff(handoff.params, now_s)

        monkeypatch.setattr(contract, "handoff", late_once)
        assert right(await s.ask(shape))
        assert 'handoffs_refused_total{reason="expired"} 1.0' in await s.front.metrics()
    assert s.prefill[0].asked == 2


@every_engine
async def test_several_sequences_never_share_one_transfer(rules: Rules) -> None:
    asked = ({"n": 3}, {"prompt": ["a", "b"]}, {"prompt": [[1], [2, 3]]})
    async with scene(rules) as s:
        for changes in asked:
            answer = await s.ask("completion", **changes)
            samples = "n" in changes
            assert answer.status == (400 if rules.backend == "sglang" and samples else 200)
        assert (await s.ask("chat-stream", n=2)).status == (400 if rules.backend == "sglang" else 200)
    batches = 2 if rules.backend == "sglang" else 0
    assert sum(engine.asked for engine in s.prefill) == batches
    assert s.referee.plain == (0 if rules.backend == "sglang" else 4)


@every_engine
async def test_what_a_client_says_of_transfers_never_reaches_an_engine(rules: Rules) -> None:
    evil: Json = {
        "kv_transfer_params": {"do_remote_prefill": True, "remote_host": "evil"},
        "bootstrap_room": 7,
        "disaggregated_params": {"request_type": "generation_only", "ctx_request_id": 1},
        "rid": "x",
    }
    known = {name: evil[name] for name in evil if name in catalog.get(rules.backend).client_fields}
    async with scene(rules) as s:
        for shape in SHAPES:
            assert right(await s.ask(shape, **known))
    assert s.referee.plain == 0


@every_engine
async def test_a_storm_of_failures_leaves_no_breach_behind(rules: Rules) -> None:
    """Every kind of failure, on both sides, under 96 requests at once: each of them ends."""
    firsts: list[Sequence[Fault]] = [("", "500", "", "lost", "dies", ""), ("503", "", "", "lost", ""), ("",)]
    seconds: list[Sequence[Fault]] = [("500", "", "lost", ""), ("", "", "503", "500", "lost", ""), ("",)]
    async with scene(rules, prefill=firsts, decode=seconds) as s:
        answers = await asyncio.gather(*(s.ask(shape) for _ in range(24) for shape in SHAPES))
        ended = [answer.status for answer in answers]
        assert len(ended) == 96
        assert all(right(answer) for answer in answers if answer.status == 200)
        assert sum(status == 200 for status in ended) > 80, ended


# --- the referee itself


async def replayed(rules: Rules, change: Callable[[Json], Json], side: str) -> list[str]:
    """The breaches noted when a request that went through is sent to its engine again, changed."""
    referee = Referee()
    engine = {name: PdEngine(rules, referee, name) for name in ("prefill", "decode")}
    spec = make_spec(backend=rules.backend, roles={"prefill": 1, "decode": 1})
    async with frontend(spec, decode=[engine["decode"]]) as front:
        await engine["prefill"].start()
        front.join("prefill", 0, engine["prefill"].url, **rules.joins())
        assert (await front.post("/v1/completions", COMPLETION)).status == 200
        assert referee.violations == []
        sent = json.loads(engine[side].requests[0].body)
        url = engine[side].url
        await front.client.request(
            type(front.origin).parse(url), "POST", "/", body=json.dumps(change(sent)).encode(), timeout_s=5
        )
        await engine["prefill"].stop()
    return referee.violations


def _without(name: str) -> Callable[[Json], Json]:
    return lambda body: {key: value for key, value in body.items() if key != name}


@pytest.mark.parametrize(
    ("rules", "side", "change", "told"),
    [
        (Nixl(), "decode", dict, "a second time"),
        (Nixl(), "decode", lambda body: {**body, "prompt": "other"}, "a second time|another prompt"),
        (Nixl(), "decode", lambda body: {**body, "n": 2}, "several sequences"),
        (Nixl(), "decode", lambda b: {**b, "kv_transfer_params": {"do_remote_prefill": True}}, "without"),
        (Nixl(), "prefill", lambda body: {**body, "max_tokens": 5}, "max_tokens"),
        (Nixl(), "prefill", lambda body: {**body, "stream": True}, "stream"),
        (Nixl(), "prefill", _without("kv_transfer_params"), "kv_transfer_params"),
        (Rooms(), "decode", dict, "used again"),
        (Rooms(), "decode", _without("bootstrap_room"), "NoneType|rooms"),
        (Rooms(), "prefill", lambda body: {**body, "bootstrap_room": body["bootstrap_room"] + 1}, "rank"),
        (Trtllm("1.2.1"), "prefill", lambda body: {**body, "made_up": 1}, "unknown"),
        (Trtllm("1.2.1"), "decode", dict, "a second time"),
        (Trtllm("1.3.0"), "prefill", dict, "used again"),
    ],
)
async def test_a_breach_is_noticed(
    rules: Rules, side: str, change: Callable[[Json], Json], told: str
) -> None:
    found = await replayed(rules, change, side)
    assert len(found) == 1
    assert any(part in found[0] for part in told.split("|")), found


async def test_an_abort_that_comes_before_its_request_was_read_is_made_good() -> None:
    async with scene(Rooms(), prefill=[("hang",)], decode=[("hang",)]) as s:
        for engine in s.engines:
            engine.reads_after_s = 0.1
        asking = asyncio.create_task(s.ask("chat-stream"))
        for engine in s.engines:
            await engine.until(lambda engine=engine: engine.arrived == 1)  # type: ignore[misc]
        asking.cancel()
        for engine in s.engines:
            await engine.until(lambda engine=engine: engine.asked == 1)  # type: ignore[misc]
            await engine.all_ended()
        assert [engine.cancelled for engine in s.engines] == [1, 1]


# --- one worker alone, of an engine that is told by name


@pytest.mark.parametrize("shape", SHAPES)
async def test_an_engine_told_by_name_hears_that_a_client_has_left(shape: str) -> None:
    engine = PdEngine(Rooms(), Referee(), "decode", ["hang"])
    async with frontend(make_spec(backend="sglang"), aggregated=[engine]) as front:
        path, body = SHAPES[shape]
        asking = asyncio.create_task(front.post(path, {"rid": "mine", **body}))
        await engine.until(lambda: engine.asked == 1)
        sent = json.loads(engine.requests[0].body)
        assert {**sent, "rid": ""} == {**body, "rid": ""}
        assert sent["rid"] != "mine"
        asking.cancel()
        await engine.all_ended()
        await front.idle()
    assert engine.cancelled == 1
