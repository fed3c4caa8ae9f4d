"""Body framing: the end of a body is found at the same byte however the bytes are split."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynctl.http import framing
from dynctl.http.framing import (
    MORE,
    ChunkReader,
    CloseReader,
    FramingError,
    LengthReader,
    chunk_size,
    frame_chunk,
)

payloads = st.lists(st.binary(min_size=1, max_size=40) | st.sampled_from([b"\r\n", b"0\r\n\r\n", b"x" * 300]))
trailers = st.lists(st.sampled_from([b"a: b\r\n", b"etag: 0\r\n"]), max_size=3)


def read(reader: framing.BodyReader, pieces: list[bytes]) -> tuple[int, bytes]:
    """Absolute index of the body's end, or MORE, and the payload."""
    out: list[bytes] = []
    before = 0
    for piece in pieces:
        end = reader.feed(piece, out)
        if end != MORE:
            return before + end, b"".join(out)
        before += len(piece)
    return MORE, b"".join(out)


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    """`data` cut at these places; equal places make empty pieces."""
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(places)]


@given(payloads, trailers, st.binary(max_size=10), st.lists(st.integers(min_value=0)))
def test_every_split_gives_the_same_end_and_payload(
    chunks: list[bytes], trailer: list[bytes], after: bytes, cuts: list[int]
) -> None:
    body = b"".join(map(frame_chunk, chunks)) + b"0\r\n" + b"".join(trailer) + b"\r\n"
    assert read(ChunkReader(), split(body + after, cuts)) == (len(body), b"".join(chunks))


@given(payloads, st.lists(st.integers(min_value=0)))
def test_boundaries_alone_end_where_decoding_ends(chunks: list[bytes], cuts: list[int]) -> None:
    body = b"".join(map(frame_chunk, chunks)) + b"0\r\n\r\n"
    reader = ChunkReader()
    before = 0
    for piece in split(body + b"next", cuts):
        end = reader.feed(piece)
        if end != MORE:
            assert before + end == len(body)
            return
        before += len(piece)
    pytest.fail("no end was found")


@given(st.binary(max_size=60), st.lists(st.integers(min_value=0)))
def test_garbage_gets_one_verdict_for_every_split(data: bytes, cuts: list[int]) -> None:
    def verdict(pieces: list[bytes]) -> tuple[int, bytes] | str:
        try:
            return read(ChunkReader(), pieces)
        except FramingError:
            return "refused"

    assert verdict([data]) == verdict(split(data, cuts)) or verdict([bytes([b]) for b in data]) == "refused"


def test_whole_chunks_one_by_one_take_the_short_way() -> None:
    reader = ChunkReader()
    for size in (200, 201, 200, 300, 301, 200, 15):
        assert reader.feed(frame_chunk(b"x" * size)) == MORE
        assert reader.feed(frame_chunk(b"x" * size)) == MORE
    assert reader.feed(b"0\r\n\r\n") == 5


def test_a_chunk_that_only_looks_whole_is_not_taken_for_one() -> None:
    reader = ChunkReader()
    reader.feed(frame_chunk(b"x" * 200))
    assert reader.feed(b"ff\r\n") == MORE
    inside = frame_chunk(b"y" * 200)[:207]
    assert reader.feed(inside) == MORE
    assert reader.feed(b"z" * (255 - len(inside)) + b"\r\n0\r\n\r\n") == 255 - len(inside) + 7


@pytest.mark.parametrize(
    "line", [b"", b"-1", b"+1", b"0x10", b"1_0", b" 1", b"g", b"1 2", b"1\n", b"1;a\rb", b"f" * 16]
)
def test_size_lines_that_parsers_read_differently_are_refused(line: bytes) -> None:
    with pytest.raises(FramingError):
        chunk_size(line)


@pytest.mark.parametrize(
    ("line", "size"), [(b"0", 0), (b"a", 10), (b"FF", 255), (b"5;name=value", 5), (b"5 ", 5)]
)
def test_size_lines(line: bytes, size: int) -> None:
    assert chunk_size(line) == chunk_size(line) == size


@pytest.mark.parametrize(
    "pieces", [[b"2\r\nabc\r\n"], [b"2\r\nab", b"x\n"], [b"2\r\nabx"], [b"2\r\nab\r", b"x"]]
)
def test_a_chunk_of_another_length_than_it_says_is_refused(pieces: list[bytes]) -> None:
    with pytest.raises(FramingError, match="longer or shorter"):
        read(ChunkReader(), pieces)


def test_endless_size_line_is_refused() -> None:
    reader = ChunkReader()
    reader.feed(b"1;" + b"x" * (framing.LINE_BYTES - 2))
    with pytest.raises(FramingError, match="chunk line"):
        reader.feed(b"x")


def test_endless_trailers_are_refused() -> None:
    reader = ChunkReader()
    reader.feed(b"0\r\n")
    reader.feed(b"a: b\r\n" * (framing.TRAILER_BYTES // 4))
    with pytest.raises(FramingError, match="trailers"):
        reader.feed(b"a: b\r\n")


def test_remembered_sizes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framing, "_SIZES_KEPT", 0)
    assert chunk_size(b"abcde1") == 0xABCDE1
    assert b"abcde1" not in framing._sizes


@given(st.binary(min_size=1, max_size=50), st.binary(max_size=5), st.lists(st.integers(min_value=0)))
def test_length_ends_at_the_same_byte_for_every_split(body: bytes, after: bytes, cuts: list[int]) -> None:
    assert read(LengthReader(len(body)), split(body + after, cuts)) == (len(body), body)


def test_length_and_close_without_payload() -> None:
    assert LengthReader(3).feed(b"ab") == MORE
    assert LengthReader(3).feed(b"abcd") == 3
    assert CloseReader().feed(b"abc") == MORE
    assert read(CloseReader(), [b"a", b"b"]) == (MORE, b"ab")
