"""W3C trace context of a request, and its spans where they are recorded.

A client's trace goes on, else one begins; each hop has a span id of its own. Spans cost nothing unless they
are recorded: `Trace.span` then gives back one and the same object, which does nothing.

Source: W3C Trace Context, level 1, and the random flag of level 2.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from types import TracebackType
from typing import Final, Literal, Self

Kind = Literal["internal", "server", "client"]
Value = str | int | float

_PARENT: Final = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)
_STATE: Final = re.compile(rb"[\x20-\x7e\t]{1,4096}")
_SAMPLED: Final = 1
_KNOWN_FLAGS: Final = 3
_RESERVED_VERSION: Final = b"ff"
_FIRST_VERSION: Final = b"00"
_ZEROS: Final = b"0"


class Span:
    """Something that takes time within a trace. Use with `with`: an exception makes it a failed one."""

    __slots__ = ("_record", "data")

    def __init__(self, data: SpanData | None, record: Callable[[SpanData], None] | None = None) -> None:
        self.data = data
        self._record = record

    def set(self, name: str, value: Value) -> None:
        """Add an attribute."""
        if self.data is not None:
            self.data.attributes[name] = value

    def fail(self, error: BaseException) -> None:
        """It did not succeed, and why."""
        if self.data is not None:
            self.data.error = f"{type(error).__name__}: {error}"

    def end(self) -> None:
        """It is over. Calls after the first one do nothing."""
        if self.data is not None and self._record is not None and not self.data.end_ns:
            self.data.end_ns = time.time_ns()
            self._record(self.data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.fail(error)
        self.end()


@dataclass(slots=True)
class SpanData:
    """What is told of a span. Ids in hexadecimal, `parent` empty for a trace's first; Unix times in ns."""

    trace: str
    id: str
    parent: str
    name: str
    kind: Kind
    start_ns: int
    end_ns: int = 0
    attributes: dict[str, Value] = field(default_factory=dict)
    error: str = ""


UNRECORDED: Final = Span(None)


class Trace:
    """The trace one request belongs to. `root` is the frontend's own span of it."""

    __slots__ = ("_ids", "_record", "flags", "id", "root", "state")

    def __init__(self, id_: bytes, flags: int, state: bytes, tracing: Tracing, parent: bytes) -> None:
        self.id = id_
        self.flags = flags
        self.state = state
        self._ids = tracing.rng
        self._record = tracing.record if flags & _SAMPLED else None
        self.root = self._span("request", "server", parent)

    def span(self, name: str, kind: Kind = "internal") -> Span:
        """A span that begins now, below the request's."""
        if self._record is None:
            return UNRECORDED
        assert self.root.data is not None
        return self._span(name, kind, self.root.data.id.encode())

    def headers(self, span: Span) -> tuple[tuple[bytes, bytes], ...]:
        """What tells the next hop of the trace; `span` is the hop to it."""
        id_ = b"%016x" % _id(self._ids, 64) if span.data is None else span.data.id.encode()
        parent = (b"traceparent", b"00-%b-%b-%02x" % (self.id, id_, self.flags))
        return (parent, (b"tracestate", self.state)) if self.state else (parent,)

    def _span(self, name: str, kind: Kind, parent: bytes) -> Span:
        if self._record is None:
            return UNRECORDED
        id_ = f"{_id(self._ids, 64):016x}"
        data = SpanData(self.id.decode(), id_, parent.decode(), name, kind, time.time_ns())
        return Span(data, self._record)


@dataclass(frozen=True, slots=True)
class Tracing:
    """How traces begin. `record` None: spans are not recorded. `sample_ratio`: share of the traces begun here
    that are; a client's own decision is kept.
    """

    rng: Random
    record: Callable[[SpanData], None] | None = None
    sample_ratio: float = 1.0

    def of(self, headers: Sequence[tuple[bytes, bytes]]) -> Trace:
        """The trace that `headers` (names in lower case) belong to, or a new one.

        A `traceparent` that is malformed, or there twice, is as good as none, and its `tracestate` with it.
        """
        parents = [value for name, value in headers if name == b"traceparent"]
        if parents:
            parsed = _parse(parents[0].strip()) if len(parents) == 1 else None
            if parsed is not None:
                id_, parent, flags = parsed
                return Trace(id_, flags, _state(headers), self, parent)
        sampled = self.record is None or self.sample_ratio >= 1 or self.rng.random() < self.sample_ratio
        return Trace(b"%032x" % _id(self.rng, 128), _SAMPLED if sampled else 0, b"", self, b"")


def _parse(value: bytes) -> tuple[bytes, bytes, int] | None:
    """Trace id, parent id and flags of a `traceparent`, None for one that is malformed."""
    found = _PARENT.fullmatch(value)
    if found is None:
        return None
    version, trace, parent, flags, more = found.groups()
    if version == _RESERVED_VERSION or (version == _FIRST_VERSION and more is not None):
        return None
    if not trace.strip(_ZEROS) or not parent.strip(_ZEROS):
        return None
    return trace, parent, int(flags, 16) & _KNOWN_FLAGS


def _state(headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """All `tracestate` headers as one; empty when it could not be passed on whole."""
    state = b",".join(value.strip() for name, value in headers if name == b"tracestate" and value.strip())
    return state if _STATE.fullmatch(state) else b""


def _id(rng: Random, bits: int) -> int:
    """A random id; never 0, which means none."""
    return rng.getrandbits(bits) or 1
