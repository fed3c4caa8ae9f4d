"""A streamed body cut where its events end, whatever chunks and reads it comes in. No I/O.

Chunks need not end where events do, and events may end by LF or CRLF, also in turns.
"""

from __future__ import annotations

import re

import msgspec

from dynctl.http.framing import ChunkReader, Framing
from dynctl.protocol.sse import DONE, event_data, last_end

REASON = re.compile(rb'"finish_reason": ?"')
"""A finish with its reason. (In JSON a text's quotes are escaped, and its line feeds, too.)"""
_LAST = re.compile(rb'^data: ?\[DONE\]|^data: ?\{\s*"error": ?[^n\s]', re.MULTILINE)


def finished(payload: bytes) -> bool:
    """Whether this has what ends an answer."""
    if REASON.search(payload):
        return True
    return (DONE in payload or b'"error"' in payload) and _LAST.search(payload) is not None


class Cutter:
    """Takes pieces of a body in their framing, gives payload. What is left out may have been cut anywhere
    but inside an event. `over`: the body has ended.
    """

    __slots__ = ("_reader", "_rest", "over")

    def __init__(self, framing: Framing) -> None:
        self._reader = ChunkReader() if framing == "chunked" else None
        self._rest = bytearray()
        self.over = False

    @property
    def held(self) -> int:
        """Bytes of an event that is not whole yet."""
        return len(self._rest)

    @property
    def between(self) -> bool:
        """Whether what comes next begins an event, and a chunk."""
        return not self._rest and (self._reader is None or self._reader.between)

    def take(self, data: bytes) -> tuple[bytes, bool]:
        """The events that are whole now, without chunk framing; whether `data` is these and no more."""
        clean = self.between
        rest = self._rest
        start = max(0, len(rest) - 2)
        rest += self._payload(data)
        cut = last_end(rest, start)
        events = bytes(rest[:cut])
        del rest[:cut]
        return events, clean and self.between

    def take_all(self, data: bytes = b"") -> bytes:
        """All payload that has come, whole events or not."""
        payload = bytes(self._rest) + self._payload(data)
        self._rest.clear()
        return payload

    def _payload(self, data: bytes) -> bytes:
        if self._reader is None or not data:
            return data
        payload: list[bytes] = []
        self.over = self._reader.feed(data, payload) >= 0
        return payload[0] if len(payload) == 1 else b"".join(payload)

    def last(self) -> bytes | None:
        """What follows the last event's end at the body's: an event without its empty line, or nothing that
        tells anything; None for half an event.
        """
        rest = bytes(self._rest)
        if not rest.strip() or rest.startswith(b":"):
            return rest
        data = event_data(rest)
        if data != DONE:
            try:
                msgspec.json.decode(data)
            except (msgspec.DecodeError, UnicodeDecodeError):
                return None
        return rest


def unframed(data: bytes) -> bytes:
    """The payload of whole chunks."""
    payload: list[bytes] = []
    ChunkReader().feed(data, payload)
    return b"".join(payload)
