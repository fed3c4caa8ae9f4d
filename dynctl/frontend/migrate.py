"""A stream that outlives its worker: what was said is kept, and another worker says the rest."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol
from zlib import compress, decompress

from dynctl.engines.base import Continuation
from dynctl.errors import DynctlError, EngineFailed
from dynctl.frontend.accounts import Account
from dynctl.frontend.admission import Models
from dynctl.frontend.body import Body, encode
from dynctl.frontend.call import COMPLETIONS, Call
from dynctl.frontend.prompt.preprocess import NotTokenised
from dynctl.frontend.stream import Ways
from dynctl.http.framing import LAST_CHUNK, ChunkReader, Framing, frame_chunk
from dynctl.http.server import Exchange
from dynctl.observability.metrics import Metrics
from dynctl.protocol.specs import MigrationSpec
from dynctl.protocol.sse import DATA, framed
from dynctl.router.migration import CannotContinue, Kind, continuation, whole_words, window_of
from dynctl.router.reasoning import Marks
from dynctl.router.retell import (
    Source,
    check_no_tools,
    check_tokens,
    exact,
    holds_marks,
    made,
    retells,
    retold,
)
from dynctl.router.said import Json, Said
from dynctl.router.seam import Joint, Seam, Taken, ending
from dynctl.router.spoken import Made, spoken_tokens

logger = logging.getLogger(__name__)

PATIENCE_S = 10.0
"""How long a half-said answer waits for a worker when there is none."""


class Story:
    """What one call's client was told, over all legs. `framing`: how its first leg was framed. `unknown`: why
    what that leg said is not known here. `prompt_tokens` 0 = not known.
    """

    def __init__(self, kind: Kind, max_tokens: int) -> None:
        self.kind = kind
        self.said = Said()
        self.prompt_tokens = 0
        self.framing: Framing = "chunked"
        self.unknown = ""
        self._max_tokens = max_tokens
        self._packed: list[bytes] = []
        self._events = 0
        self._reader: ChunkReader | None = None

    def begin(self, framing: Framing) -> None:
        """The first leg's answer has come, framed so."""
        self.framing = framing
        self._reader = ChunkReader() if framing == "chunked" else None

    def keep(self, pieces: list[bytes]) -> bool:
        """Take over what the client was sent. False: the whole is too long to be said elsewhere.

        Chunks of a stream are nearly alike: packed, a token takes about two bytes.
        """
        self._packed.append(compress(b"".join(pieces), 1))
        self._events += len(pieces)
        return not self.too_long

    def read(self) -> None:
        """Bring `said` up to what was kept."""
        for packed in self._packed:
            payload = [decompress(packed)]
            if self._reader is not None:
                framed, payload = payload[0], []
                self._reader.feed(framed, payload)
            self.said.feed(b"".join(payload))
        self._packed.clear()

    @property
    def too_long(self) -> bool:
        """Whether prompt and answer are more than may be computed anew."""
        return self.prompt_tokens + max(self._events, self.said.spoken) > self._max_tokens

    def write(self, exchange: Exchange, events: bytes) -> None:
        """Send events in the framing the client's answer has."""
        if events:
            exchange.write(frame_chunk(events) if self.framing == "chunked" else events)

    def end(self, exchange: Exchange) -> None:
        """Complete the client's answer."""
        if self.framing == "chunked":
            exchange.write(LAST_CHUNK)
        exchange.end()


