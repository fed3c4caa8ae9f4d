"""A stream cut at any byte and gone on with elsewhere: the client reads what it would have read."""

from __future__ import annotations

import asyncio
import json
from random import Random
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from dynctl.engines.base import CONTINUES_AND_HOLDS_BACK
from dynctl.errors import PeerLost
from dynctl.frontend.accounts import Accounts
from dynctl.frontend.admission import Models
from dynctl.frontend.body import Body
from dynctl.frontend.call import Call, Endpoint
from dynctl.frontend.hints import NO_HINTS
from dynctl.frontend.migrate import Migrations, Rest, Story, last_words
from dynctl.frontend.stream import Relay, Ways
from dynctl.http.framing import ChunkReader
from dynctl.observability.metrics import Metrics
from dynctl.observability.tracing import Tracing
from dynctl.protocol.instances import ModelCard
from dynctl.protocol.specs import MigrationSpec
from dynctl.router.reasoning import Marks
from tests.unit import toy_engine as toy

LOST = PeerLost("gone")


class Wire:
    """Stands for the exchange: what the client reads."""

    def __init__(self) -> None:
        self.data = b""
        self.ended = self.cut = False

    def write(self, data: bytes) -> None:
        assert not self.ended
        self.data += data

    def end(self) -> None:
        self.ended = True

    def abort(self) -> None:
        self.cut = True

    def payload(self) -> bytes:
        """Without the chunk framing, which must be whole."""
        out: list[bytes] = []
        assert ChunkReader().feed(self.data, out) == len(self.data)
        return b"".join(out)


def make_call(body: dict[str, Any], metrics: Metrics) -> Call:
    kind: Any = "chat" if "messages" in body else "completions"
    return Call(
        endpoint=Endpoint("/v1/x", kind, kind),
        body=Body.parse(json.dumps(body).encode()),
        adapter="",
        stream=True,
        asked=None,
        request_id=b"r-1",
        headers=(),
        account=Accounts(metrics).open("m", kind, stream=True),
        hints=NO_HINTS,
        trace=Tracing(Random(1)).of(()),
    )


class ToyTokens:
    """What is known of the toy's tokens."""

    marks: Marks | None = None

    async def ready(self) -> None:
        """Nothing is to be loaded."""

    def encode(self, text: str) -> range:
        return toy.encode(text)

    def count(self, text: str, start: int, end: int) -> int:
        return len(toy.encode(text[:end])) - len(toy.encode(text[:start]))

    async def chat_text(self, body: Body) -> str:
        raise NotImplementedError

    async def tokens(self, text: str) -> list[int] | None:
        raise NotImplementedError

    async def prompt_tokens(self, kind: str, body: Body) -> int:
        return 0


