"""Speed of the block index, of hashing and translation, and of one whole choice, on one core.

    python -m tests.perf.kv_index [--rounds 5]

Prints one table: the best and the worst of the rounds, and the number to reach where there is one.
"""

from __future__ import annotations

import argparse
import gc
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

from dynctl.kv.hashing import root_hash, sequence_hashes
from dynctl.kv.index import Index, SlotKey
from dynctl.kv.translate import Translator
from dynctl.protocol.instances import Instance, ModelCard
from dynctl.protocol.kv_events import EngineKvBatch, EngineStored, KvSync, KvSyncReply, Removed, Stored
from dynctl.protocol.registry import Member
from dynctl.protocol.specs import RouterSpec
from dynctl.router.request import RouteRequest
from dynctl.router.service import Router, WorkerLinks
from tests.workers import worker_instance

WORKERS = 64
BLOCK_TOKENS = 16
PROMPT_BLOCKS = 512
MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class Row:
    """One line: what, the rounds' values, their unit, and what is to be reached ("" = nothing)."""

    what: str
    values: list[float]
    unit: str
    wanted: str = ""


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def hashes_of(rng: Random, count: int) -> list[int]:
    return [rng.getrandbits(64) for _ in range(count)]


def filled(rng: Random, prompt: list[int], depths: Callable[[int], int]) -> Index:
    """64 workers with 2,000 blocks of their own each, and `depths(i)` blocks of the prompt."""
    index = Index()
    for number in range(WORKERS):
        key = (f"worker-{number}", 0)
        index.apply(key, Stored(hashes_of(rng, 2000)))
        index.apply(key, Stored(prompt[: depths(number)]))
    return index


def each(work: Callable[[], object], repeat: int, rounds: int) -> list[float]:
    """Microseconds per call of `work`, for each round of `repeat` calls."""
    return [timed(lambda: [work() for _ in range(repeat)]) / repeat * 1e6 for _ in range(rounds)]


def matching(rounds: int) -> list[Row]:
    rng = Random(1)
    prompt = hashes_of(rng, PROMPT_BLOCKS)
    cases: dict[str, Callable[[int], int]] = {
        "all 64 hold all": lambda number: PROMPT_BLOCKS,
        "64 depths, 8 to 512": lambda number: 8 * (number + 1),
        "none holds any": lambda number: 0,
    }
    rows = []
    for name, depths in cases.items():
        match = partial(filled(rng, prompt, depths).match, prompt)
        rows.append(Row(f"match 512 blocks, 64 workers: {name}", each(match, 200, rounds), "µs", "≤ 100"))
    return rows


def apply_all(index: Index, key: SlotKey, events: Sequence[Stored | Removed]) -> float:
    """Blocks per second."""

    def work() -> None:
        for event in events:
            index.apply(key, event)

    return sum(len(event.hashes) for event in events) / timed(work)


def storing(rounds: int) -> list[Row]:
    rows = [
        Row("blocks stored, new", [], "/s", "≥ 300,000"),
        Row("blocks stored, held by another too", [], "/s", "≥ 300,000"),
        Row("blocks removed", [], "/s"),
        Row("reset of a worker with 1M blocks", [], "µs"),
        Row("sweep after it, in all (in the background)", [], "ms"),
        Row("one portion of that sweep (200 blocks)", [], "µs"),
    ]
    for number in range(rounds):
        for row, value in zip(rows, _store_and_forget(Random(number)), strict=True):
            row.values.append(value)
        gc.collect()
    return rows


