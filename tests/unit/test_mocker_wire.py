"""The bytes of answers, of events and of metrics."""

from __future__ import annotations

import json

import msgspec
import pytest

from dynctl.engines import kv_dialect
from dynctl.engines.prometheus import samples
from dynctl.errors import RequestError
from dynctl.mocker.blocks import BlocksCleared, BlocksRemoved, BlocksStored, event_hash
from dynctl.mocker.events import encode_batch
from dynctl.mocker.faults import Faults
from dynctl.mocker.metrics import Histogram, Page, escape
from dynctl.mocker.wire import Envelope, StopScanner
from dynctl.protocol.kv_events import EngineCleared, EngineRemoved, EngineStored


@pytest.mark.parametrize("chat", [True, False])
def test_a_prebuilt_frame_is_the_chunk_it_stands_for(chat: bool) -> None:
    envelope = Envelope('id"1', chat, "m\n", 5)
    before, after = envelope.token_frame(3)
    data = (before + b" word" + after).removeprefix(b"data: ")
    assert data.endswith(b"\n\n")
    assert json.loads(data) == envelope.chunk(3, " word")


def scan(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    scanner = StopScanner(stops)
    shown = ""
    for piece in pieces:
        text, stopped = scanner.feed(piece)
        shown += text
        if stopped:
            return shown, True
    return shown + scanner.rest(), False


def test_a_stop_string_across_pieces_is_found_and_not_shown() -> None:
    assert scan(["b c"], [" a", " b", " c", " d"]) == (" a ", True)


def test_the_earliest_of_several_stops_counts() -> None:
    assert scan(["c", "ab"], ["xxabc"]) == ("xx", True)


def test_text_that_only_began_like_a_stop_is_shown_in_the_end() -> None:
    assert scan(["abcd"], ["xab", "c"]) == ("xabc", False)


def test_events_are_read_back_by_the_dialect_of_real_engines() -> None:
    a, b = b"a" * 32, b"b" * 32
    payload = encode_batch(
        1.5,
        [
            BlocksRemoved([a]),
            BlocksStored([a, b], None, [1, 2, 3, 4], "salt"),
            BlocksStored([b], a, [3, 4]),
            BlocksCleared(),
        ],
        rank=3,
        block_size=2,
    )
    batch = kv_dialect.decode(payload)
    assert (batch.timestamp, batch.rank) == (1.5, 3)
    removed, salted, plain, cleared = batch.events
    assert removed == EngineRemoved(block_hashes=[event_hash(a)])
    assert isinstance(salted, EngineStored)
    assert (salted.block_hashes, salted.parent) == ([event_hash(a), event_hash(b)], None)
    assert (salted.token_ids, salted.block_size, salted.cache_salt) == ([1, 2, 3, 4], 2, "salt")
    assert isinstance(plain, EngineStored)
    assert (plain.parent, plain.cache_salt) == (event_hash(a), "")
    assert cleared == EngineCleared()


def test_histogram_buckets_are_cumulative() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    page = Page()
    page.histogram("h", 'm="x"', histogram)
    page.value("gauge", "g", f'm="{escape(chr(34) + chr(92))}"', 2)
    found = {
        (s.name, s.labels.get("le")): s.value for s in samples(page.text(), ["h_bucket", "h_count", "h_sum"])
    }
    assert found == {
        ("h_bucket", "1.0"): 2,
        ("h_bucket", "2.0"): 3,
        ("h_bucket", "+Inf"): 4,
        ("h_count", None): 4,
        ("h_sum", None): 12,
    }
    assert [s.labels["m"] for s in samples(page.text(), ["g"])] == ['"\\']


def test_faults_are_switched_one_by_one_and_bad_ones_change_nothing() -> None:
    faults = Faults()
    faults.patch(b'{"crash_after_tokens": 10, "hang": true}')
    faults.patch(b'{"event_loss": 1.0}')
    assert msgspec.json.decode(faults.shown()) == {
        "crash_after_tokens": 10,
        "hang": True,
        "refuse_adapters": False,
        "refuse": False,
        "event_loss": 1.0,
    }
    with pytest.raises(RequestError, match="an object of crash_after_tokens"):
        faults.patch(b'{"refuse": true, "hagn": true}')
    assert not faults.refuse
    assert not faults.crashes(9)
    assert faults.crashes(1)
    assert faults.loses(0)
    assert faults.lost_batches == 1


def test_a_part_of_the_events_is_lost() -> None:
    faults = Faults(event_loss=0.3)
    assert 200 < sum(faults.loses(number) for number in range(1000)) < 400
    faults.patch(b'{"event_loss": 0}')
    assert not faults.loses(0)
