from __future__ import annotations

import json
from typing import Any

import pytest

from dynctl.errors import EngineFailed
from dynctl.frontend.accounts import Accounts
from dynctl.frontend.cutter import unframed
from dynctl.frontend.stream import Relay, Ways
from dynctl.frontend.whole import as_events, is_refusal, output_tokens
from dynctl.http.framing import LAST_CHUNK, Framing, frame_chunk
from dynctl.observability.metrics import Metrics

pytestmark = pytest.mark.usefixtures("each_relay")


class Client:
    """Stands for the exchange: keeps what is written."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.calls: list[str] = []

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def end(self) -> None:
        self.calls.append("end")

    def abort(self) -> None:
        self.calls.append("abort")


class Setup:
    def __init__(self) -> None:
        self.metrics = Metrics()
        self.client = Client()
        self.account = Accounts(self.metrics).open("m", "completions", stream=True)
        ways = Ways(
            head=lambda: self.client.calls.append("head"),
            first_token=lambda: self.client.calls.append("first"),
            give_up=lambda: self.client.calls.append("give up"),
        )
        self.relay = Relay(self.client, self.account, ways)  # type: ignore[arg-type]


def event(data: Any) -> bytes:
    return frame_chunk(b"data: " + json.dumps(data).encode() + b"\n\n")


def test_bytes_go_through_as_they_came_after_a_whole_first_event() -> None:
    test = Setup()
    first = event({"a": 1})
    test.relay.feed(first[:5])
    assert not test.relay.begun
    assert test.client.calls == []
    test.relay.feed(first[5:])
    assert test.client.calls == ["first", "head"]
    test.relay.feed(b"odd bytes")
    test.relay.feed(LAST_CHUNK)
    test.relay.complete()
    assert b"".join(test.client.written) == first + b"odd bytes" + LAST_CHUNK
    assert test.client.calls[-1] == "end"


def test_tokens_are_counted_by_events_without_usage_and_by_usage_with_it() -> None:
    test = Setup()
    for data in (event({}), event({}) + event({}), frame_chunk(b"data: [DONE]\n\n")):
        test.relay.feed(data)
    test.relay.complete()
    assert test.account.output_tokens == 3
    test = Setup()
    for data in (event({}), event({"usage": {"completion_tokens": 77}}), frame_chunk(b"data: [DONE]\n\n")):
        test.relay.feed(data)
    test.relay.complete()
    assert test.account.output_tokens == 77


def test_latency_between_tokens_counts_each_token_of_a_piece() -> None:
    test = Setup()
    test.relay.feed(event({}))
    test.relay.feed(event({}) * 3)
    text = test.metrics.render().decode()
    assert 'inter_token_latency_seconds_count{model="m"} 3.0' in text
    assert 'time_to_first_token_seconds_count{model="m"} 1.0' in text


def test_an_answer_counts_once_with_the_mean_of_its_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    test = Setup()
    test.account.first_byte(100.0)
    test.account.output_tokens = 11
    monkeypatch.setattr("dynctl.frontend.accounts.time.monotonic", lambda: 100.5)
    test.account.close()
    text = test.metrics.render().decode()
    assert 'frontend_time_per_output_token_seconds_sum{model="m"} 0.05' in text
    assert 'frontend_time_per_output_token_seconds_count{model="m"} 1.0' in text


@pytest.mark.parametrize(
    "first",
    [
        {"error": {"message": "x"}},
        {"object": "error", "message": "x"},
        {"choices": [{"index": 0, "text": "", "finish_reason": "abort"}]},
    ],
)
def test_a_refusal_as_first_event_is_kept_from_the_client(first: Any) -> None:
    test = Setup()
    test.relay.feed(event(first))
    test.relay.feed(event({}))
    assert test.relay.refusal
    assert test.client.written == []
    assert test.client.calls == ["give up"]


def test_text_that_looks_like_a_refusal_is_text() -> None:
    test = Setup()
    test.relay.feed(event({"choices": [{"text": '"finish_reason": "abort" data: {"error"'}]}))
    assert test.relay.begun
    assert not test.relay.refusal


def test_a_first_event_without_end_is_passed_on_at_some_size() -> None:
    test = Setup()
    test.relay.feed(b"x" * 20_000)
    assert test.relay.begun


def test_an_empty_answer_is_an_answer() -> None:
    test = Setup()
    test.relay.feed(LAST_CHUNK)
    test.relay.complete()
    assert test.client.written == [LAST_CHUNK]
    assert test.client.calls == ["first", "head", "end"]


def test_breaking_off_between_events_tells_the_client() -> None:
    test = Setup()
    test.relay.feed(event({}))
    test.relay.break_off(b'{"error":{}}')
    assert test.client.written[-1] == frame_chunk(b'data: {"error":{}}\n\n') + LAST_CHUNK
    assert test.client.calls[-1] == "end"


def test_breaking_off_inside_an_event_cuts_the_connection() -> None:
    test = Setup()
    test.relay.feed(event({}))
    test.relay.feed(b"1f\r\ndata: {")
    test.relay.break_off(b"{}")
    assert test.client.written[-1] == b"1f\r\ndata: {"
    assert test.client.calls[-1] == "abort"


def test_only_an_empty_abort_is_a_refusal() -> None:
    def answer(*choices: dict[str, Any]) -> bytes:
        return json.dumps({"choices": list(choices)}).encode()

    aborted = {"finish_reason": "abort"}
    assert is_refusal(answer({**aborted, "text": ""}))
    assert is_refusal(answer({**aborted, "message": {"content": None}}))
    assert not is_refusal(answer({**aborted, "text": "partial"}))
    assert not is_refusal(answer({**aborted, "text": ""}, {"finish_reason": "stop", "text": ""}))
    assert not is_refusal(answer({"finish_reason": "stop", "text": "x"}))
    assert not is_refusal(b'{"finish_reason":"abort"')
    assert not is_refusal(b'{"finish_reason":"abort"}')


def test_a_chats_opening_is_no_token() -> None:
    test = Setup()
    opening = event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    for data in (opening + event({}), event({}), frame_chunk(b"data: [DONE]\n\n"), LAST_CHUNK):
        test.relay.feed(data)
    test.relay.complete()
    assert test.account.output_tokens == 2


def test_tokens_of_a_stream_that_the_client_left_are_counted() -> None:
    test = Setup()
    for data in (event({}), event({}), event({})):
        test.relay.feed(data)
    test.relay.count_tokens()
    test.account.close("cancelled")
    assert 'output_tokens_total{model="m"} 3.0' in test.metrics.render().decode()


def test_output_tokens_of_a_whole_answer() -> None:
    assert output_tokens(b'{"usage":{"completion_tokens": 12}}') == 12
    assert output_tokens(b"{}") == 0


def test_a_whole_text_answer_as_a_stream() -> None:
    whole = {
        "id": "1",
        "object": "text_completion",
        "choices": [{"index": 0, "text": "t", "disaggregated_params": {}}],
    }
    events = as_events(json.dumps(whole).encode(), usage=True).decode().split("\n\n")
    assert json.loads(events[0][6:]) == {
        "id": "1",
        "object": "text_completion",
        "choices": [{"index": 0, "text": "t"}],
    }
    assert events[1:] == ["data: [DONE]", ""]
    for broken in (b"{", b"{}", b'{"choices": [1]}', b"[]"):
        with pytest.raises(EngineFailed):
            as_events(broken, usage=False)


# --- what is kept for another worker to go on from


class Kept(Setup):
    """A relay whose stream could go on elsewhere."""

    def __init__(self, framing: Framing = "chunked", *, room: bool = True) -> None:
        super().__init__()
        self.kept: list[bytes] = []
        self.room = room
        ways = Ways(
            head=lambda: self.client.calls.append("head"),
            first_token=lambda: self.client.calls.append("first"),
            give_up=lambda: self.client.calls.append("give up"),
        )
        self.relay = Relay(self.client, self.account, ways, self, framing)  # type: ignore[arg-type]

    def keep(self, pieces: list[bytes]) -> bool:
        self.kept += pieces
        return self.room


def said(text: str, finish: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "text": text, "finish_reason": finish}]})


def test_the_end_of_a_stream_is_not_a_packet_of_its_own() -> None:
    test = Kept()
    last = said("b", "stop") + frame_chunk(b"data: [DONE]\n\n") + LAST_CHUNK
    test.relay.feed(said("a"))
    test.relay.feed(last)
    assert test.client.written[-1] == last
    assert not test.relay.ended_early
    test.relay.complete()
    assert test.client.written == [said("a"), last]


@pytest.mark.parametrize("tail", [b"", b'data: {"error": {"message": "x"}}\n\n'])
def test_the_end_of_a_stream_that_has_no_finish_is_kept_from_the_client(tail: bytes) -> None:
    test = Kept()
    test.relay.feed(said("a"))
    test.relay.feed(said("b") + (frame_chunk(tail) if tail else b"") + LAST_CHUNK)
    assert LAST_CHUNK not in b"".join(test.client.written)


def test_half_an_event_is_held_back_until_it_is_whole() -> None:
    test = Kept()
    whole = said("a") + said("b") + said("c")
    test.relay.feed(said("a") + said("b")[:9])
    assert test.client.written == [said("a")]
    test.relay.feed(said("b")[9:] + said("c")[:30])
    test.relay.feed(said("c")[30:])
    assert b"".join(test.client.written) == whole == b"".join(test.relay.pieces)
    test.relay.feed(said("d"))
    assert test.client.written[-1] == said("d")
    assert test.relay.kept
    assert test.relay.events == 4


def test_breaking_off_inside_a_held_event_still_tells_the_client() -> None:
    test = Kept()
    test.relay.feed(said("a") + said("b")[:9])
    test.relay.break_off(b'{"error":{}}')
    assert test.client.written == [said("a"), frame_chunk(b'data: {"error":{}}\n\n') + LAST_CHUNK]


@pytest.mark.parametrize("framing", ["chunked", "close"])
def test_events_before_an_abort_reach_the_client_and_it_does_not(framing: Framing) -> None:
    def sent(*events: bytes) -> bytes:
        return b"".join(frame_chunk(e) if framing == "chunked" else e for e in events)

    a, b = (b'data: {"choices":[{"text":"%b","finish_reason":null}]}\n\n' % x for x in (b"a", b"b"))
    abort = b'data: {"choices":[{"text":"","finish_reason":"abort"}]}\n\n'
    test = Kept(framing)
    test.relay.feed(sent(a))
    test.relay.feed(sent(b + abort))
    test.relay.feed(sent(b))
    assert b"".join(test.client.written) == sent(a) + sent(b)
    assert "abort" in test.relay.refusal
    assert test.client.calls[-1] == "give up"


def test_an_error_that_is_the_clients_own_is_the_answer() -> None:
    test = Kept()
    test.relay.feed(said("a"))
    test.relay.feed(event({"error": {"message": "no", "code": 400}}))
    assert not test.relay.refusal
    assert not test.relay.ended_early
    assert len(test.client.written) == 2
    test = Kept()
    test.relay.feed(said("a"))
    test.relay.feed(event({"error": {"message": "dead", "code": 500}}))
    assert test.relay.refusal


def test_a_stream_without_its_finish_has_ended_early() -> None:
    test = Kept()
    assert test.relay.ended_early
    test.relay.feed(said("a"))
    test.relay.feed(LAST_CHUNK)
    assert test.relay.ended_early
    assert test.client.written == [said("a")]
    test = Kept()
    for data in (said("a", "stop"), frame_chunk(b"data: [DONE]\n\n") + LAST_CHUNK):
        test.relay.feed(data)
    assert not test.relay.ended_early
    test.relay.complete()
    assert b"".join(test.client.written).endswith(b"[DONE]\n\n\r\n" + LAST_CHUNK)


def test_events_that_end_by_crlf_are_events() -> None:
    test = Kept()
    one = frame_chunk(b'data: {"choices":[{"finish_reason":null}]}\r\n\r\n')
    test.relay.feed(one)
    test.relay.feed(one[:5])
    test.relay.feed(one[5:])
    assert test.client.written == [one, one]


def test_a_stream_whose_events_have_no_end_is_passed_on_and_kept_no_more() -> None:
    test = Kept()
    test.relay.feed(said("a"))
    size = 5 * 2**20
    test.relay.feed(b"%x\r\n" % (size + 2))
    for _ in range(5):
        test.relay.feed(b"x" * 2**20)
    assert not test.relay.kept
    assert "4 MiB" in test.relay.unkept
    test.relay.feed(b"y")
    test.relay.feed(b"z\r\n")
    test.relay.feed(b"raw again, whatever it is")
    assert test.client.written[-1] == b"raw again, whatever it is"
    assert unframed(b"".join(test.client.written[1:-1])) == b"x" * size + b"yz"
    test.relay.break_off(b"{}")
    assert test.client.calls[-1] == "abort"


def test_an_event_of_many_kilobytes_is_waited_for_and_kept() -> None:
    for first in (True, False):
        test = Kept()
        if not first:
            test.relay.feed(said("a"))
        long = said("x" * 300_000)
        for start in range(0, len(long), 65_536):
            test.relay.feed(long[start : start + 65_536])
        assert b"".join(test.client.written) == (b"" if first else said("a")) + long
        assert test.relay.kept


def test_half_an_event_held_back_when_the_keeper_gives_up_goes_before_what_comes_next() -> None:
    test = Kept(room=False)
    sent = b"".join(said(str(number)) for number in range(1500)) + LAST_CHUNK
    size = len(said("1000")) + 3
    for start in range(0, len(sent), size):
        test.relay.feed(sent[start : start + size])
    test.relay.complete()
    assert not test.relay.kept
    assert unframed(b"".join(test.client.written)) == unframed(sent)
    assert test.client.written[-1].endswith(LAST_CHUNK)


# --- events and chunks that end in different places


def chunked(payload: bytes, size: int) -> list[bytes]:
    """As an engine sends it that cuts its body after so many bytes, each chunk read by itself."""
    return [frame_chunk(payload[start : start + size]) for start in range(0, len(payload), size)]


def events_of(eol: bytes, *texts: str) -> list[bytes]:
    choices = [{"index": 0, "text": text, "finish_reason": None} for text in texts]
    choices[-1]["finish_reason"] = "stop"
    events = [b"data: " + json.dumps({"choices": [choice]}).encode() + eol + eol for choice in choices]
    return [*events, b"data: [DONE]" + eol + eol]


@pytest.mark.parametrize("eol", [b"\n", b"\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("text", ["b", "error", '"abort"', "data: [DONE]"])
def test_events_over_several_chunks_reach_the_client_whole_whatever_they_say(eol: bytes, text: str) -> None:
    events = events_of(eol, "a", text, "c", "d")
    payload = b"".join(events)
    for size in (1, 2, 3, 5, 8, 13, 21, 34, 55, 67, 68, 69, 70):
        test = Kept()
        for piece in [*chunked(payload, size), LAST_CHUNK]:
            test.relay.feed(piece)
            assert len(unframed(b"".join(test.client.written))) in _ends(events)
        assert not test.relay.ended_early
        test.relay.complete()
        assert unframed(b"".join(test.client.written)) == payload
        assert b"".join(test.client.written).endswith(b"\r\n" + LAST_CHUNK)


@pytest.mark.parametrize("eol", [b"\n", b"\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("size", [3, 20, 64])
def test_a_stream_lost_within_a_chunk_still_tells_the_client(eol: bytes, size: int) -> None:
    payload = b"".join(events_of(eol, "a", "error", "c", "d")[:-2])
    sent = b"".join(chunked(payload, size))
    for cut in range(len(sent)):
        test = Kept()
        test.relay.feed(sent[:cut])
        if test.relay.begun:
            test.relay.break_off(b'{"error":{}}')
            told = unframed(b"".join(test.client.written))
            assert told.endswith(eol + eol + b'data: {"error":{}}\n\n')


def test_events_that_end_in_several_ways_are_not_held_back() -> None:
    test = Kept()
    for number, eol in enumerate([b"\r\n", b"\n", b"\n", b"\r\n", b"\n"]):
        one = frame_chunk((b"data: {}" if number else b": ping") + eol + eol)
        test.relay.feed(one)
        assert test.client.written[-1] == one
        assert len(test.client.written) == number + 1


def _ends(events: list[bytes]) -> set[int]:
    return {sum(map(len, events[:number])) for number in range(len(events) + 1)}


# --- where a body ends with its connection


def test_half_an_event_with_a_finish_in_it_is_no_end_of_an_answer() -> None:
    a, last, done = events_of(b"\n", "a", "b")
    for cut in range(len(last) - 2):
        test = Kept("close")
        test.relay.feed(a + last[:cut])
        assert test.relay.ended_early, last[:cut]
        assert test.client.written == [a]
    for end in range(1, len(done) - 2):
        test = Kept("close")
        test.relay.feed(a + last + done[:end])
        assert test.relay.ended_early, "half of what follows a finish"


def test_a_last_event_without_its_empty_line_is_one() -> None:
    a, last, done = events_of(b"\n", "a", "b")
    for end in (last[:-1], last[:-2], last + done[:-2], last + done, last + done + b"\n"):
        test = Kept("close")
        test.relay.feed(a + end)
        assert not test.relay.ended_early
        test.relay.complete()
        assert b"".join(test.client.written) == a + end


def test_a_text_that_names_the_end_of_a_stream_is_none() -> None:
    test = Kept("close")
    test.relay.feed(b'data: {"choices":[{"text":"data: [DONE]","finish_reason":null}]}\n\n')
    assert test.relay.ended_early


@pytest.mark.parametrize("room", [True, False])
def test_what_is_kept_is_handed_over_in_portions_until_it_is_too_much(room: bool) -> None:
    test = Kept(room=room)
    for number in range(3000):
        test.relay.feed(said(str(number)))
    assert test.relay.kept is room
    assert len(test.relay.pieces) < 1030
    if room:
        assert test.kept + list(test.relay.pieces) == test.client.written
    test.relay.count_tokens()
    assert test.account.output_tokens == 3000


def test_a_body_of_known_length_is_cut_when_it_breaks() -> None:
    test = Kept("length")
    test.relay.feed(b"data: {}\n\n")
    assert not test.relay.kept
    test.relay.break_off(b"{}")
    assert test.client.calls[-1] == "abort"
