"""What is to be asked, of whom, and how: the words of the load generator. Values only; times in seconds."""

from __future__ import annotations

from typing import Literal

import msgspec

from dynctl.errors import UsageError
from dynctl.perfmodel.choice import Sla
from dynctl.perfmodel.trace import BLOCK_TOKENS, TraceRequest

Api = Literal["chat", "completions"]
NO_SLA = Sla()


class Lengths(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens: always `tokens`, or with a `spread` (0..1) evenly from 1 - spread to 1 + spread times that."""

    tokens: int
    spread: float = 0.0


class Closed(msgspec.Struct, frozen=True, kw_only=True, tag="closed"):
    """So many requests in flight, the next one sent when one has ended. It hides queueing: no SLA from it."""

    concurrency: int


class Open(msgspec.Struct, frozen=True, kw_only=True, tag="open"):
    """`rate` requests a second whatever becomes of them. Gaps follow a gamma law of shape `burstiness`:
    1 = Poisson, below it burstier, above it calmer; None = all alike.
    """

    rate: float
    burstiness: float | None = 1.0


class Replay(msgspec.Struct, frozen=True, kw_only=True, tag="replay"):
    """The requests of a trace at their times, `speedup` times as fast."""

    requests: tuple[TraceRequest, ...]
    speedup: float = 1.0
    block_tokens: int = BLOCK_TOKENS


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """A load. Its numbers are checked by `check`; the same `seed` gives the same prompts and times.

    It ends after `requests` or when `duration_s` has passed, whichever is first (0 = no such limit). With
    `turns` above 1 each one is a conversation of so many requests, `think_s` apart, that carries its whole
    past; `isl` is then the length of what is added in each turn. Of each prompt the first `shared_tokens` are
    one of `prefixes` common beginnings. The first `warmup` requests are sent, but not counted; with `settle`
    an open loop sends more of them, until batches are as full as they get (`settling`). A request has
    `deadline_s` to its last token. `ignore_eos`: ask that answers do not end by themselves.
    `repeated`: the same prompts were sent before, and are meant to be in the server's cache.
    """

    arrivals: Closed | Open | Replay
    isl: Lengths = Lengths(tokens=512)
    osl: Lengths = Lengths(tokens=128)
    requests: int = 0
    duration_s: float = 0.0
    warmup: int = 0
    settle: bool = False
    shared_tokens: int = 0
    prefixes: int = 1
    turns: int = 1
    think_s: float = 0.0
    api: Api = "chat"
    seed: int = 0
    deadline_s: float = 600.0
    ignore_eos: bool = True
    repeated: bool = False
    until_failure: bool = False
    sla: Sla = NO_SLA

    @property
    def total(self) -> int:
        """Requests or conversations, those of the warm-up included, should that not take more; 0 = as many as
        time allows.
        """
        if isinstance(self.arrivals, Replay):
            length = len(self.arrivals.requests)
            return min(length, self.requests + self.warmup) if self.requests else length
        return self.requests + self.warmup if self.requests else 0


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Whom to ask. `url` without /v1; `tokenizer`: a directory or file on this machine, "" = none is at hand.

    `verify`: whether a certificate must be one that this machine trusts.
    """

    url: str
    model: str
    api_key: str = ""
    tokenizer: str = ""
    verify: bool = True


def check(load: Load) -> Load:
    """The load itself. Raises UsageError for numbers that mean nothing."""
    arrivals = load.arrivals
    wrong: list[tuple[bool, str]] = [
        (load.isl.tokens < 1, f"prompts need at least 1 token, not {load.isl.tokens}"),
        (load.osl.tokens < 1, f"answers need at least 1 token, not {load.osl.tokens}"),
        (not 0 <= load.isl.spread <= 1 or not 0 <= load.osl.spread <= 1, "a spread is between 0 and 1"),
        (load.requests < 0 or load.warmup < 0, "a number of requests cannot be negative"),
        (load.duration_s < 0 or load.think_s < 0, "a time cannot be negative"),
        (load.deadline_s <= 0, "a request needs a deadline above 0"),
        (load.turns < 1, f"a conversation has at least 1 turn, not {load.turns}"),
        (load.prefixes < 1, f"there must be at least 1 common beginning, not {load.prefixes}"),
        (
            not 0 <= load.shared_tokens < max(1, load.isl.tokens * (1 - load.isl.spread)),
            f"of prompts of {load.isl.tokens} tokens, {load.shared_tokens} cannot be shared",
        ),
    ]
    match arrivals:
        case Closed():
            wrong.append((arrivals.concurrency < 1, f"a concurrency of {arrivals.concurrency} asks nothing"))
        case Open():
            calm = arrivals.burstiness
            wrong.append((not arrivals.rate > 0, f"a rate must be above 0, not {arrivals.rate:g}"))
            wrong.append((calm is not None and not calm > 0, f"burstiness must be above 0, not {calm}"))
        case Replay():
            wrong.append((not arrivals.requests, "the trace holds no requests"))
            wrong.append((not arrivals.speedup > 0, f"a speed-up must be above 0, not {arrivals.speedup:g}"))
            wrong.append((load.turns > 1, "a trace tells its own turns"))
    wrong.append((load.settle and not isinstance(arrivals, Open), "only an open loop settles"))
    if not isinstance(arrivals, Replay) and not (load.requests or load.duration_s):
        wrong.append((True, "the load has no end: give a number of requests or a duration"))
    for is_so, message in wrong:
        if is_so:
            raise UsageError(message)
    return load