class Deployment:
    """A frontend's relay before toy engines that are cut after so many bytes each."""

    def __init__(self, body: dict[str, Any], *, limit: int = 3, max_tokens: int = 10_000) -> None:
        self.metrics = Metrics()
        self.wire: Any = Wire()
        self.call = make_call(body, self.metrics)
        self.migrations = Migrations(
            MigrationSpec(limit=limit, max_tokens=max_tokens),
            CONTINUES_AND_HOLDS_BACK,
            self.metrics,
            Models(ModelCard(name="m")),
            ToyTokens(),
        )
        self.asked: list[dict[str, Any]] = []
        self.gave_up = 0
        self.given_load = 0

    def _give_up(self) -> None:
        self.gave_up += 1

    def _first(self) -> None:
        self.given_load += 1

    def run(self, cuts: list[int], piece: int = 50, prompt_tokens: int = 0) -> None:
        """Serve; the n-th leg is lost after `cuts[n]` bytes."""
        story = self.migrations.story(self.call)
        assert story is not None
        story.prompt_tokens = prompt_tokens
        ways = Ways(head=lambda: None, first_token=self._first, give_up=self._give_up)
        story.begin("chunked")
        relay: Any = Relay(self.wire, self.call.account, ways, story)
        call: Call | None = self.call
        while call is not None:
            request = json.loads(call.body.original)
            self.asked.append(request)
            data = toy.framed(toy.serve(request, len(self.asked)))
            cut = cuts.pop(0) if cuts else len(data)
            for start in range(0, min(cut, len(data)), piece):
                relay.feed(data[start : min(start + piece, cut)])
            if isinstance(relay, Rest) and relay.over:
                relay.complete()
                return
            if cut >= len(data):
                assert not relay.ended_early
                relay.complete()
                return
            call, relay = self._next(story, relay, ways, call)

    def _next(self, story: Story, relay: Any, ways: Ways, call: Call) -> tuple[Call | None, Any]:
        if not relay.begun:
            if isinstance(relay, Relay):
                return call, Relay(self.wire, self.call.account, ways, story)
            return call, Rest(self.wire, self.call.account, ways, story, relay._seam._joint, "chunked")
        if isinstance(relay, Relay):
            story.keep(list(relay.pieces))
            story.read()
        rest, move = asyncio.run(self.migrations.next(self.call, story, 0, LOST))
        if rest is None:
            story.write(self.wire, last_words(story, move.joint))
            story.end(self.wire)
            return None, relay
        return rest, Rest(self.wire, self.call.account, ways, story, move.joint, "chunked")


CHAT = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
RESUMED = {
    **CHAT,
    "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well:"}],
    "continue_final_message": True,
    "add_generation_prompt": False,
}
COMPLETION = {"model": "m", "stream": True, "prompt": "P:"}


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    """Requests that can go on elsewhere."""
    body = dict(draw(st.sampled_from([CHAT, RESUMED, COMPLETION])))
    limit = draw(st.sampled_from([None, 1, 2, 9, 25]))
    if limit is not None:
        chat = "messages" in body
        body[draw(st.sampled_from(["max_tokens", "max_completion_tokens"])) if chat else "max_tokens"] = limit
    options = draw(st.sampled_from([None, {"include_usage": True}, "continuous"]))
    if options == "continuous":
        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    elif options:
        body["stream_options"] = options
    if draw(st.booleans()) and body is not COMPLETION:
        start = draw(st.integers(4, 80))
        body["stop"] = ["@@@", toy.FULL[start : start + draw(st.integers(1, 6))]]
        body["include_stop_str_in_output"] = draw(st.booleans())
    elif "prompt" in body and draw(st.booleans()):
        body["return_token_ids"] = True
    return body


def unbroken(body: dict[str, Any]) -> toy.Answer:
    return toy.read(b"".join(toy.serve(body)))


@settings(max_examples=400, deadline=None)
@given(
    body=bodies(),
    cuts=st.lists(st.integers(0, 9000), min_size=1, max_size=3),
    piece=st.sampled_from([1, 7, 190, 400, 70_000]),
    counted=st.booleans(),
)
@example(body={**COMPLETION, "max_tokens": 2}, cuts=[900], piece=70_000, counted=False)
def test_a_stream_cut_anywhere_reads_as_if_it_had_not_been(
    body: dict[str, Any], cuts: list[int], piece: int, counted: bool
) -> None:
    whole = unbroken(body)
    deployment = Deployment(body)
    deployment.run(list(cuts), piece, toy.PROMPT_TOKENS if counted else 0)
    got = toy.read(deployment.wire.payload())
    assert deployment.wire.ended
    assert got.text == whole.text
    assert (got.roles, got.dones, got.errors) == (whole.roles, 1, 0)
    assert got.finishes == whole.finishes
    assert got.ids == whole.ids
    assert len(got.heads) == 1
    if got.usage is None:
        # Not told before an end that needed no other worker, where the prompt could not be counted.
        assert whole.usage is None or not counted
        return
    assert whole.usage is not None
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert "stop" in body or got.usage[name] == whole.usage[name]
