from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import pytest

from dynctl.http.exchange import Exchange, Line
from dynctl.http.framing import LAST_CHUNK, frame_chunk
from dynctl.http.heads import RequestHead
from dynctl.http.request import Request


class Wire:
    """Stands for a connection: keeps what is written, piece by piece."""

    write_paused = closes_soon = False

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.ends: list[str] = []
        self.loop = cast(asyncio.AbstractEventLoop, None)

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def raw_writer(self) -> Callable[[bytes], None]:
        return self.written.append

    def exchange_done(self, *, keep_alive: bool) -> None:
        self.ends.append("done")

    def cut(self, *, reset: bool) -> None:
        self.ends.append("cut")


def opened(wire: Wire, headers: list[tuple[bytes, bytes]], *, raw: bool) -> Exchange:
    request = Request(RequestHead("POST", "/x", [], False, True, 0, False, False), b"")
    exchange = Exchange(request, cast(Line, wire))
    exchange.start(200, headers, framing="raw" if raw else "chunked", with_body=True)
    return exchange


CHUNKED = [(b"transfer-encoding", b"chunked")]


@pytest.mark.parametrize("raw", [True, False])
def test_a_head_whose_body_is_at_hand_costs_no_packet_of_its_own(raw: bool) -> None:
    wire = Wire()
    exchange = opened(wire, CHUNKED if raw else [], raw=raw)
    assert wire.written == []
    for data in (b"one", b"two"):
        exchange.write(frame_chunk(data) if raw else data)
    exchange.end()
    first, *rest = wire.written
    assert first.startswith(b"HTTP/1.1 200 OK\r\n")
    assert first.endswith(b"\r\n\r\n" + frame_chunk(b"one"))
    assert rest == [frame_chunk(b"two"), *([] if raw else [LAST_CHUNK])]
    assert wire.ends == ["done"]


@pytest.mark.parametrize("raw", [True, False])
def test_a_head_whose_body_never_came_is_sent_all_the_same(raw: bool) -> None:
    wire = Wire()
    opened(wire, CHUNKED if raw else [], raw=raw).end()
    sent = b"".join(wire.written)
    assert sent.startswith(b"HTTP/1.1 200 OK\r\n")
    assert sent.endswith(b"\r\n\r\n" if raw else b"\r\n\r\n" + LAST_CHUNK)


def test_a_client_whose_answer_is_cut_has_its_head() -> None:
    wire = Wire()
    opened(wire, CHUNKED, raw=True).abort()
    assert wire.written[0].startswith(b"HTTP/1.1 200 OK\r\n")
    assert wire.ends == ["cut"]


def test_nothing_is_written_to_a_client_that_left_before_the_first_piece() -> None:
    wire = Wire()
    exchange = opened(wire, CHUNKED, raw=True)
    exchange.lost()
    exchange.write(b"late")
    exchange.end()
    assert wire.written == []