def _store_and_forget(rng: Random) -> list[float]:
    events = [Stored(hashes_of(rng, 8)) for _ in range(MILLION // 8)]
    gone = [Removed(event.hashes) for event in events[: len(events) // 4]]
    index = Index()
    one, other = ("worker-0", 0), ("worker-40", 0)
    stored = [apply_all(index, one, events), apply_all(index, other, events)]
    reset = timed(lambda: index.reset(one)) * 1e6
    portion = timed(lambda: index.sweep(200)) * 1e6
    sweep = timed(lambda: index.sweep(2 * MILLION)) * 1e3
    return [*stored, apply_all(index, other, gone), reset, sweep, portion]


def hashing(rounds: int) -> list[Row]:
    tokens = list(range(100_000, 100_000 + PROMPT_BLOCKS * BLOCK_TOKENS))
    root = root_hash()
    whole = each(partial(sequence_hashes, tokens, BLOCK_TOKENS, root), 50, rounds)
    prompts, blocks = 2000, 16
    batches = [
        EngineKvBatch(
            timestamp=0.0,
            rank=0,
            events=[
                EngineStored(
                    block_hashes=[prompt * blocks + block for block in range(blocks)],
                    parent=None,
                    token_ids=[prompt * 7 + i for i in range(blocks * BLOCK_TOKENS)],
                    block_size=BLOCK_TOKENS,
                )
            ],
        )
        for prompt in range(prompts)
    ]
    translated = []
    for _ in range(rounds):
        feed = Translator(0).feed
        translated.append(prompts * blocks / timed(partial(list, map(feed, batches))))
    return [
        Row("hash 8,192 tokens in blocks of 16", whole, "µs"),
        Row("engine blocks translated", translated, "/s"),
    ]


def choosing(rounds: int) -> list[Row]:
    """One choice, kv mode, aggregated workers with requests in flight on each.

    "system prompt": all hold the first 64 blocks, four hold the conversation too. "64 depths": cached and in
    flight, each worker holds a different part of the prompt, the most work a choice can be.
    """
    rng = Random(3)
    prompt = hashes_of(rng, PROMPT_BLOCKS)

    def conversation(number: int) -> int:
        return PROMPT_BLOCKS - 8 if number < 4 else 64

    cases = [
        ("64 workers, 8,192 tokens, system prompt", Crowd(64, 32, conversation, lambda: 64), "≤ 200"),
        (
            "64 workers, 8,192 tokens, 64 depths",
            Crowd(64, 32, lambda number: 8 * number, lambda: rng.randrange(PROMPT_BLOCKS)),
            "≤ 200",
        ),
        ("1,000 workers, 8,192 tokens", Crowd(1000, 2, conversation, lambda: 64), "≤ 2000"),
    ]
    rows = []
    for name, crowd, limit in cases:
        chosen, ended = _choices(rng, prompt, crowd)
        for what, seconds in (("choice", chosen), ("end of request", ended)):
            for share, label in ((0.5, "median"), (0.99, "p99")):
                values = [quantile(seconds(), share) * 1e6 for _ in range(rounds)]
                wanted = limit if what == "choice" and label == "p99" else ""
                rows.append(Row(f"{what}, {name}: {label}", values, "µs", wanted))
    return rows


def memory() -> list[Row]:
    """Bytes that a block takes in an index of 200,000, and that a bounded one takes however many come."""
    rows = []
    for name, workers in (("held by one worker", 1), ("held by 8 of 64 workers", 8)):
        rng, before = Random(5), _allocated()
        index = Index()
        for _ in range(25_000):
            hashes = hashes_of(rng, 8)
            for number in range(workers):
                index.apply((f"worker-{8 * number}", 0), Stored(hashes))
        size = (_allocated() - before) / len(index)
        rows.append(Row(f"memory per block, {name}", [size], "B"))
        del index, hashes
    rng, index = Random(6), Index(100_000)
    for _ in range(50_000):
        index.apply(("worker-0", 0), Stored(hashes_of(rng, 8)))
    rows.append(
        Row("blocks in an index of at most 100,000 after 400,000", [float(len(index))], "", "≤ 100,000")
    )
    return rows


def _allocated() -> int:
    gc.collect()
    return int(tracemalloc.get_traced_memory()[0])


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[int(len(values) * share)]


Sample = Callable[[], list[float]]


@dataclass(frozen=True, slots=True)
class Crowd:
    """So many workers, requests on each; blocks of the prompt that worker n holds, that a request holds."""

    workers: int
    requests: int
    cached: Callable[[int], int]
    running: Callable[[], int]


def _choices(rng: Random, prompt: list[int], crowd: Crowd) -> tuple[Sample, Sample]:
    """Samples of the seconds that choices, and the ends of their requests, take on a router so loaded."""
    spec = RouterSpec(mode="kv", events="exact")
    router = Router(spec, WorkerLinks(_no_sync, _ignore, _ignore), rng=rng)
    router.members_changed([_member(number) for number in range(crowd.workers)], [])
    for number in range(crowd.workers):
        router._index.apply((f"aggregated-{number}", 0), Stored(prompt[: crowd.cached(number)]))
    for _ in range(crowd.workers * crowd.requests):
        own = prompt[: crowd.running()] + hashes_of(rng, 32)
        router.choose(RouteRequest("aggregated", own, len(own) * BLOCK_TOKENS)).ticket.first_token()
    request = RouteRequest("aggregated", prompt, PROMPT_BLOCKS * BLOCK_TOKENS)

    def choose() -> list[float]:
        return [_one(router, request)[0] for _ in range(1000)]

    def end() -> list[float]:
        return [_one(router, request)[1] for _ in range(1000)]

    return choose, end


def _one(router: Router, request: RouteRequest) -> tuple[float, float]:
    """Seconds of this thread's CPU time: other processes on the machine do not count."""
    start = time.thread_time()
    choice = router.choose(request)
    chosen = time.thread_time()
    choice.ticket.first_token()
    choice.ticket.finish()
    return chosen - start, time.thread_time() - chosen


def _member(number: int) -> Member:
    card = ModelCard(name="m", block_size=BLOCK_TOKENS)
    instance = worker_instance(number, id=f"aggregated-{number}", model=card)
    return Member(instance=instance, state="ready")


def _no_sync(instance: Instance, sync: KvSync) -> Awaitable[KvSyncReply]:
    raise AssertionError("workers without an event plane are not asked")


def _ignore(endpoint: str) -> None:
    return


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    rows = matching(rounds) + storing(rounds) + hashing(rounds) + choosing(rounds)
    tracemalloc.start()
    rows += memory()
    width = max(len(row.what) for row in rows)
    print(f"{'':{width}}  {'lowest':>12}  {'highest':>12}  {'unit':4}  wanted")
    for row in rows:
        low, high = min(row.values), max(row.values)
        digits = 0 if low >= 1000 else 1
        print(f"{row.what:{width}}  {low:12,.{digits}f}  {high:12,.{digits}f}  {row.unit:4}  {row.wanted}")


if __name__ == "__main__":
    main()
