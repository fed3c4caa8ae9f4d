"""Wire messages survive the wire, and readers of another release survive ours."""

from __future__ import annotations

import msgspec
import pytest

from dynctl.protocol import control, instances, kv_events, openai, registry

CARD = instances.ModelCard(name="m", block_size=16)
INSTANCE = instances.Instance(
    id="decode-0",
    incarnation=2,
    role="decode",
    index=0,
    node="n",
    pid=1,
    started_at=1.5,
    url="http://h:1",
    model=CARD,
)


@pytest.mark.parametrize(
    "message",
    [
        INSTANCE,
        registry.Membership(
            epoch=1, seq=2, complete=True, members=[registry.Member(instance=INSTANCE, state="ready")]
        ),
        registry.MembershipChange(epoch=1, seq=3, removed=["decode-0"]),
        kv_events.KvBatch("w", 1, 0, 7, [kv_events.Stored([2**64 - 1]), kv_events.Cleared()], 16),
        kv_events.KvSyncReply(incarnation=1, rank=0, next_seq=3, snapshot=[kv_events.Stored([1], "G2")]),
        kv_events.LoadReport("w", 1, 0, 3, 4, 0.5),
    ],
)
def test_messages_round_trip(message: msgspec.Struct) -> None:
    wire = msgspec.msgpack.encode(message)
    assert msgspec.msgpack.decode(wire, type=type(message)) == message


def test_a_registry_call_is_not_taken_for_another() -> None:
    renew = msgspec.msgpack.encode(registry.Renew(id="a", incarnation=1))
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(renew, type=registry.Leave)


def test_unknown_fields_of_a_newer_release_are_ignored() -> None:
    wire = msgspec.msgpack.encode({**msgspec.to_builtins(INSTANCE), "from_the_future": 1})
    assert msgspec.msgpack.decode(wire, type=instances.Instance) == INSTANCE


def test_call_body_stays_opaque_until_its_op_is_known() -> None:
    wire = msgspec.msgpack.encode(control.Call(id=1, op="x", body=msgspec.Raw(msgspec.msgpack.encode([1]))))
    assert msgspec.msgpack.decode(msgspec.msgpack.decode(wire, type=control.Call).body) == [1]


def test_error_body_has_the_shape_openai_clients_parse() -> None:
    body = msgspec.json.decode(
        openai.error_body("no such model", "invalid_request_error", code="model_not_found")
    )
    assert body == {
        "error": {
            "message": "no such model",
            "type": "invalid_request_error",
            "param": None,
            "code": "model_not_found",
        }
    }