class Rest:
    """A later leg on its way to the client: a sink as `stream.Relay` is one, that reads every event."""

    def __init__(
        self, exchange: Exchange, account: Account, ways: Ways, story: Story, joint: Joint, framing: Framing
    ) -> None:
        self._exchange = exchange
        self._account = account
        self._ways = ways
        self._story = story
        self._seam = Seam(story.said, joint)
        self._reader = ChunkReader() if framing == "chunked" else None
        self._last_s = 0.0
        self.refusal = ""

    @property
    def begun(self) -> bool:
        """Whether this leg has said anything."""
        return self._last_s > 0.0

    @property
    def over(self) -> bool:
        """Whether the answer is complete, whatever else the engine would say."""
        return self._seam.over

    @property
    def ended_early(self) -> bool:
        """Whether the engine's stream has ended without a finish."""
        return not self._seam.over

    def feed(self, data: bytes) -> None:
        """Take what came."""
        if self.refusal or self._seam.over:
            return
        payload = [data]
        if self._reader is not None:
            payload = []
            self._reader.feed(data, payload)
        events = self._seam.feed(b"".join(payload))
        if events:
            self._say(events)
        self.refusal = self._seam.lost
        if self.refusal or self._seam.over:
            self._ways.give_up()

    def _say(self, events: bytes) -> None:
        now_s = time.monotonic()
        if not self._last_s:
            self._ways.first_token()
            self._ways.head()
        else:
            number = max(1, events.count(DATA))
            self._account.itl.observe((now_s - self._last_s) / number, number)
        self._last_s = now_s
        self._story.write(self._exchange, events)

    def complete(self) -> None:
        """The rest was said: end the client's answer."""
        self._story.end(self._exchange)

    def break_off(self, error: bytes) -> None:
        """Tell the client by a last event that there is no more."""
        break_off(self._story, self._exchange, error)

    def count_tokens(self) -> None:
        """Put down to the account what all legs have said."""
        usage = self._story.said.usage
        self._account.output_tokens = self._seam.spoken if usage is None else usage[1]


def break_off(story: Story, exchange: Exchange, error: bytes) -> None:
    """End a client's answer that stands between two events by one with the JSON of an error."""
    story.write(exchange, framed(error))
    story.end(exchange)


@dataclass(slots=True)
class Move:
    """One migration on its way: how the next leg is joined on, and what was seen of it."""

    joint: Joint
    began_s: float
    metrics: Metrics
    model: str

    def done(self, outcome: str) -> None:
        """Count how it ended: with the next token, by failure, or by the client's leaving."""
        self.metrics.histogram(
            "model_migration_duration_seconds",
            model=self.model,
            migration_type="ongoing_request",
            outcome=outcome,
        ).observe(time.monotonic() - self.began_s)


class Tokens(Protocol):
    """What is known of the model's tokens, and how its prompts are made."""

    marks: Marks | None

    async def ready(self) -> None: ...
    def encode(self, text: str) -> Sequence[int] | None: ...
    def count(self, text: str, start: int, end: int) -> int | None: ...
    async def chat_text(self, body: Body) -> str: ...
    async def tokens(self, text: str) -> list[int] | None: ...
    async def prompt_tokens(self, kind: Kind, body: Body) -> int: ...


