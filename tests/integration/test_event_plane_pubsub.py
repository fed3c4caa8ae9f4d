"""Publisher and subscriber; an engine's publisher with its replay socket, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest

from dynctl.errors import PortInUse
from dynctl.protocol.registry import MembershipChange
from dynctl.transport.engine_events import EngineEventSource, EnginePublisher, EngineSubscriber
from dynctl.transport.event_plane import Publisher, Subscriber
from dynctl.transport.keys import Keys

ANY = EngineEventSource(endpoint="tcp://127.0.0.1:0", replay="tcp://127.0.0.1:0", topic="kv-events")


async def until(condition: Callable[[], bool], deadline_s: float = 10) -> None:
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110 - the condition has no event to wait for
            await asyncio.sleep(0.005)


def payload(seq: int, time: float | None = None) -> bytes:
    return msgspec.msgpack.encode([seq if time is None else time, [f"b{seq}"], 0])


@pytest.mark.parametrize("gather_s", [0.0, 0.002])
async def test_every_message_arrives_in_order_from_each_publisher(gather_s: float) -> None:
    keys = Keys.generate()
    publishers = [Publisher(keys, "tcp://127.0.0.1:0") for _ in range(2)]
    heard: dict[bytes, list[int]] = {b"t0": [], b"t1": []}

    def on_message(topic: bytes, body: bytes) -> None:
        heard[topic].append(msgspec.msgpack.decode(body, type=MembershipChange).seq)

    subscriber = Subscriber(keys, on_message, (b"t",), gather_s=gather_s)
    for publisher in publishers:
        subscriber.connect(publisher.start())
    topics = [b"t0", b"t1"]
    while not all(heard.values()):
        for topic, publisher in zip(topics, publishers, strict=True):
            publisher.publish(topic, MembershipChange(epoch=0, seq=-1))
        await asyncio.sleep(0.01)
    for seq in range(2000):
        for topic, publisher in zip(topics, publishers, strict=True):
            publisher.publish(topic, MembershipChange(epoch=0, seq=seq))
            publisher.publish(b"other", MembershipChange(epoch=0, seq=seq))
    await until(lambda: all(h[-1] == 1999 for h in heard.values()))
    assert [s for s in heard[b"t0"] if s >= 0] == list(range(2000))
    assert [s for s in heard[b"t1"] if s >= 0] == list(range(2000))
    for number in range(3):  # each after a rest that heard nothing
        await asyncio.sleep(0.02)
        publishers[0].publish(b"t0", MembershipChange(epoch=0, seq=9_000 + number))
        await until(lambda number=number: heard[b"t0"][-1] == 9_000 + number)  # type: ignore[misc]
    subscriber.close()
    for publisher in publishers:
        publisher.close()


async def test_disconnected_publisher_is_not_heard() -> None:
    keys = Keys.generate()
    publisher = Publisher(keys, "tcp://127.0.0.1:0")
    endpoint = publisher.start()
    heard: list[bytes] = []
    subscriber = Subscriber(keys, lambda topic, body: heard.append(topic))
    subscriber.connect(endpoint)
    subscriber.connect(endpoint)
    while not heard:
        publisher.publish(b"t", MembershipChange(epoch=0, seq=0))
        await asyncio.sleep(0.01)
    subscriber.disconnect(endpoint)
    subscriber.disconnect(endpoint)
    heard.clear()
    for _ in range(20):
        publisher.publish(b"late", MembershipChange(epoch=0, seq=0))
        await asyncio.sleep(0.005)
    assert b"late" not in heard
    subscriber.close()
    publisher.close()


async def test_handler_that_raises_does_not_stop_the_reader(caplog: pytest.LogCaptureFixture) -> None:
    keys = Keys.generate()
    publisher = Publisher(keys, "tcp://127.0.0.1:0")
    heard: list[bytes] = []

    def on_message(topic: bytes, body: bytes) -> None:
        heard.append(topic)
        if topic == b"bad":
            raise ValueError(topic)

    subscriber = Subscriber(keys, on_message)
    subscriber.connect(publisher.start())
    while not heard:
        publisher.publish(b"t", MembershipChange(epoch=0, seq=0))
        await asyncio.sleep(0.01)
    publisher.publish(b"bad", MembershipChange(epoch=0, seq=0))
    publisher.publish(b"good", MembershipChange(epoch=0, seq=0))
    await until(lambda: b"good" in heard)
    assert "message.failed" in caplog.text
    subscriber.close()
    publisher.close()


async def test_taken_port_is_named() -> None:
    publisher = Publisher(Keys.generate(), "tcp://127.0.0.1:0")
    endpoint = publisher.start()
    with pytest.raises(PortInUse, match=endpoint):
        Publisher(Keys.generate(), endpoint).start()
    engine = EnginePublisher(ANY)
    live, replay = engine.start()
    with pytest.raises(PortInUse):
        EnginePublisher(EngineEventSource(endpoint=live)).start()
    with pytest.raises(PortInUse):
        EnginePublisher(EngineEventSource(endpoint="tcp://127.0.0.1:0", replay=replay)).start()
    publisher.close()
    engine.close()


class Reader:
    """What a subscriber was told, in order."""

    def __init__(self, live: str, replay: str, *, replay_deadline_s: float = 5.0) -> None:
        self.seqs: list[int] = []
        self.resets: list[str] = []
        source = EngineEventSource(
            endpoint=live, replay=replay, topic="kv", replay_deadline_s=replay_deadline_s, check_s=0.1
        )
        self.subscriber = EngineSubscriber(source, self.on_batch, self.resets.append)
        self.subscriber.start()

    def on_batch(self, seq: int, data: bytes) -> None:
        assert msgspec.msgpack.decode(data)[1] == [f"b{seq}"]
        self.seqs.append(seq)


async def engine_at(live: str, replay: str) -> EnginePublisher:
    """An engine's publisher at endpoints that another one in this process has just closed."""
    async with asyncio.timeout(10):
        while True:
            engine = EnginePublisher(EngineEventSource(endpoint=live, replay=replay, topic="kv-events"))
            try:
                engine.start()
            except PortInUse:  # a closed socket gives its port back a moment later
                await asyncio.sleep(0.01)
                continue
            return engine


