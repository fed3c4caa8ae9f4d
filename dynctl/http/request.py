"""Requests out of a connection's bytes: a decider without sockets or clock."""

from __future__ import annotations

from typing import Final, Literal

from dynctl.http.framing import ChunkReader, FramingError
from dynctl.http.heads import HEAD_END, HeadError, Headers, RequestHead, parse_request_head
from dynctl.http.limits import Limits

Stage = Literal["idle", "head", "body"]

_BLANK_LINES: Final = b"\r\n"


class Request:
    """One whole request. Header names are lower-case; `path` and `query` are parts of `target`, undecoded."""

    __slots__ = ("body", "headers", "http_1_0", "keep_alive", "method", "path", "peer", "query", "target")

    def __init__(self, head: RequestHead, body: bytes, peer: str = "") -> None:
        self.method = head.method
        self.target = head.target
        self.path, _, self.query = _origin_form(head.target).partition("?")
        self.headers: Headers = head.headers
        self.body = body
        self.peer = peer
        self.http_1_0 = head.http_1_0
        self.keep_alive = head.keep_alive

    def header(self, name: bytes) -> bytes | None:
        """First value of the header with this lower-case name."""
        for key, value in self.headers:
            if key == name:
                return value
        return None


def _origin_form(target: str) -> str:
    """The path and query of a target; proxies may send it in absolute form (RFC 9112, 3.2.2)."""
    if target.startswith("/") or "://" not in target:
        return target
    rest = target.partition("://")[2]
    slash = rest.find("/")
    return rest[slash:] if slash >= 0 else "/"


class RequestReader:
    """Takes bytes in, gives whole requests out, one at a time and only when asked."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._buffer = bytearray()
        self._scanned = 0
        self._head: RequestHead | None = None
        self._chunks: ChunkReader | None = None
        self._pieces: list[bytes] = []
        self._body_bytes = 0
        self._owes_continue = False

    @property
    def stage(self) -> Stage:
        """What is being waited for: nothing begun, the rest of a head, or the rest of a body.

        Half a blank line begins nothing: else blank lines, half by half, would put off the deadline for ever.
        """
        if self._head is not None:
            return "body"
        return "head" if self._buffer and self._buffer != b"\r" else "idle"

    @property
    def buffered(self) -> int:
        """Bytes held that belong to no request given out yet."""
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        """Take bytes that came."""
        self._buffer += data

    def take_continue(self) -> bool:
        """Whether "100 Continue" is owed now; true once a request."""
        owed = self._owes_continue
        self._owes_continue = False
        return owed

    def next(self) -> Request | None:
        """The next whole request, or None when bytes are missing. After a HeadError nothing can be read."""
        if self._head is None:
            head = self._next_head()
            if head is None:
                return None
            self._begin_body(head)
        return self._next_body()

    def _next_head(self) -> RequestHead | None:
        buffer = self._buffer
        while buffer.startswith(_BLANK_LINES):  # RFC 9112, 2.2: blank lines before a request are ignored
            del buffer[:2]
        end = buffer.find(HEAD_END, max(0, self._scanned - 3))
        size = end + 4 if end >= 0 else len(buffer)
        if size > self._limits.header_bytes:
            raise HeadError(
                431,
                "headers_too_large",
                f"the request line and headers are over {self._limits.header_bytes} bytes",
            )
        if end < 0:
            self._check_beginning()
            self._scanned = len(buffer)
            return None
        head = parse_request_head(bytes(buffer[:size]))
        del buffer[:size]
        self._scanned = 0
        return head

    def _check_beginning(self) -> None:
        """Refuse at once what can never become a request, instead of waiting for its end."""
        buffer = self._buffer
        if buffer[:1] and not 65 <= buffer[0] <= 90 and bytes(buffer) != b"\r":
            raise HeadError(400, "malformed_http", "malformed HTTP: a request begins with its method")
        if b"\n\n" in buffer:
            raise HeadError(400, "malformed_http", "malformed HTTP: header lines are ended by CRLF")

    def _begin_body(self, head: RequestHead) -> None:
        if head.length > self._limits.body_bytes:
            raise self._too_large()
        self._head = head
        self._chunks = ChunkReader() if head.chunked else None
        self._pieces = []
        self._body_bytes = 0
        self._owes_continue = head.expects_continue and (head.chunked or len(self._buffer) < head.length)

    def _next_body(self) -> Request | None:
        head = self._head
        assert head is not None
        body = self._whole_chunks() if self._chunks is not None else self._whole_length(head.length)
        if body is None:
            return None
        self._head = None
        self._owes_continue = False
        return Request(head, body)

    def _whole_length(self, length: int) -> bytes | None:
        buffer = self._buffer
        if len(buffer) < length:
            return None
        body = bytes(memoryview(buffer)[:length])
        del buffer[:length]
        return body

    def _whole_chunks(self) -> bytes | None:
        assert self._chunks is not None
        data = bytes(self._buffer)
        self._buffer.clear()
        pieces: list[bytes] = []
        try:
            end = self._chunks.feed(data, pieces)
        except FramingError as error:
            raise HeadError(400, "malformed_http", f"malformed HTTP: {error}") from error
        payload = b"".join(pieces)  # one object for all that came, however small the client's chunks are
        self._pieces.append(payload)
        self._body_bytes += len(payload)
        if self._body_bytes > self._limits.body_bytes:
            raise self._too_large()
        if end < 0:
            return None
        self._buffer += data[end:]
        return b"".join(self._pieces)

    def _too_large(self) -> HeadError:
        return HeadError(413, "body_too_large", f"the request body is over {self._limits.body_bytes} bytes")
