"""Sends a load and measures it: the one place here that owns tasks and reads clocks."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from dynctl.errors import DynctlError, ProfileError
from dynctl.profiler.load.client import Asker
from dynctl.profiler.load.lag import LagMeter
from dynctl.profiler.load.prompts import Ask, Prompts, body
from dynctl.profiler.load.record import Record
from dynctl.profiler.load.result import Result, summed_up
from dynctl.profiler.load.schedule import arrivals
from dynctl.profiler.load.settling import Settling
from dynctl.profiler.load.spec import Closed, Endpoint, Load, check
from dynctl.profiler.load.wire import Answer
from dynctl.profiler.load.words import COMMON, Words, words_of

_PREPARED_BYTES = 256 << 20
_FEW_WORDS, _MANY_WORDS = 16, 272
_HOPELESS = 10
"""So many failures with no success before them, and the load is given up."""
_STOP_S = 5.0
_FIT_S = 120.0


@dataclass(slots=True)
class Watch:
    """A load as others see and stop it. `stop` may be set at any time; `records` grow; `begun_s` and
    `phase` tell how far it is ("fitting", "warm-up", "measuring", "ending"); `more`: requests of a warm-up
    beyond the load's own number.
    """

    stop: asyncio.Event = field(default_factory=asyncio.Event)
    records: list[Record] = field(default_factory=list)
    phase: str = "fitting"
    begun_s: float = 0.0
    sent: int = 0
    in_flight: int = 0
    more: int = 0


@dataclass(frozen=True, slots=True)
class Measured:
    """The figures, and the requests that they are of. `load`: with the warm-up that it had."""

    result: Result
    records: tuple[Record, ...]
    load: Load


async def measure(load: Load, endpoint: Endpoint) -> Result:
    """Send the load and tell what came of it; look at `result.problems` before using it. Raises as `run`."""
    return (await run(load, endpoint, Watch())).result


async def run(load: Load, endpoint: Endpoint, watch: Watch) -> Measured:
    """The same with all records, seen and stopped by `watch`.

    Raises UsageError for a load that means nothing; RequestError or TransportError when the first requests,
    which fit the prompts' lengths to what the server counts, or all of the first ones fail; ProfileError when
    prompts of that length cannot be made. Requests that fail later are counted, not raised. No request
    outlives the call.
    """
    check(load)
    _allow_connections()
    asker = Asker(endpoint)
    try:
        words = await fitted_words(load, endpoint, asker)
        sender = _Sender(load, endpoint, asker, words, watch)
        async with LagMeter() as meter:
            await sender.send_all(meter)
            client = meter.result()
    finally:
        await asker.close()
    had = msgspec.structs.replace(load, warmup=sender.settling.warmup, settle=sender.settling.cut)
    return Measured(summed_up(had, watch.records, client), tuple(watch.records), had)


async def fitted_words(load: Load, endpoint: Endpoint, asker: Asker) -> Words:
    """Words of the model when its tokenizer is at hand, else English ones, fitted by two small requests to
    what the server counts. A server that counts nothing is taken at one token a word.
    """
    words = words_of(Path(endpoint.tokenizer)) if endpoint.tokenizer else COMMON
    seen = []
    for count in (_FEW_WORDS, _MANY_WORDS):
        said = " " + " ".join(words.words[i * 7 % len(words.words)] for i in range(count))
        asked = body(load, endpoint.model, [said], 1)
        answer = await asker.ask(load.api, asked, deadline_s=min(_FIT_S, load.deadline_s))
        seen.append((count, answer.counted("prompt_tokens")))
    if not seen[0][1]:
        return words
    found = words.fitted(*seen)
    shortest = round(load.isl.tokens * (1 - load.isl.spread))
    if found.around >= shortest and isinstance(load.arrivals, Closed):
        raise ProfileError(
            f"prompts of {shortest} tokens cannot be made: the server adds {found.around} to each",
            hint="longer ones, or completions",
        )
    return found


class _Sender:
    """Sends what is due, each request or conversation in a task of its own."""

    def __init__(self, load: Load, endpoint: Endpoint, asker: Asker, words: Words, watch: Watch) -> None:
        self._load = load
        self._model = endpoint.model
        self._asker = asker
        self._prompts = Prompts(load, words)
        self._watch = watch
        self.settling = Settling(load)
        self._ready: dict[int, tuple[Ask, bytes]] = {}
        self._error: DynctlError | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._begun_s = 0.0
        self._succeeded = False

    async def send_all(self, meter: LagMeter) -> None:
        """Until all is answered, or stopped. Raises the error of the first requests when all of them fail."""
        self._prepare()
        self._meter = meter
        self._watch.phase = "warm-up" if self._load.warmup else "measuring"
        meter.restart()
        self._begun_s = self._watch.begun_s = time.perf_counter()
        closed = isinstance(self._load.arrivals, Closed)
        work = asyncio.create_task(self._closed() if closed else self._timed())
        stopped = asyncio.create_task(self._watch.stop.wait())
        try:
            await asyncio.wait((work, stopped), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._watch.phase = "ending"
            stopped.cancel()
            work.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.wait((work, stopped, *self._tasks), timeout=_STOP_S)
        if not work.cancelled():
            work.result()
        if self._error is not None:
            raise self._error

    def _prepare(self) -> None:
        """Make requests before the load begins, as many as memory allows: making them takes time."""
        held = 0
        for number in range(self._load.total if self._load.turns == 1 else 0):
            ready = self._make(number)
            self._ready[number] = ready
            held += len(ready[1])
            if held > _PREPARED_BYTES:
                return

    def _make(self, number: int) -> tuple[Ask, bytes]:
        ask = self._prompts.ask(number)
        return ask, body(self._load, self._model, [ask.text], ask.output_tokens)

    async def _closed(self) -> None:
        assert isinstance(self._load.arrivals, Closed)
        numbers = enumerate(arrivals(self._load))
        async with asyncio.TaskGroup() as group:
            for _ in range(self._load.arrivals.concurrency):
                group.create_task(self._one_after_another(numbers))

    async def _one_after_another(self, numbers: Iterator[tuple[int, float]]) -> None:
        for number, _ in numbers:
            now_s = self._now_s()
            if self._load.duration_s and now_s > self._load.duration_s:
                return
            await self._conversation(number, now_s)

    async def _timed(self) -> None:
        for number, due_s in enumerate(arrivals(self._load)):
            wait_s = due_s - self._now_s()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            if not self.settling.due(number, due_s, self._watch.records):
                break
            self._watch.more = self.settling.warmup - self._load.warmup
            task = asyncio.create_task(self._conversation(number, due_s))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            if number + 1 not in self._ready and self._load.turns == 1:
                following = number + 1
                if not self._load.total or self._load.settle or following < self._load.total:
                    self._ready[following] = self._make(following)
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _now_s(self) -> float:
        return time.perf_counter() - self._begun_s

    async def _conversation(self, number: int, due_s: float) -> None:
        """All turns of one, to its end or first failure."""
        load = self._load
        said: list[str] = []
        if self.settling.over and number >= self.settling.warmup and self._watch.phase == "warm-up":
            self._watch.phase = "measuring"
            self._meter.restart()
        for turn in range(load.turns):
            if turn and load.think_s:
                await asyncio.sleep(load.think_s)
            if load.turns == 1:
                ask, raw = self._ready.pop(number) if number in self._ready else self._make(number)
            else:
                ask = self._prompts.ask(number, turn)
                said.append(ask.text)
                raw = body(load, self._model, said, ask.output_tokens)
            answer = await self._request(number, turn, ask, raw, due_s if turn == 0 else self._now_s())
            if answer is None:
                return
            said.append("".join(answer.said))

    async def _request(self, number: int, turn: int, ask: Ask, raw: bytes, due_s: float) -> Answer | None:
        watch = self._watch
        record = Record(
            number=number,
            turn=turn,
            due_s=due_s,
            sent_s=self._now_s(),
            asked_input=ask.input_tokens,
            asked_output=ask.output_tokens,
        )
        watch.sent += 1
        watch.in_flight += 1
        answer = None
        try:
            keep = self._load.turns > 1
            answer = await self._asker.ask(self._load.api, raw, deadline_s=self._load.deadline_s, keep=keep)
            self._note(record, answer)
        except DynctlError as error:
            record.error = str(error)
            self._give_up_if_hopeless(error)
        except asyncio.CancelledError:
            record.interrupted = True
            raise
        finally:
            watch.in_flight -= 1
            record.end_s = self._now_s()
            watch.records.append(record)
        return answer

    def _note(self, record: Record, answer: Answer) -> None:
        self._succeeded = True
        for place, at_s in enumerate(answer.times):
            answer.times[place] = at_s - self._begun_s
        record.times = answer.times
        record.finish = answer.finish
        record.input_tokens = answer.counted("prompt_tokens")
        counted = answer.counted("completion_tokens")
        record.counted = bool(counted)
        record.output_tokens = counted or len(answer.times)
        record.cached_tokens = answer.cached

    def _give_up_if_hopeless(self, error: DynctlError) -> None:
        if self._load.until_failure:
            self._error = self._error or error
            self._watch.stop.set()
            return
        if not self._succeeded and len(self._watch.records) + 1 >= _HOPELESS:
            told = f"the first {_HOPELESS} requests all failed: {error.message}"
            self._error = self._error or type(error)(told, where=error.where, hint=error.hint)
            self._watch.stop.set()


def _allow_connections() -> None:
    """As many open files as the system lets this process have: each stream is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # then as many as there may be now
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