@pytest.fixture
async def closing() -> AsyncIterator[list[Reader | EnginePublisher]]:
    things: list[Reader | EnginePublisher] = []
    yield things
    for thing in things:
        thing.subscriber.close() if isinstance(thing, Reader) else thing.close()


async def test_late_reader_gets_all_from_the_replay(closing: list[Reader | EnginePublisher]) -> None:
    engine = EnginePublisher(ANY)
    live, replay = engine.start()
    for seq in range(3000):
        engine.publish(payload(seq))
    reader = Reader(live, replay)
    closing += [engine, reader]
    await until(lambda: len(reader.seqs) >= 3000)
    for seq in range(3000, 3100):
        engine.publish(payload(seq))
    await until(lambda: len(reader.seqs) >= 3100)
    assert reader.seqs == list(range(3100))
    assert reader.resets == []


async def test_reader_that_came_first_misses_nothing(closing: list[Reader | EnginePublisher]) -> None:
    first = EnginePublisher(ANY)
    live, replay = first.start()
    first.close()
    reader = Reader(live, replay, replay_deadline_s=0.3)
    closing.append(reader)
    engine = await engine_at(live, replay)
    closing.append(engine)
    for seq in range(50):
        engine.publish(payload(seq))
        await asyncio.sleep(0.002)
    await until(lambda: len(reader.seqs) >= 50)
    assert reader.seqs == list(range(50))
    assert reader.resets == []


async def test_lost_batches_are_replayed_even_when_the_publisher_goes_quiet(
    closing: list[Reader | EnginePublisher],
) -> None:
    engine = EnginePublisher(ANY, drop=lambda seq: seq % 10 in (3, 4, 9))
    live, replay = engine.start()
    reader = Reader(live, replay)
    closing += [engine, reader]
    for seq in range(100):
        engine.publish(payload(seq))
        await asyncio.sleep(0.001)
    await until(lambda: len(reader.seqs) >= 100)
    assert reader.seqs == list(range(100))
    assert reader.resets == []


async def test_gap_too_old_resets_visibly(closing: list[Reader | EnginePublisher]) -> None:
    engine = EnginePublisher(ANY, buffer_steps=5, drop=lambda seq: 10 <= seq < 30)
    live, replay = engine.start()
    reader = Reader(live, replay)
    closing += [engine, reader]
    await until(lambda: engine.publish(payload(reader_next(engine))) >= 0 and bool(reader.seqs))
    while reader_next(engine) < 40:
        engine.publish(payload(reader_next(engine)))
    await until(lambda: reader.seqs[-1] == 39)
    assert len(reader.resets) >= 1
    assert "gone" in reader.resets[-1]
    assert reader.seqs == sorted(set(reader.seqs))


def reader_next(engine: EnginePublisher) -> int:
    return engine._next


async def test_restarted_publisher_resets_and_is_read_from_its_start(
    closing: list[Reader | EnginePublisher],
) -> None:
    engine = EnginePublisher(ANY)
    live, replay = engine.start()
    reader = Reader(live, replay, replay_deadline_s=0.5)
    closing.append(reader)
    for seq in range(20):
        engine.publish(payload(seq))
    await until(lambda: len(reader.seqs) == 20)
    engine.close()
    again = await engine_at(live, replay)
    closing.append(again)
    again.publish(payload(0, time=1000.0))
    seq = 1
    while not reader.resets:
        again.publish(payload(seq, time=1000.0 + seq))
        seq += 1
        await asyncio.sleep(0.01)
    await until(lambda: reader.seqs[20:] == list(range(seq)))
    assert "began anew" in reader.resets[0]


async def test_replay_socket_that_never_answers_does_not_stop_the_live_ones(
    closing: list[Reader | EnginePublisher], caplog: pytest.LogCaptureFixture
) -> None:
    engine = EnginePublisher(EngineEventSource(endpoint="tcp://127.0.0.1:0", topic="kv"))
    live, none = engine.start()
    assert none == ""
    gone = EnginePublisher(ANY)
    _, dead = gone.start()
    gone.close()
    reader = Reader(live, dead, replay_deadline_s=0.05)
    closing += [engine, reader]
    while len(reader.seqs) < 10:
        engine.publish(payload(reader_next(engine)))
        await asyncio.sleep(0.01)
    assert "replay_late" in caplog.text
