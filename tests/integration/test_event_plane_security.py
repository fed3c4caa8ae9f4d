"""Without the deployment's keys nothing goes in or out; with them both patterns work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from dynctl.errors import PeerLost
from dynctl.protocol.control import Call
from dynctl.protocol.registry import MembershipChange
from dynctl.transport.control import ControlClient, ControlServer
from dynctl.transport.event_plane import Publisher, Subscriber
from dynctl.transport.keys import Keys

QUIET_MS = 400
CHANGE = MembershipChange(epoch=1, seq=1)

AnySocket = zmq.Socket[Any]
Dress = Callable[[AnySocket, Keys], None]


def no_curve(socket: AnySocket, keys: Keys) -> None:
    """A plain peer."""


def plain_password(socket: AnySocket, keys: Keys) -> None:
    socket.setsockopt(zmq.PLAIN_USERNAME, b"admin")
    socket.setsockopt(zmq.PLAIN_PASSWORD, b"admin")


def wrong_client_key(socket: AnySocket, keys: Keys) -> None:
    """Knows the server's public key, has a pair of its own."""
    other = Keys.generate()
    socket.setsockopt(zmq.CURVE_SERVERKEY, keys.public.encode())
    socket.setsockopt(zmq.CURVE_PUBLICKEY, other.public.encode())
    socket.setsockopt(zmq.CURVE_SECRETKEY, other.secret.encode())


def stolen_public_key(socket: AnySocket, keys: Keys) -> None:
    """Claims the allowed public key without its secret."""
    socket.setsockopt(zmq.CURVE_SERVERKEY, keys.public.encode())
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public.encode())
    socket.setsockopt(zmq.CURVE_SECRETKEY, Keys.generate().secret.encode())


def wrong_server_key(socket: AnySocket, keys: Keys) -> None:
    socket.setsockopt(zmq.CURVE_SERVERKEY, Keys.generate().public.encode())
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public.encode())
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret.encode())


STRANGERS = [no_curve, plain_password, wrong_client_key, stolen_public_key, wrong_server_key]


@contextmanager
def stranger(kind: int, endpoint: str, dress: Dress, keys: Keys) -> Iterator[zmq.asyncio.Socket]:
    with zmq.asyncio.Context() as context, context.socket(kind) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        dress(socket, keys)
        if kind == zmq.SUB:
            socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.connect(endpoint)
        yield socket


@pytest.fixture
def keys() -> Keys:
    return Keys.generate()


@pytest.fixture
async def publisher(keys: Keys) -> AsyncIterator[tuple[Publisher, str]]:
    publisher = Publisher(keys, "tcp://127.0.0.1:0")
    endpoint = publisher.start()
    yield publisher, endpoint
    publisher.close()


async def publish_until_heard(publisher: Publisher, endpoint: str, keys: Keys) -> int:
    """Publish until a rightly keyed reader has heard it; returns how often."""
    heard = asyncio.Event()
    subscriber = Subscriber(keys, lambda topic, body: heard.set())
    subscriber.connect(endpoint)
    count = 0
    async with asyncio.timeout(10):
        while not heard.is_set():
            publisher.publish(b"t", CHANGE)
            count += 1
            await asyncio.sleep(0.01)
    subscriber.close()
    return count


@pytest.mark.parametrize("dress", STRANGERS)
async def test_stranger_reads_nothing_from_a_publisher(
    publisher: tuple[Publisher, str], keys: Keys, dress: Dress
) -> None:
    sender, endpoint = publisher
    with stranger(zmq.SUB, endpoint, dress, keys) as socket:
        await publish_until_heard(sender, endpoint, keys)
        for _ in range(10):
            sender.publish(b"t", CHANGE)
        assert not await socket.poll(QUIET_MS)


@pytest.mark.parametrize("dress", STRANGERS)
async def test_stranger_cannot_call(keys: Keys, dress: Dress) -> None:
    calls: list[str] = []

    async def handler(op: str, body: msgspec.Raw) -> None:
        calls.append(op)

    server = ControlServer(keys, "tcp://127.0.0.1:0", handler)
    endpoint = server.start()
    client = ControlClient(keys, endpoint)
    with stranger(zmq.DEALER, endpoint, dress, keys) as socket:
        await socket.send(msgspec.msgpack.encode(Call(id=1, op="evil")))
        await client.call("good", None, type(None), 5)
        assert not await socket.poll(QUIET_MS)
    client.close()
    await server.close()
    assert calls == ["good"]


async def test_reader_takes_nothing_from_a_publisher_without_keys(keys: Keys) -> None:
    heard: list[bytes] = []
    with zmq.asyncio.Context() as context, context.socket(zmq.PUB) as rogue:
        rogue.setsockopt(zmq.LINGER, 0)
        port = rogue.bind_to_random_port("tcp://127.0.0.1")
        subscriber = Subscriber(keys, lambda topic, body: heard.append(body))
        subscriber.connect(f"tcp://127.0.0.1:{port}")
        for _ in range(20):
            await rogue.send_multipart([b"t", b"poison"])
            await asyncio.sleep(0.02)
        subscriber.close()
    assert heard == []


async def test_reader_takes_nothing_from_a_publisher_with_other_keys(keys: Keys) -> None:
    rogue = Publisher(Keys.generate(), "tcp://127.0.0.1:0")
    endpoint = rogue.start()
    heard: list[bytes] = []
    subscriber = Subscriber(keys, lambda topic, body: heard.append(body))
    subscriber.connect(endpoint)
    for _ in range(20):
        rogue.publish(b"t", CHANGE)
        await asyncio.sleep(0.02)
    subscriber.close()
    rogue.close()
    assert heard == []


async def test_caller_gives_nothing_to_a_server_without_keys(keys: Keys) -> None:
    with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as rogue:
        rogue.setsockopt(zmq.LINGER, 0)
        port = rogue.bind_to_random_port("tcp://127.0.0.1")
        client = ControlClient(keys, f"tcp://127.0.0.1:{port}")
        with pytest.raises(PeerLost):
            await client.call("secret", None, type(None), QUIET_MS / 1000)
        assert not await rogue.poll(0)
        client.close()


async def test_wrongly_keyed_client_is_told_why(keys: Keys) -> None:
    async def handler(op: str, body: msgspec.Raw) -> None:
        raise AssertionError(op)

    server = ControlServer(keys, "tcp://127.0.0.1:0", handler)
    client = ControlClient(Keys.generate(), server.start())
    with pytest.raises(PeerLost, match=r"refused our keys|no connection"):
        await client.call("x", None, type(None), 0.5)
    client.close()
    await server.close()