@dataclass(frozen=True, slots=True)
class Migrations:
    """What moving streams takes: the recipe's limits, the engine's way to continue, the model's tokens and
    context.
    """

    spec: MigrationSpec
    dialect: Continuation
    metrics: Metrics
    models: Models
    tokens: Tokens

    def story(self, call: Call) -> Story | None:
        """What to keep of this call; None when it could not go on elsewhere anyway."""
        kind = call.endpoint.kind
        if not call.stream or kind == "other" or not self.spec.limit:
            return None
        return Story(kind, self.spec.max_tokens)

    async def next(
        self, call: Call, story: Story, moves: int, cause: DynctlError
    ) -> tuple[Call | None, Move]:
        """The call for the rest of an answer; None when all was said. `call` is the client's own.

        Raises EngineFailed that tells the client why there is none, or `cause` after too many.
        """
        model = self.models.card.name
        if moves >= self.spec.limit:
            logger.warning("migration.limit id=%s moves=%d", call.request_id.decode(), moves)
            raise cause
        await self.tokens.ready()
        if not story.prompt_tokens:
            story.prompt_tokens = await self.tokens.prompt_tokens(story.kind, call.body)
        if story.too_long:
            self.metrics.counter("model_migration_max_seq_len_exceeded_total", model=model).inc()
            raise _ended(cause, f"it is over {self.spec.max_tokens} tokens")
        if story.unknown:
            raise _ended(cause, story.unknown)
        request, said = call.body.opened(), story.said
        try:
            rest, taken = await self._rest(call, request, story)
        except CannotContinue as reason:
            raise _ended(cause, str(reason)) from reason
        joint = Joint.of(story.kind, request, said, story.prompt_tokens, taken)
        self.metrics.counter("model_migration_total", model=model, migration_type="ongoing_request").inc()
        logger.info(
            "request.migrated id=%s number=%d spoken=%d why=%s",
            call.request_id.decode(),
            moves + 1,
            taken.spoken,
            cause,
        )
        move = Move(joint, time.monotonic(), self.metrics, model)
        if not rest:
            return None, move
        hints = replace(call.hints, worker="", prefill_worker="", rank=None, prefill_rank=None)
        endpoint = call.endpoint if taken.retelling is None else COMPLETIONS
        return replace(call, endpoint=endpoint, body=Body.parse(encode(rest)), hints=hints), move

    async def _rest(self, call: Call, request: Json, story: Story) -> tuple[Json, Taken]:
        """The request for the rest, {} = there is none, and what it takes for said. Raises CannotContinue."""
        kind, said, dialect = story.kind, story.said, self.dialect
        source = await self._thinking(call, request, story)
        if source is not None or retells(kind, request, said, dialect):
            return await self._retold(call, request, story, source)
        whole = Made.plain(said, trims=kind == "chat")
        if said.finish and said.reasoning:
            whole = await self._finished(call, story)
        else:
            whole = replace(whole, kept=min(whole.kept, whole_words(request, said, dialect)))
        spoken = self._spoken(request, said, whole)
        rest = continuation(kind, request, said, spoken, dialect, self.tokens.encode)
        return rest, Taken(spoken, whole)

    async def _thinking(self, call: Call, request: Json, story: Story) -> Source | None:
        """What to tell a chat anew from whose text is, or has in it, reasoning that the engine did not take
        out: templates treat that in a message in their own ways. None for all others. Raises CannotContinue.
        """
        said, marks = story.said, self.tokens.marks
        if story.kind != "chat" or marks is None or said.finish or said.reasoning or not said.text:
            return None
        if holds_marks(said.text, marks):
            check_no_tools(request)
            return await self._source(call, story)
        try:
            source = await self._source(call, story)
        except CannotContinue:
            return None
        if not source.opened:
            return None
        check_no_tools(request)
        return source

    async def _finished(self, call: Call, story: Story) -> Made:
        """All that was made of an answer with reasoning in it that has finished, as far as it is known."""
        said = story.said
        try:
            return made(said, await self._source(call, story))
        except CannotContinue:
            whole = said.thoughts + said.text
            return Made(whole, len(whole))

    async def _retold(
        self, call: Call, request: Json, story: Story, source: Source | None
    ) -> tuple[Json, Taken]:
        said = story.said
        source = source or await self._source(call, story)
        whole = made(said, source)
        check_tokens(request, said, source)
        prompt: Sequence[int] | None
        if source.rendered is None:
            prompt = [*(said.prompt_ids or ()), *(said.tokens or ())]
        else:
            prompt = await self.tokens.tokens(source.rendered + whole.text)
        if not prompt:
            raise CannotContinue("the model's tokenizer is not at hand")
        spoken = self._spoken(request, said, whole)
        rest, how = retold(request, said, spoken, prompt, source, self.dialect)
        return rest, Taken(spoken, whole, how)

    async def _source(self, call: Call, story: Story) -> Source:
        """What the chat is told anew from. Raises CannotContinue when its prompt cannot be made here."""
        said, marks = story.said, self.tokens.marks
        ids = self.tokens.encode(marks.closing) if marks is not None else None
        closing_id = ids[0] if ids is not None and len(ids) == 1 else None
        context = self.models.max_model_len
        if exact(said):
            return Source(None, marks, closing_id, context)
        if said.usage is not None and story.prompt_tokens not in (0, said.usage[0]):
            raise CannotContinue("the engine's prompt is not what the chat template gives here")
        try:
            rendered = await self.tokens.chat_text(call.body)
        except NotTokenised as why:
            raise CannotContinue(f"its prompt cannot be made here: {why.reason}") from why
        return Source(rendered, marks, closing_id, context)

    def _spoken(self, request: Json, said: Said, whole: Made) -> int:
        held = self.dialect.holds_back and not said.finish
        return spoken_tokens(said, whole, window_of(request) if held else 0, self.tokens.count)

    def counted_retry(self) -> None:
        """A request of which nothing was said yet goes to another worker."""
        self.metrics.counter(
            "model_migration_total", model=self.models.card.name, migration_type="new_request"
        ).inc()


def last_words(story: Story, joint: Joint) -> bytes:
    """The events that are still owed when nothing is left to be asked of an engine."""
    return ending(story.said, joint, "length")


def _ended(cause: DynctlError, why: str) -> EngineFailed:
    told = "the worker was lost" if not isinstance(cause, EngineFailed) else cause.message
    return EngineFailed(f"{told}, and the answer cannot go on elsewhere: {why}")
