"""Message heads: what two parsers could read differently is refused."""

from __future__ import annotations

import pytest

from dynctl.http import heads
from dynctl.http.heads import (
    HeadError,
    end_to_end,
    parse_request_head,
    parse_response_head,
    request_head,
    response_head,
)


def request_with(*lines: bytes, first: bytes = b"POST /v1/x?q=1 HTTP/1.1") -> bytes:
    return b"\r\n".join([first, *lines]) + b"\r\n\r\n"


def test_request_head_is_read() -> None:
    head = parse_request_head(request_with(b"Host: a", b"Content-Length: 12", b"X-Y:  z "))
    assert (head.method, head.target, head.length, head.chunked) == ("POST", "/v1/x?q=1", 12, False)
    assert head.headers == [(b"host", b"a"), (b"content-length", b"12"), (b"x-y", b"z")]
    assert head.keep_alive
    assert not head.http_1_0
    assert not head.expects_continue


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ((b"Host: a", b"Content-Length: 1", b"Transfer-Encoding: chunked"), 400),
        ((b"Host: a", b"Transfer-Encoding: chunked", b"Content-Length: 1"), 400),
        ((b"Host: a", b"Content-Length: 1", b"Content-Length: 1"), 400),
        ((b"Host: a", b"Content-Length: 1, 1"), 400),
        ((b"Host: a", b"Content-Length: +1"), 400),
        ((b"Host: a", b"Content-Length: 9999999999999999999"), 400),
        ((b"Host: a", b"Transfer-Encoding: gzip, chunked"), 501),
        ((b"Host: a", b"Transfer-Encoding: xchunked"), 400),
        ((b"Host: a", b"X: a", b" folded"), 400),
        ((b"Host: a", b"X : a"), 400),
        ((b"Host: a", b": a"), 400),
        ((b"Host: a", b"X: \x00"), 400),
        ((b"Host: a", b"X: a\nY: b"), 400),
        ((b"Host: a", b"Expect: miracles"), 417),
        ((b"Host: a", b"Host: b"), 400),
        ((), 400),
    ],
)
def test_ambiguous_requests_are_refused(lines: tuple[bytes, ...], status: int) -> None:
    with pytest.raises(HeadError) as caught:
        parse_request_head(request_with(*lines))
    assert caught.value.status == status
    assert caught.value.message


@pytest.mark.parametrize(
    ("first", "status"),
    [
        (b"GET / HTTP/2.0", 505),
        (b"GET / HTTP/1.2", 400),
        (b"GET /", 505),
        (b"FETCH / HTTP/1.1", 400),
        (b"GET / HTTP/0.9", 505),
        (b"GET /\x7f HTTP/1.1", 400),
    ],
)
def test_bad_request_lines_are_refused(first: bytes, status: int) -> None:
    with pytest.raises(HeadError) as caught:
        parse_request_head(request_with(b"Host: a", first=first))
    assert caught.value.status == status


def test_head_must_be_exactly_one_head() -> None:
    with pytest.raises(HeadError, match="CRLF CRLF"):
        parse_request_head(b"GET / HTTP/1.1\r\nHost: a\r\n")
    with pytest.raises(HeadError):
        parse_request_head(request_with(b"Host: a", first=b"GET / HTTP/1.1") * 2)
    with pytest.raises(HeadError):
        parse_response_head(b"HTTP/1.1 200 OK\r\n")


def test_an_offer_to_upgrade_is_not_taken() -> None:
    head = parse_request_head(
        request_with(b"Host: a", b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c")
    )
    assert head.keep_alive
    assert head.length == 0


@pytest.mark.parametrize(
    ("first", "connection", "kept"),
    [
        (b"GET / HTTP/1.1", b"close", False),
        (b"GET / HTTP/1.1", b"x, Close", False),
        (b"GET / HTTP/1.1", b"x", True),
        (b"GET / HTTP/1.0", b"x", False),
        (b"GET / HTTP/1.0", b"Keep-Alive", True),
    ],
)
def test_keep_alive(first: bytes, connection: bytes, kept: bool) -> None:
    head = parse_request_head(request_with(b"Host: a", b"Connection: " + connection, first=first))
    assert head.keep_alive is kept


def test_http_1_0_has_no_chunks_and_waits_for_no_continue() -> None:
    first = b"POST / HTTP/1.0"
    with pytest.raises(HeadError):
        parse_request_head(request_with(b"Transfer-Encoding: chunked", first=first))
    assert not parse_request_head(request_with(b"Expect: 100-continue", first=first)).expects_continue
    assert parse_request_head(request_with(b"Host: a", b"Expect: 100-Continue")).expects_continue


def test_response_heads() -> None:
    head = parse_response_head(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n")
    assert (head.status, head.chunked, head.length, head.keep_alive) == (200, True, None, True)
    head = parse_response_head(b"HTTP/1.0 404 No\r\nContent-Length: 3\r\n\r\n")
    assert (head.status, head.chunked, head.length, head.keep_alive) == (404, False, 3, False)
    with pytest.raises(HeadError):
        parse_response_head(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n")
    with pytest.raises(HeadError):
        parse_response_head(b"SSH-2.0-x\r\n\r\n")


def test_hop_by_hop_headers_stay_behind() -> None:
    headers = [
        (b"connection", b"X-Secret, close"),
        (b"x-secret", b"1"),
        (b"te", b"x"),
        (b"content-type", b"t"),
    ]
    assert end_to_end(headers) == [(b"content-type", b"t")]


def test_heads_are_written() -> None:
    assert response_head(200, [(b"a", b"b")]) == b"HTTP/1.1 200 OK\r\na: b\r\n\r\n"
    assert response_head(299, []) == b"HTTP/1.1 299 \r\n\r\n"
    assert request_head("GET", "/x", [(b"host", b"h")]) == b"GET /x HTTP/1.1\r\nhost: h\r\n\r\n"


@pytest.mark.parametrize("value", [b"a\r\nx: y", b"a\nx: y", b"a\rb"])
def test_a_line_break_in_a_header_is_not_sent(value: bytes) -> None:
    with pytest.raises(ValueError, match="line break"):
        response_head(200, [(b"x", value)])


@pytest.mark.parametrize("path", ["/a b", "/a HTTP/1.1\r\nx: y"])
def test_a_path_cannot_hold_another_request(path: str) -> None:
    with pytest.raises(ValueError, match=r"blank|line break"):
        request_head("GET", path, [])


def test_two_framings_are_refused_even_if_the_parser_lets_them_through() -> None:
    with pytest.raises(HeadError, match="both"):
        heads._framing({b"content-length": [b"1"], b"transfer-encoding": [b"chunked"]})
