"""Requests out of bytes: in order, whole, within limits, and the same for every split."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynctl.http.framing import frame_chunk
from dynctl.http.heads import HeadError
from dynctl.http.limits import Limits
from dynctl.http.request import Request, RequestReader

LENGTH = b"POST /a?b=c HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc"
CHUNKED = (
    b"POST /c HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" + frame_chunk(b"xyz") + b"0\r\n\r\n"
)
PLAIN = b"\r\nGET http://h:1/p?q HTTP/1.1\r\nHost: h\r\n\r\n"
SMALL = Limits(header_bytes=200, body_bytes=10)


def everything(pieces: list[bytes]) -> list[Request]:
    reader = RequestReader(Limits())
    found: list[Request] = []
    for piece in pieces:
        reader.feed(piece)
        while (request := reader.next()) is not None:
            found.append(request)
    return found


@given(st.lists(st.integers(min_value=0, max_value=300)))
def test_pipelined_requests_come_out_whole_and_in_order_for_every_split(cuts: list[int]) -> None:
    data = LENGTH + CHUNKED + PLAIN + LENGTH
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    found = everything([data[a:b] for a, b in pairwise(places)])
    assert [(r.method, r.path, r.query, r.body) for r in found] == [
        ("POST", "/a", "b=c", b"abc"),
        ("POST", "/c", "", b"xyz"),
        ("GET", "/p", "q", b""),
        ("POST", "/a", "b=c", b"abc"),
    ]


def test_stages_say_what_is_awaited() -> None:
    reader = RequestReader(Limits())
    assert reader.stage == "idle"
    for data, stage in ((LENGTH[:10], "head"), (LENGTH[10:-1], "body")):
        reader.feed(data)
        assert reader.next() is None
        assert reader.stage == stage
    reader.feed(LENGTH[-1:] + b"rest")
    request = reader.next()
    assert request is not None
    assert request.header(b"host") == b"h"
    assert request.header(b"none") is None
    assert reader.buffered == 4


def refused(data: bytes) -> HeadError:
    reader = RequestReader(SMALL)
    reader.feed(data)
    with pytest.raises(HeadError) as caught:
        reader.next()
    return caught.value


@pytest.mark.parametrize(
    "data", [b"GET /" + b"a" * 300, b"GET / HTTP/1.1\r\nHost: h\r\nX: " + b"a" * 200 + b"\r\n\r\n"]
)
def test_large_headers_are_431_whether_ended_or_not(data: bytes) -> None:
    assert refused(data).status == 431


def test_a_body_over_the_limit_is_413_before_it_is_read() -> None:
    assert refused(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 11\r\n\r\n").status == 413


def test_chunks_over_the_limit_are_413() -> None:
    head = b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert refused(head + frame_chunk(b"x" * 6) * 2).status == 413


def test_broken_chunks_are_400() -> None:
    assert refused(b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n").status == 400


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\x02", b"GET / HTTP/1.1\nHost: h\n\n", b" GET / HTTP/1.1", b"{}"]
)
def test_what_can_never_be_a_request_is_refused_at_once(data: bytes) -> None:
    assert refused(data).status == 400


def test_half_a_blank_line_is_waited_on() -> None:
    reader = RequestReader(Limits())
    reader.feed(b"\r")
    assert reader.next() is None
    reader.feed(b"\n" + LENGTH)
    assert reader.next() is not None


def test_continue_is_owed_once_and_only_while_the_body_is_missing() -> None:
    head = b"POST / HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n"
    reader = RequestReader(Limits())
    reader.feed(head)
    assert reader.next() is None
    assert reader.take_continue()
    assert not reader.take_continue()
    reader.feed(b"abc" + head + b"abc")
    assert reader.next() is not None
    assert reader.next() is not None
    assert not reader.take_continue()


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        (b"*", "*", ""),
        (b"/a?b?c", "/a", "b?c"),
        (b"http://h", "/", ""),
        (b"/x?u=http://y/z", "/x", "u=http://y/z"),
    ],
)
def test_targets(target: bytes, path: str, query: str) -> None:
    method = b"OPTIONS " if target == b"*" else b"GET "
    (request,) = everything([method + target + b" HTTP/1.1\r\nHost: h\r\n\r\n"])
    assert (request.path, request.query) == (path, query)


def test_deadlines_are_looked_at_four_times_within_the_shortest() -> None:
    assert Limits(header_timeout_s=0.4).sweep_interval_s() == pytest.approx(0.1)
    assert Limits().sweep_interval_s() == 1.0
    assert Limits(body_timeout_s=0.0).sweep_interval_s() == 0.01


def test_blank_lines_that_come_half_by_half_begin_no_request() -> None:
    reader = RequestReader(Limits())
    for half in (b"\r", b"\n", b"\r", b"\n"):
        reader.feed(half)
        assert reader.next() is None
        assert reader.stage == "idle"


def test_tiny_chunks_are_kept_as_one_piece_each_time_bytes_come() -> None:
    reader = RequestReader(Limits())
    reader.feed(
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" + frame_chunk(b"ab") * 5000
    )
    assert reader.next() is None
    assert len(reader._pieces) == 1
    reader.feed(b"0\r\n\r\n")
    request = reader.next()
    assert request is not None
    assert request.body == b"ab" * 5000
