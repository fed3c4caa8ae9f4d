"""The head of an HTTP/1.x message, parsed strictly: what two parsers could read differently is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

import httptools

Headers = list[tuple[bytes, bytes]]

HEAD_END: Final = b"\r\n\r\n"
_REASONS: Final = {int(status): status.phrase.encode() for status in HTTPStatus}
_OURS: Final = frozenset((b"connection", b"content-length", b"expect", b"host", b"transfer-encoding"))
_HOP_BY_HOP: Final = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)


class HeadError(Exception):
    """A message that cannot be taken: the HTTP status to answer with, a stable code and a sentence."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


@dataclass(slots=True)
class RequestHead:
    """`length` is the announced body length (0 when none); it is 0 when `chunked`."""

    method: str
    target: str
    headers: Headers
    http_1_0: bool
    keep_alive: bool
    length: int
    chunked: bool
    expects_continue: bool


@dataclass(slots=True)
class ResponseHead:
    """`length` None = no content-length."""

    status: int
    headers: Headers
    keep_alive: bool
    length: int | None
    chunked: bool


class _Collector:
    """Receives the parser's callbacks for one head. `ours`: the values of those that are read here."""

    __slots__ = ("complete", "headers", "ours", "url")

    def __init__(self) -> None:
        self.headers: Headers = []
        self.ours: dict[bytes, list[bytes]] = {}
        self.url = b""
        self.complete = 0

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        pair = name, value = name.lower(), value.strip(b" \t")
        self.headers.append(pair)
        if name in _OURS:
            self.ours.setdefault(name, []).append(value)

    def on_headers_complete(self) -> None:
        self.complete += 1


def _bad(message: str) -> HeadError:
    return HeadError(400, "malformed_http", message)


def _feed(parser: httptools.HttpRequestParser | httptools.HttpResponseParser, head: bytes) -> None:
    try:
        parser.feed_data(head)
    except httptools.HttpParserUpgrade:
        pass  # an offer to speak another protocol: not taken, the message itself is complete
    except httptools.HttpParserError as error:
        raise _bad(f"malformed HTTP: {error}") from error


def _items(given: list[bytes] | None) -> list[bytes]:
    """Values of one header, comma-separated lists taken apart, lower-case."""
    return [item.strip(b" \t").lower() for value in given for item in value.split(b",")] if given else []


def _length(lengths: list[bytes] | None) -> int | None:
    if not lengths:
        return None
    if len(lengths) > 1 or not lengths[0].isdigit() or len(lengths[0]) > 18:
        raise _bad("malformed HTTP: content-length must be given once, as digits")
    return int(lengths[0])


def _framing(ours: dict[bytes, list[bytes]]) -> tuple[int | None, bool]:
    """Announced length and whether chunked; both at once is how requests are smuggled, so it is refused."""
    length = _length(ours.get(b"content-length"))
    codings = _items(ours.get(b"transfer-encoding"))
    if not codings:
        return length, False
    if length is not None:
        raise _bad("malformed HTTP: both content-length and transfer-encoding are given")
    if codings != [b"chunked"]:
        raise HeadError(501, "unsupported_transfer_encoding", "transfer-encoding must be chunked")
    return None, True


def _keep_alive(ours: dict[bytes, list[bytes]], http_1_0: bool) -> bool:
    options = _items(ours.get(b"connection"))
    return b"keep-alive" in options if http_1_0 else b"close" not in options


def parse_request_head(head: bytes) -> RequestHead:
    """The request whose head is exactly `head`, closing empty line included. Raises HeadError."""
    seen = _Collector()
    parser = httptools.HttpRequestParser(seen)
    _feed(parser, head)
    if seen.complete != 1:
        raise _bad("malformed HTTP: the header section is not ended by CRLF CRLF")
    version = parser.get_http_version()
    if version not in ("1.0", "1.1"):
        raise HeadError(505, "unsupported_http_version", f"HTTP/{version} is not spoken here, HTTP/1.1 is")
    http_1_0 = version == "1.0"
    length, chunked = _framing(seen.ours)
    if chunked and http_1_0:
        raise _bad("malformed HTTP: transfer-encoding in an HTTP/1.0 request")
    hosts = len(seen.ours.get(b"host", ()))
    if hosts > 1 or (hosts == 0 and not http_1_0):
        raise _bad("malformed HTTP: a request has exactly one host header")
    expects = _items(seen.ours.get(b"expect"))
    if expects and expects != [b"100-continue"]:
        raise HeadError(417, "expectation_failed", "the only expectation known is 100-continue")
    return RequestHead(
        method=parser.get_method().decode("latin-1"),
        target=seen.url.decode("latin-1"),
        headers=seen.headers,
        http_1_0=http_1_0,
        keep_alive=_keep_alive(seen.ours, http_1_0),
        length=length or 0,
        chunked=chunked,
        expects_continue=bool(expects) and not http_1_0,
    )


def parse_response_head(head: bytes) -> ResponseHead:
    """The response whose head is exactly `head`, closing empty line included. Raises HeadError."""
    seen = _Collector()
    parser = httptools.HttpResponseParser(seen)
    _feed(parser, head)
    if seen.complete != 1:
        raise _bad("malformed HTTP: the header section is not ended by CRLF CRLF")
    length, chunked = _framing(seen.ours)
    return ResponseHead(
        status=parser.get_status_code(),
        headers=seen.headers,
        keep_alive=_keep_alive(seen.ours, parser.get_http_version() == "1.0"),
        length=length,
        chunked=chunked,
    )


def end_to_end(headers: Sequence[tuple[bytes, bytes]]) -> Headers:
    """Headers without those that belong to one connection only (RFC 9110, 7.6.1). Names are lower-case."""
    named = {
        item.strip(b" \t").lower()
        for name, value in headers
        if name == b"connection"
        for item in value.split(b",")
    }
    return [pair for pair in headers if pair[0] not in _HOP_BY_HOP and pair[0] not in named]


def _write_head(first_line: bytes, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    lines = [first_line]
    lines.extend(name + b": " + value for name, value in headers)
    head = b"\r\n".join(lines) + HEAD_END
    if head.count(b"\n") != len(lines) + 1 or head.count(b"\r") != len(lines) + 1:
        raise ValueError(f"a line break inside the header {first_line!r}")
    return head


def response_head(status: int, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Status line and headers as bytes. Raises ValueError for a line break inside a header."""
    return _write_head(b"HTTP/1.1 %d %b" % (status, _REASONS.get(status, b"")), headers)


def request_head(method: str, path: str, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Request line and headers as bytes. Raises ValueError for a line break or blank where none may be."""
    line = f"{method} {path} HTTP/1.1".encode("latin-1")
    if line.count(b" ") != 2:
        raise ValueError(f"a blank inside the request line {line!r}")
    return _write_head(line, headers)
