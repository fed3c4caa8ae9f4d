"""What engines, workers and clients send, taken apart: the error that is meant for it, or a sound value."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from dynctl.engines.kv_dialect import decode
from dynctl.engines.trtllm_kv import PollReader
from dynctl.errors import CodecError, DynctlError, EngineFailed
from dynctl.frontend.admission import Models
from dynctl.frontend.body import Body
from dynctl.frontend.call import Endpoint, read_form
from dynctl.frontend.refusal import openai_error
from dynctl.frontend.whole import as_events, is_refusal, output_tokens
from dynctl.kv.translate import Translator
from dynctl.observability.tracing import Tracing
from dynctl.protocol.instances import ModelCard
from dynctl.protocol.kv_events import EngineKvBatch, KvBatch
from tests.fuzz.conftest import FUZZ

_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=True)
    | st.text(max_size=6)
    | st.binary(max_size=40)
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
)
SMALL = st.integers(0, 9)
HASHES = st.lists(SMALL | VALUES, max_size=3)
STORED = st.fixed_dictionaries(
    {},
    optional={
        "type": st.just("BlockStored") | VALUES,
        "block_hashes": HASHES | VALUES,
        "parent_block_hash": st.none() | SMALL | VALUES,
        "token_ids": st.lists(SMALL | VALUES, max_size=6) | VALUES,
        "block_size": st.integers(-1, 3) | VALUES,
        "lora_id": st.none() | VALUES,
        "lora_name": st.none() | VALUES,
        "medium": st.sampled_from([None, "GPU", "CPU", "x"]) | VALUES,
        "extra_keys": st.none() | VALUES,
        "group_idx": st.none() | VALUES,
        "kv_cache_spec_kind": st.none() | VALUES,
        "cache_salt": st.none() | VALUES,
    },
)
GOOD = st.builds(
    lambda first, size, parent: {
        "type": "BlockStored",
        "block_hashes": [first],
        "parent_block_hash": parent,
        "token_ids": [1] * size,
        "block_size": size,
        "medium": "GPU",
    },
    SMALL,
    st.integers(1, 3),
    st.none() | SMALL,
)
EVENTS = st.one_of(
    STORED,
    st.builds(lambda good, more: {**good, **more}, GOOD, STORED),
    GOOD,
    st.fixed_dictionaries({"type": st.just("BlockRemoved"), "block_hashes": HASHES | VALUES}),
    st.just({"type": "AllBlocksCleared"}),
    st.lists(st.sampled_from(["BlockStored", "BlockRemoved", "AllBlocksCleared"]) | VALUES, max_size=8),
    VALUES,
)
BATCHES = st.tuples(
    st.floats(0, 1e9) | VALUES, st.lists(EVENTS, max_size=5) | VALUES, st.none() | SMALL | VALUES
)
PAYLOADS = st.one_of(
    BATCHES.map(lambda batch: msgspec.msgpack.encode(list(batch))),
    st.binary(max_size=80),
    st.integers(1, 3_000).map(lambda depth: b"\x91" * depth),
    st.just(b"\x93\xcb" + b"\0" * 8 + b"\x91\x81\xa4type\xa2\xff\xff\xc0"),
)


@FUZZ
@given(st.lists(PAYLOADS, max_size=4))
def test_an_engines_kv_events_are_batches_that_can_be_passed_on_or_a_codec_error(
    payloads: list[bytes],
) -> None:
    """Past the decoder nothing looks again: what it lets through goes on to every frontend."""
    translator = Translator(0)
    wire = msgspec.msgpack.Decoder(KvBatch)
    for number, payload in enumerate(payloads):
        try:
            batch = decode(payload)
        except CodecError:
            continue
        events = translator.feed(EngineKvBatch(timestamp=batch.timestamp, rank=0, events=batch.events))
        sent = KvBatch("w", 1, 0, number, events, translator.block_size)
        assert wire.decode(msgspec.msgpack.encode(sent)) == sent
    translator.snapshot()


POLLED = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "event_id": SMALL | VALUES,
            "window_size": SMALL | VALUES,
            "attention_dp_rank": st.none() | SMALL | VALUES,
            "data": st.fixed_dictionaries(
                {"type": st.sampled_from(["created", "stored", "removed", "updated"])},
                optional={
                    "blocks": st.lists(
                        st.fixed_dictionaries(
                            {},
                            optional={
                                "block_hash": SMALL | VALUES,
                                "tokens": st.lists(
                                    st.fixed_dictionaries({"token_id": SMALL | VALUES}), max_size=3
                                )
                                | VALUES,
                                "cache_level": SMALL | VALUES,
                            },
                        ),
                        max_size=3,
                    )
                    | VALUES,
                    "parent_hash": st.none() | SMALL | VALUES,
                    "block_hashes": HASHES | VALUES,
                },
            )
            | VALUES,
        },
    )
    | VALUES,
    max_size=4,
)


def as_json(value: Any) -> bytes:
    return json.dumps(value, default=lambda raw: raw.decode("latin-1")).encode()


@FUZZ
@given(st.lists(POLLED.map(as_json) | st.binary(max_size=40) | st.just(b"[" * 3000), max_size=3))
def test_events_that_are_polled_are_batches_or_a_codec_error(answers: list[bytes]) -> None:
    reader, translator = PollReader(2), Translator(0)
    for answer in answers:
        try:
            batches = reader.read(answer, 1.0)
        except CodecError:
            reader = PollReader(2)
            continue
        for batch in batches:
            msgspec.msgpack.encode(
                translator.feed(EngineKvBatch(timestamp=batch.timestamp, rank=0, events=batch.events))
            )


BODIES = st.one_of(
    st.fixed_dictionaries(
        {},
        optional={
            "model": st.just("m") | VALUES,
            "prompt": st.lists(SMALL | st.lists(SMALL, max_size=2), max_size=3) | VALUES,
            "messages": st.lists(
                st.fixed_dictionaries({}, optional={"role": st.just("user") | VALUES, "content": VALUES})
                | VALUES,
                max_size=3,
            )
            | VALUES,
            "stream": st.booleans() | VALUES,
            "n": SMALL | VALUES,
            "max_tokens": st.integers(-1, 5) | VALUES,
            "stream_options": VALUES,
        },
    ).map(as_json),
    VALUES.map(as_json),
    st.binary(max_size=60),
    st.integers(1, 3_000).map(lambda depth: b'{"messages":' + b"[" * depth),
)


@FUZZ
@given(
    BODIES,
    st.sampled_from([Endpoint("/c", "c", "chat"), Endpoint("/p", "p", "completions"), Endpoint("/e", "e")]),
)
def test_a_clients_body_is_a_request_or_an_error_that_is_told(data: bytes, endpoint: Endpoint) -> None:
    try:
        body = Body.parse(data)
        form = read_form(endpoint, body, Models(ModelCard(name="m", max_model_len=8)), frozenset({"secret"}))
        msgspec.json.encode(form.body.opened())
    except DynctlError:
        return


@FUZZ
@given(VALUES.map(as_json) | st.binary(max_size=200))
def test_an_engines_answer_is_read_or_said_to_be_none(data: bytes) -> None:
    openai_error(data)
    is_refusal(data + b'"finish_reason":"abort"')
    output_tokens(data)
    try:
        as_events(data, usage=True)
    except EngineFailed:
        return


@FUZZ
@given(
    st.lists(st.tuples(st.sampled_from([b"traceparent", b"tracestate"]), st.binary(max_size=80)), max_size=4)
)
def test_whatever_a_client_says_of_its_trace_the_engine_gets_a_valid_one(
    headers: list[tuple[bytes, bytes]],
) -> None:
    trace = Tracing(Random(1)).of(headers)
    sent = dict(trace.headers(trace.root))
    version, trace_id, span, flags = sent[b"traceparent"].split(b"-")
    assert (version, len(trace_id), len(span), len(flags)) == (b"00", 32, 16, 2)
    assert b"\n" not in sent.get(b"tracestate", b"")
