from __future__ import annotations

import json
from typing import Any

import pytest

from dynctl.errors import RequestError
from dynctl.frontend.body import Body
from dynctl.frontend.hints import NO_HINTS, Hints, read_hints

PLAIN = Body.parse(b'{"model":"m"}')


def nvext(**fields: Any) -> Body:
    return Body.parse(json.dumps({"nvext": fields}).encode())


def test_request_without_hints_has_none() -> None:
    assert read_hints([(b"host", b"h"), (b"x-dynctl-other", b"1")], PLAIN) is NO_HINTS


def test_headers_of_both_families_say_the_same() -> None:
    ours = [
        (b"x-dynctl-worker", b"aggregated-1"),
        (b"x-dynctl-prefill-worker", b"prefill-0"),
        (b"x-dynctl-rank", b"2"),
        (b"x-dynctl-prefill-rank", b"3"),
        (b"x-dynctl-session-id", b"s"),
        (b"x-dynctl-session-final", b"true"),
        (b"x-dynctl-priority", b"-4"),
    ]
    theirs = [
        (b"x-dynamo-worker-instance-id", b"aggregated-1"),
        (b"x-dynamo-prefill-instance-id", b"prefill-0"),
        (b"x-dynamo-dp-rank", b"2"),
        (b"x-dynamo-prefill-dp-rank", b"3"),
        (b"x-dynamo-session-id", b"s"),
        (b"x-dynamo-session-final", b"1"),
        (b"x-dynamo-request-priority", b"-4"),
    ]
    wanted = Hints("s", True, "aggregated-1", "prefill-0", 2, 3, -4)
    assert read_hints(ours, PLAIN) == read_hints(theirs, PLAIN) == wanted
    assert wanted.pin("prefill") == ("prefill-0", 3)
    assert wanted.pin("decode") == wanted.pin("aggregated") == ("aggregated-1", 2)


@pytest.mark.parametrize(("value", "dry"), [(b"True", True), (b"0", False), (b"", False)])
def test_dry_run_is_a_flag(value: bytes, dry: bool) -> None:
    assert read_hints([(b"x-dynctl-dry-run", value)], PLAIN).dry_run is dry


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"x-dynctl-rank", b"-1"),
        (b"x-dynctl-rank", b"one"),
        (b"x-dynctl-priority", b"1.5"),
        (b"x-dynctl-priority", b"99999999999"),
        (b"x-dynctl-dry-run", b"perhaps"),
        (b"x-dynctl-session-id", b"s" * 257),
    ],
)
def test_wrong_header_is_named(name: bytes, value: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        read_hints([(name, value)], PLAIN)
    assert caught.value.where == name.decode()


def test_nvext_is_understood_and_headers_go_before_it() -> None:
    body = nvext(
        annotations=["query_instance_id", "token_ids"],
        backend_instance_id=7,
        prefill_worker_id="prefill-1",
        dp_rank=1,
        prefill_dp_rank=0,
        agent_hints={"priority": 2.0, "osl": 80, "speculative_prefill": True},
        greed_sampling=True,
    )
    wanted = Hints("", False, "7", "prefill-1", 1, 0, 2, 80, True)
    assert read_hints([], body) == wanted
    assert read_hints([(b"x-dynctl-worker", b"w")], body).worker == "w"


def test_decode_worker_goes_before_the_older_name() -> None:
    assert read_hints([], nvext(backend_instance_id=1, decode_worker_id=2)).worker == "2"


@pytest.mark.parametrize("text", [b'{"nvext":null}', b'{"nvext":{}}'])
def test_empty_nvext_says_nothing(text: bytes) -> None:
    assert read_hints([], Body.parse(text)) == NO_HINTS


def test_wrong_nvext_is_named() -> None:
    with pytest.raises(RequestError, match="dp_rank") as caught:
        read_hints([], nvext(dp_rank="first"))
    assert caught.value.where == "nvext"


def test_a_worker_cannot_be_named_at_any_length() -> None:
    with pytest.raises(RequestError, match="256 characters"):
        read_hints([], nvext(prefill_worker_id="p" * 257))


def test_far_priorities_and_outputs_are_clamped() -> None:
    hints = read_hints([], nvext(agent_hints={"priority": -1e30, "osl": -3}))
    assert (hints.priority, hints.expected_output) == (-1_000_000, 0)
    assert read_hints([], nvext(agent_hints={"osl": 2**70})).expected_output == 1_000_000
