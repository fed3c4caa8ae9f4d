"""A stream that outlives its worker: what was said is kept, and another worker says the rest."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from zlib import compress, decompress

from dynctl.engines.base import Continuation
from dynctl.errors import DynctlError, EngineFailed
from dynctl.frontend.accounts import Account
from dynctl.frontend.body import Body, encode
from dynctl.frontend.call import Call
from dynctl.frontend.stream import Ways
from dynctl.http.framing import LAST_CHUNK, ChunkReader, Framing, frame_chunk
from dynctl.http.server import Exchange
from dynctl.observability.metrics import Metrics
from dynctl.protocol.specs import MigrationSpec
from dynctl.protocol.sse import DATA, framed
from dynctl.router.migration import CannotContinue, Encode, Kind, Said, continuation, spoken_tokens
from dynctl.router.seam import Joint, Seam, ending

logger = logging.getLogger(__name__)

PATIENCE_S = 10.0
"""How long a half-said answer waits for a worker when there is none."""


class Story:
    """What one call's client was told, over all legs. `framing`: how its first leg was framed."""

    def __init__(self, kind: Kind, max_tokens: int) -> None:
        self.kind = kind
        self.said = Said()
        self.prompt_tokens = 0
        self.framing: Framing = "chunked"
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


@dataclass(frozen=True, slots=True)
class Migrations:
    """What moving streams takes: the recipe's limits, the engine's way to continue, the tokens of a text."""

    spec: MigrationSpec
    dialect: Continuation
    metrics: Metrics
    model: str
    encode: Encode

    def story(self, call: Call) -> Story | None:
        """What to keep of this call; None when it could not go on elsewhere anyway."""
        kind = call.endpoint.kind
        if not call.stream or kind == "other" or not self.spec.limit:
            return None
        return Story(kind, self.spec.max_tokens)

    def next(self, call: Call, story: Story, moves: int, cause: DynctlError) -> tuple[Call | None, Move]:
        """The call for the rest of an answer; None when all was said. `call` is the client's own.

        Raises EngineFailed that tells the client why there is none, or `cause` after too many.
        """
        if moves >= self.spec.limit:
            logger.warning("migration.limit id=%s moves=%d", call.request_id.decode(), moves)
            raise cause
        if story.too_long:
            self.metrics.counter("model_migration_max_seq_len_exceeded_total", model=self.model).inc()
            raise _ended(cause, f"it is over {self.spec.max_tokens} tokens")
        request, said = call.body.opened(), story.said
        spoken = spoken_tokens(story.kind, request, said, self.encode)
        try:
            rest = continuation(story.kind, request, said, spoken, self.dialect, self.encode)
        except CannotContinue as reason:
            raise _ended(cause, str(reason)) from reason
        joint = Joint.of(story.kind, request, said, story.prompt_tokens, spoken)
        self.metrics.counter(
            "model_migration_total", model=self.model, migration_type="ongoing_request"
        ).inc()
        logger.info(
            "request.migrated id=%s number=%d spoken=%d why=%s",
            call.request_id.decode(),
            moves + 1,
            spoken,
            cause,
        )
        move = Move(joint, time.monotonic(), self.metrics, self.model)
        if not rest:
            return None, move
        hints = replace(call.hints, worker="", prefill_worker="", rank=None, prefill_rank=None)
        return replace(call, body=Body.parse(encode(rest)), hints=hints), move

    def counted_retry(self) -> None:
        """A request of which nothing was said yet goes to another worker."""
        self.metrics.counter("model_migration_total", model=self.model, migration_type="new_request").inc()


def last_words(story: Story, joint: Joint) -> bytes:
    """The events that are still owed when nothing is left to be asked of an engine."""
    return ending(story.said, joint, "length")


def _ended(cause: DynctlError, why: str) -> EngineFailed:
    told = "the worker was lost" if not isinstance(cause, EngineFailed) else cause.message
    return EngineFailed(f"{told}, and the answer cannot go on elsewhere: {why}")
