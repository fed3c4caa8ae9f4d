"""Recorded requests, one JSON object a line, as Mooncake's (FAST '25). Pure but for `load_trace`.

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 48]}

`timestamp` in milliseconds, lengths in tokens, an id for each block of 512 prompt tokens: requests whose
first ids are equal have a beginning in common. `hash_ids` may be left out: then nothing is shared.
"""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from zlib import error as ZlibError

import msgspec

from dynctl.errors import ProfileError

BLOCK_TOKENS = 512
PRIVATE = 1 << 48
"""Hashes from here on are of blocks that no other request has."""
_SHAPE = '{"timestamp": 0, "input_length": 4000, "output_length": 500, "hash_ids": [1, 2]}'
_JITTER_S = 2.0
"""How far the repetitions of a request are moved by `denser`."""


class TraceRequest(msgspec.Struct, frozen=True):
    """One request, `at_s` from the start. `blocks`: one id per 512 prompt tokens; () = shared with nobody."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


class _Line(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


def parse_trace(lines: Iterable[bytes], where: str) -> list[TraceRequest]:
    """The requests by time; empty lines are passed over.

    Raises ProfileError with `where`:line for the first line that is none, or when there is no request.
    """
    found = [_request(line, f"{where}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ProfileError("the trace holds no request", where=where, hint=f"one a line: {_SHAPE}")
    return sorted(found, key=lambda one: one.at_s)


def load_trace(path: Path) -> list[TraceRequest]:
    """The requests in a file, which may be gzipped. Raises ProfileError: unreadable, or a broken line."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as lines:
            return parse_trace(lines, str(path))
    except (EOFError, ZlibError, gzip.BadGzipFile) as error:
        raise ProfileError(f"not a whole gzip file: {error}", where=str(path)) from error
    except OSError as error:
        raise ProfileError(f"cannot read the trace: {error.strerror}", where=str(path)) from error


def _request(line: bytes, where: str) -> TraceRequest:
    try:
        read = msgspec.json.decode(line, type=_Line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProfileError(f"no request of a trace: {error}", where=where, hint=_SHAPE) from error
    if read.input_length < 1 or read.output_length < 1:
        said = f"{read.input_length} prompt and {read.output_length} answer tokens"
        raise ProfileError(said, where=where, hint="1 or more of each")
    if read.timestamp < 0:
        raise ProfileError(f"a time of {read.timestamp:g} ms", where=where, hint="0 or more")
    most = -(-read.input_length // BLOCK_TOKENS)
    if read.hash_ids and len(read.hash_ids) != most:
        said = f"{len(read.hash_ids)} hash_ids for {read.input_length} prompt tokens"
        raise ProfileError(said, where=where, hint=f"{most}: one for each block of {BLOCK_TOKENS}, or none")
    return TraceRequest(read.timestamp / 1000, read.input_length, read.output_length, read.hash_ids)


def faster(requests: Sequence[TraceRequest], speed: float) -> list[TraceRequest]:
    """The same requests in 1/`speed` of the time."""
    return [msgspec.structs.replace(one, at_s=one.at_s / speed) for one in requests]


def denser(requests: Sequence[TraceRequest], factor: float, rng: Random) -> list[TraceRequest]:
    """`factor` times as many requests in the same time.

    Below 1: a part of them, drawn by `rng`. Above: each comes again, some seconds off, from users of their
    own: what was shared is shared among those who came again together.
    """
    whole, part = divmod(factor, 1.0)
    layer = 1 + max((block for one in requests for block in one.blocks), default=0)
    found = []
    for one in requests:
        for copy in range(int(whole) + (rng.random() < part)):
            at_s = max(0.0, one.at_s + rng.uniform(-_JITTER_S, _JITTER_S)) if copy else one.at_s
            blocks = tuple(block + copy * layer for block in one.blocks)
            found.append(msgspec.structs.replace(one, at_s=at_s, blocks=blocks))
    return sorted(found, key=lambda one: one.at_s)


def hashes(requests: Sequence[TraceRequest], size: int) -> list[tuple[int, ...]]:
    """For each request the sequence hashes of its prompt's full blocks of `size` tokens, a divisor of 512.

    Equal hashes stand for equal blocks after equal beginnings, whatever the trace's ids do.
    """
    parts = BLOCK_TOKENS // size
    known: dict[tuple[int, int], int] = {}
    fresh = itertools.count(PRIVATE)
    found = []
    for one in requests:
        before, chain = -1, list[int]()
        for block in one.blocks:
            before = known.setdefault((before, block), len(known))
            chain.extend(range(before * parts, (before + 1) * parts))
        full = one.prompt_tokens // size
        if not one.blocks:
            chain = list(itertools.islice(fresh, full))
        found.append(tuple(chain[:full]))
    return found
