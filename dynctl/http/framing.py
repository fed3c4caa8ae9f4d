"""Where an HTTP/1.1 body ends, found in the bytes as they come, however they are split.

A reader has `feed(data, out=None) -> int`: the index just past the body's last byte in `data`, or `MORE`.
Payload (without chunk framing) is appended to `out` when given. Nothing is kept but a partial size line.
"""

from __future__ import annotations

from typing import Final, Literal, Protocol

MORE: Final = -1
LINE_BYTES: Final = 4096
TRAILER_BYTES: Final = 16384
LAST_CHUNK: Final = b"0\r\n\r\n"

Framing = Literal["chunked", "length", "close"]

_HEX: Final = b"0123456789abcdefABCDEF"
_SIZES_KEPT: Final = 4096
_CR, _LF = 13, 10
_PLAIN, _IN_LINE, _IN_TRAILERS = 0, 1, 2

# Size lines seen, without CRLF, and the sizes they name.
_sizes: dict[bytes, int] = {}
# The same with CRLF, and the bytes of such a chunk, size line and closing CRLF included. Not the last chunk.
_wholes: dict[bytes, int] = {}
_whole_of = _wholes.get


class FramingError(Exception):
    """The bytes are not a body in the framing that was announced."""


class BodyReader(Protocol):
    """Finds the end of one body."""

    def feed(self, data: bytes, out: list[bytes] | None = None) -> int: ...


def chunk_size(line: bytes) -> int:
    """Size named by a chunk's size line (without CRLF); extensions are ignored. Raises FramingError.

    `int(x, 16)` would also take signs, underscores, blanks and 0x: each a way to make two parsers disagree.
    """
    size = _sizes.get(line)
    if size is not None:
        return size
    digits = line.partition(b";")[0].rstrip(b" \t")
    if not 0 < len(digits) <= 15 or digits.strip(_HEX) or b"\n" in line or b"\r" in line:
        raise FramingError(f"bad chunk size line {line[:40]!r}")
    size = int(digits, 16)
    if len(line) <= 8 and len(_sizes) < _SIZES_KEPT:
        _sizes[line] = size
        if size:
            _wholes[line + b"\r\n"] = len(line) + size + 4
    return size


class ChunkReader:
    """Follows chunk boundaries, and nothing else, through a chunked body (RFC 9112, 7.1).

    `_left`: bytes of the chunk being read that are still to come, its closing CRLF included. `_prefix`:
    length of the last size line with CRLF, as a guess at the next; 0, which fits none, when inside a chunk.
    """

    __slots__ = ("_left", "_pending", "_prefix", "_state", "_trailer_bytes")

    def __init__(self) -> None:
        self._prefix = 4
        self._left = 0
        self._pending = b""
        self._state = _PLAIN
        self._trailer_bytes = 0

    def feed(self, data: bytes, out: list[bytes] | None = None) -> int:
        """Index just past the last chunk's trailers, or MORE. Raises FramingError."""
        # One whole chunk, as a token mostly comes. From one chunk end to the next: nothing changes.
        if _whole_of(data[: self._prefix]) == len(data) and data[-2:] == b"\r\n" and out is None:
            return MORE
        if self._state:
            return self._resume(data, out)
        size = len(data)
        prefix = 4
        end = self._left
        start = 0
        while end <= size:
            if end and not self._closed(data, end):
                raise FramingError("a chunk is longer or shorter than its size line says")
            if out is not None and start < end - 2:
                out.append(data[start : end - 2])
            if end == size:
                self._left = 0
                self._prefix = prefix
                return MORE
            eol = data.find(b"\r\n", end)
            if eol < 0:
                return self._hold(data[end:], _IN_LINE)
            length = chunk_size(data[end:eol])
            start = eol + 2
            if length == 0:
                return self._trailers(data, start)
            prefix = start - end
            end = start + length + 2
        self._prefix = 0
        left = self._left = end - size
        if left == 1 and size and data[-1] != _CR:
            raise FramingError("a chunk is longer or shorter than its size line says")
        if out is not None and start < end - 2:
            out.append(data[start : end - 2])
        return MORE

    @property
    def between(self) -> bool:
        """Whether the body, which goes on, was read to a chunk's end."""
        return not (self._left or self._state)

    @staticmethod
    def _closed(data: bytes, end: int) -> bool:
        """Whether the chunk that ends at `end` is closed by CRLF; the CR may have come before `data`."""
        if end == 1:
            return data[0] == _LF
        return data.startswith(b"\r\n", end - 2)

    def _hold(self, rest: bytes, state: int) -> int:
        if len(rest) > LINE_BYTES:
            raise FramingError(f"a chunk line of more than {LINE_BYTES} bytes")
        self._left = self._prefix = 0
        self._pending = rest
        self._state = state
        return MORE

    def _resume(self, data: bytes, out: list[bytes] | None) -> int:
        """Go on with a line whose first part came before `data`."""
        held = self._pending
        joined = held + data
        in_trailers = self._state == _IN_TRAILERS
        self._pending = b""
        self._state = _PLAIN
        end = self._trailers(joined, 0) if in_trailers else self.feed(joined, out)
        return end if end < 0 else end - len(held)

    def _trailers(self, data: bytes, pos: int) -> int:
        """Skip trailer lines up to the empty line that ends the body."""
        while True:
            eol = data.find(b"\r\n", pos)
            if eol < 0:
                return self._hold(data[pos:], _IN_TRAILERS)
            if eol == pos:
                return eol + 2
            self._trailer_bytes += eol - pos
            if self._trailer_bytes > TRAILER_BYTES:
                raise FramingError(f"trailers of more than {TRAILER_BYTES} bytes")
            pos = eol + 2


class LengthReader:
    """A body of a known number of bytes, more than 0."""

    __slots__ = ("left",)

    def __init__(self, length: int) -> None:
        self.left = length

    def feed(self, data: bytes, out: list[bytes] | None = None) -> int:
        """Index just past the body's last byte, or MORE."""
        left = self.left
        if len(data) < left:
            self.left = left - len(data)
            if out is not None:
                out.append(data)
            return MORE
        if out is not None:
            out.append(data[:left])
        self.left = 0
        return left


class CloseReader:
    """A body that lasts until the connection is closed."""

    __slots__ = ()

    def feed(self, data: bytes, out: list[bytes] | None = None) -> int:
        """Always MORE."""
        if out is not None:
            out.append(data)
        return MORE


def frame_chunk(data: bytes) -> bytes:
    """One chunk, framed. `data` must not be empty: an empty chunk would end the body."""
    return b"%x\r\n%b\r\n" % (len(data), data)
