"""The load client of `serving`, in a process of its own: it asks as told and prints what came, as JSON.

    python -m tests.perf.load '{"port": 8000, "prompt": "short", "streams": 32, "max_tokens": 400}'

With a `rate` requests start at that pace whatever has become of those before them; without one each of
`streams` clients asks `requests` times, one after another.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import statistics
import sys
import time

import msgspec

from dynctl.errors import DynctlError
from dynctl.http.client import Client, Origin, Timeouts
from dynctl.http.runtime import run

WORDS = re.findall(
    r"\w+",
    """the of and to in is that it was for on are as with they be at one have this from or had by but some
    what there we can out other were all your when up use how said an each she which do their time if will
    way about many then them would write like so these her long make thing see him two has look more day""",
)
TIMEOUTS = Timeouts(first_byte_s=60, stall_s=60)
JSON = [(b"content-type", b"application/json")]
SHAPES: dict[str, tuple[int, int]] = {
    "short": (64, 0),
    "1k": (900, 0),
    "long": (4_000, 0),
    "shared": (400, 3_600),
    "huge": (5_500, 49_500),
}
"""Words of a prompt: its own, and those before them that it shares with one in four of its kind."""


class Load(msgspec.Struct, kw_only=True):
    """What to ask for. `rate` in requests a second for `duration_s`; 0 = `streams` times `requests`."""

    port: int
    prompt: str = "short"
    streams: int = 1
    requests: int = 1
    max_tokens: int = 2
    rate: float = 0.0
    duration_s: float = 0.0
    seed: int = 0


class Outcome(msgspec.Struct, kw_only=True):
    """What came. Times in seconds, of the requests that did not fail; `reads` per body, all together."""

    done: int = 0
    failed: int = 0
    tokens: int = 0
    reads: int = 0
    ttft_s: list[float] = []
    error: str = ""

    def ttft_ms(self, percent: int) -> float:
        """A percentile of the time to first token, in ms."""
        if len(self.ttft_s) < 2:
            return float("nan")
        return statistics.quantiles(self.ttft_s, n=100, method="inclusive")[percent - 1] * 1e3


def text(rng: random.Random, words: int) -> str:
    """So many words."""
    return " ".join(rng.choices(WORDS, k=words))


def shared_texts(shape: str) -> list[str]:
    """The four beginnings that prompts of this shape share."""
    return [text(random.Random(number), SHAPES[shape][1]) for number in range(4)]


def bodies(load: Load, count: int) -> list[bytes]:
    """Requests, each with words of its own."""
    rng = random.Random(load.seed)
    own, shared = SHAPES[load.prompt]
    begins = shared_texts(load.prompt) if shared else [""]
    return [
        json.dumps(
            {
                "model": "tiny",
                "stream": True,
                "max_tokens": load.max_tokens,
                "messages": [{"role": "user", "content": f"{rng.choice(begins)} {text(rng, own)}"}],
            }
        ).encode()
        for _ in range(count)
    ]


class Body:
    """A body as it comes: tokens are counted by their events, which may be split anywhere."""

    def __init__(self) -> None:
        self.tail = b""
        self.events = 0
        self.reads = 0
        self.first_s = 0.0

    def feed(self, data: bytes) -> None:
        """Count."""
        if not self.first_s:
            self.first_s = time.perf_counter()
        self.reads += 1
        joined = self.tail + data
        self.events += joined.count(b'"content"')
        self.tail = joined[-8:]


async def ask(client: Client, origin: Origin, body: bytes, outcome: Outcome) -> None:
    """One request, its answer put down in `outcome`."""
    started_s = time.perf_counter()
    came = Body()
    try:
        stream = await client.open(
            origin, "POST", "/v1/chat/completions", headers=JSON, body=body, timeouts=TIMEOUTS
        )
        if stream.status != 200:
            outcome.failed += 1
            outcome.error = f"{stream.status}: {(await stream.read(100_000))[:200]!r}"
            return
        await stream.relay(came)
    except DynctlError as error:
        outcome.failed += 1
        outcome.error = str(error)
        return
    outcome.done += 1
    outcome.tokens += came.events
    outcome.reads += came.reads
    outcome.ttft_s.append(came.first_s - started_s)


async def closed(load: Load, client: Client, outcome: Outcome) -> None:
    """Each client asks again when its answer has ended."""
    asked = bodies(load, load.streams * load.requests)
    origin = Origin("http", "127.0.0.1", load.port)

    async def one(mine: list[bytes]) -> None:
        for body in mine:
            await ask(client, origin, body, outcome)

    await asyncio.gather(*(one(asked[number :: load.streams]) for number in range(load.streams)))


async def opened(load: Load, client: Client, outcome: Outcome) -> None:
    """Requests start at a pace."""
    asked = bodies(load, int(load.rate * load.duration_s))
    origin = Origin("http", "127.0.0.1", load.port)
    begun_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number, body in enumerate(asked):
            await asyncio.sleep(max(0.0, begun_s + number / load.rate - time.perf_counter()))
            group.create_task(ask(client, origin, body, outcome))


async def main(load: Load) -> None:
    """Ask, and print the outcome."""
    client, outcome = Client(max_idle=4096), Outcome()
    await (opened if load.rate else closed)(load, client, outcome)
    await client.close()
    print(msgspec.json.encode(outcome).decode(), flush=True)


if __name__ == "__main__":
    run(main(msgspec.json.decode(sys.argv[1], type=Load)))
