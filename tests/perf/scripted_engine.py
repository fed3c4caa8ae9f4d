"""An engine that streams from a script: OpenAI-like SSE at a set pace, at next to no cost of its own.

    python -m tests.perf.scripted_engine --ports 4 --tokens 400 --rate 150 --pace steps

prints its ports and then serves; a request gets as many tokens as its `max_tokens` says, at most `--tokens`.
`steps`: all streams get their token at the same moment, as from one batched decoding step of an engine.
`spread`: each stream has its own phase, and its first token at once.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import re
from typing import cast

from dynctl.http.framing import LAST_CHUNK, frame_chunk
from dynctl.http.heads import HeadError, response_head
from dynctl.http.limits import Limits
from dynctl.http.request import RequestReader
from dynctl.http.runtime import run

EVENT = (
    b'data: {"id":"chatcmpl-5f0c1d2e3b4a59687786","object":"chat.completion.chunk","created":1700000000,'
    b'"model":"tiny","choices":[{"index":0,"delta":{"content":" tok%04d"},"logprobs":null,'
    b'"finish_reason":null}]}\n\n'
)
DONE = frame_chunk(b"data: [DONE]\n\n") + LAST_CHUNK
HEAD = response_head(200, [(b"content-type", b"text/event-stream"), (b"transfer-encoding", b"chunked")])
_ASKED = re.compile(rb'"max_tokens": ?(\d+)')
JSON_HEADERS = [(b"content-type", b"application/json")]
MODELS = b'{"object":"list","data":[{"id":"tiny","object":"model","max_model_len":4096}]}'


class Script:
    """The chunks of a stream, and the clock that sends them."""

    def __init__(self, tokens: int, rate: float, pace: str) -> None:
        self.loop = asyncio.get_running_loop()
        self.chunks = [frame_chunk(EVENT % i) for i in range(tokens)]
        self.period_s = 1.0 / rate
        self.steps = pace == "steps"
        self.due: list[tuple[float, int, Stream]] = []
        self.timer: asyncio.TimerHandle | None = None
        self.serial = 0

    def add(self, stream: Stream) -> None:
        """Send the first token of this stream now, or with the next step."""
        now = self.loop.time()
        if self.steps:
            now = (int(now / self.period_s) + 1) * self.period_s
        self.push(now, stream)
        if self.timer is None:
            self.tick()

    def push(self, at: float, stream: Stream) -> None:
        """Send this stream's next token at this time."""
        self.serial += 1
        heapq.heappush(self.due, (at, self.serial, stream))

    def tick(self) -> None:
        """Send what is due and set the timer for what comes next."""
        now = self.loop.time()
        while self.due and self.due[0][0] <= now + 0.00005:
            at, _, stream = heapq.heappop(self.due)
            if stream.next_token():
                self.push(at + self.period_s, stream)
        self.timer = self.loop.call_at(self.due[0][0], self.tick) if self.due else None


class Stream(asyncio.Protocol):
    """One connection: each request for a completion is answered by the script."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.reader = RequestReader(Limits())
        self.sent = self.asked = 0
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None

    def data_received(self, data: bytes) -> None:
        assert self.transport is not None
        self.reader.feed(data)
        try:
            request = self.reader.next()
        except HeadError:  # a router asks whether this is gRPC
            self.transport.close()
            return
        if request is None:
            return
        if request.method == "POST":
            self.sent = 0
            asked = _ASKED.search(request.body)
            self.asked = min(int(asked[1]), len(self.script.chunks)) if asked else len(self.script.chunks)
            self.transport.write(HEAD)
            self.script.add(self)
            return
        body = MODELS if request.path == "/v1/models" else b"{}"
        length = (b"content-length", b"%d" % len(body))
        self.transport.write(response_head(200, [*JSON_HEADERS, length]) + body)

    def next_token(self) -> bool:
        """Send a token; False after the last, or when the connection is gone."""
        if self.transport is None:
            return False
        self.transport.write(self.script.chunks[self.sent])
        self.sent += 1
        if self.sent == self.asked:
            self.transport.write(DONE)
            return False
        return True


async def main(args: argparse.Namespace) -> None:
    """Serve until killed."""
    script = Script(args.tokens, args.rate, args.pace)
    loop = asyncio.get_running_loop()
    servers = [
        await loop.create_server(lambda: Stream(script), "127.0.0.1", 0, backlog=4096)
        for _ in range(args.ports)
    ]
    print(*(server.sockets[0].getsockname()[1] for server in servers), flush=True)
    await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="a scripted engine")
    parser.add_argument("--ports", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--rate", type=float, default=150.0, help="tokens a second for each stream")
    parser.add_argument("--pace", choices=["steps", "spread"], default="steps")
    run(main(parser.parse_args()))
