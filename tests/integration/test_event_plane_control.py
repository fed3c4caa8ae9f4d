"""Calls over ROUTER/DEALER: many at once, deadlines, a server that comes and goes, garbage."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
import pytest
import zmq

from dynctl.errors import (
    CodecError,
    DeadlineExceeded,
    DynctlError,
    NotReady,
    PeerLost,
    PortInUse,
    Rejected,
    TransportError,
)
from dynctl.protocol.registry import Leave
from dynctl.transport import control
from dynctl.transport.control import ControlClient, ControlServer, read_body
from dynctl.transport.keys import Keys
from dynctl.transport.sockets import Channel, client_socket

Handler = Callable[[str, msgspec.Raw], Awaitable[msgspec.Struct | None]]
Serve = Callable[..., tuple[ControlServer, ControlClient]]


async def echo(op: str, body: msgspec.Raw) -> Leave:
    call = read_body(body, Leave)
    if call.reason == "slow":
        await asyncio.sleep(0.05)
    return call


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    servers: list[ControlServer] = []
    clients: list[ControlClient] = []
    keys = Keys.generate()

    def make(handler: Handler, endpoint: str = "tcp://127.0.0.1:0") -> tuple[ControlServer, ControlClient]:
        server = ControlServer(keys, endpoint, handler)
        servers.append(server)
        client = ControlClient(keys, server.start())
        clients.append(client)
        return server, client

    yield make
    for client in clients:
        client.close()
    for server in servers:
        await server.close()


async def test_many_calls_at_once_get_their_own_answers(serve: Serve) -> None:
    _, client = serve(echo)
    bodies = [Leave(id=f"s{i}", incarnation=i, reason="slow" if i % 3 == 0 else "") for i in range(300)]
    answers = await asyncio.gather(*(client.call("echo", body, Leave, 10) for body in bodies))
    assert answers == bodies


async def test_unanswered_call_ends_at_its_deadline(serve: Serve) -> None:
    async def never(op: str, body: msgspec.Raw) -> None:
        await asyncio.Event().wait()

    _, client = serve(never)
    with pytest.raises(DeadlineExceeded, match="no answer to wait"):
        await client.call("wait", None, type(None), 0.2)


async def test_call_without_a_server_says_no_connection() -> None:
    keys = Keys.generate()
    server = ControlServer(keys, "tcp://127.0.0.1:0", echo)
    endpoint = server.start()
    await server.close()
    client = ControlClient(keys, endpoint)
    with pytest.raises(PeerLost, match="no connection"):
        await client.call("x", None, type(None), 0.2)
    client.close()


async def test_call_without_a_server_does_not_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers wait for a dead controller for hours: each try to send asked for the next, at a core's cost."""
    tries = 0
    send = Channel.send

    def counted(self: Channel, frames: list[bytes]) -> bool:
        nonlocal tries
        tries += 1
        return send(self, frames)

    monkeypatch.setattr(Channel, "send", counted)
    client = ControlClient(Keys.generate(), "tcp://127.0.0.1:9")
    with pytest.raises(TransportError):
        await client.call("echo", None, Leave, 0.3)
    client.close()
    assert 0 < tries < 20


async def test_server_that_dies_fails_the_calls_it_had(serve: Serve) -> None:
    entered = asyncio.Event()

    async def never(op: str, body: msgspec.Raw) -> None:
        entered.set()
        await asyncio.Event().wait()

    server, client = serve(never)
    call = asyncio.create_task(client.call("wait", None, type(None), 30))
    await asyncio.wait_for(entered.wait(), 5)
    await server.close()
    with pytest.raises(PeerLost, match="connection was lost"):
        await asyncio.wait_for(call, 5)


async def test_client_finds_a_restarted_server_and_sends_nothing_stale(serve: Serve) -> None:
    server, client = serve(echo)
    await client.call("echo", Leave(id="a", incarnation=1), Leave, 5)
    await server.close()
    with pytest.raises(PeerLost):
        await client.call("stale", Leave(id="stale", incarnation=1), Leave, 0.2)
    seen: list[str] = []

    async def note(op: str, body: msgspec.Raw) -> Leave:
        seen.append(op)
        return await echo(op, body)

    serve(note, client.endpoint)
    await client.call("fresh", Leave(id="a", incarnation=1), Leave, 10)
    assert seen == ["fresh"]


async def test_error_of_the_handler_reaches_the_caller_as_that_error(serve: Serve) -> None:
    async def refuse(op: str, body: msgspec.Raw) -> None:
        raise NotReady("decode-0 is loading", where="node1", hint="wait")

    _, client = serve(refuse)
    with pytest.raises(NotReady) as caught:
        await client.call("x", None, type(None), 5)
    assert (caught.value.message, caught.value.where, caught.value.hint) == (
        "decode-0 is loading",
        "node1",
        "wait",
    )


async def test_broken_handler_is_logged_and_answered(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    async def broken(op: str, body: msgspec.Raw) -> None:
        if op == "bad":
            raise ZeroDivisionError

    _, client = serve(broken)
    with pytest.raises(DynctlError, match="ZeroDivisionError in bad"):
        await client.call("bad", None, type(None), 5)
    assert "Traceback" in caplog.text
    await client.call("good", None, type(None), 5)


async def test_body_of_the_wrong_shape_is_a_codec_error_both_ways(serve: Serve) -> None:
    _, client = serve(echo)
    with pytest.raises(CodecError, match="not a Leave"):
        await client.call("x", None, Leave, 5)
    with pytest.raises(CodecError, match="not a int"):
        await client.call("x", Leave(id="a", incarnation=1), int, 5)


@pytest.mark.parametrize(
    "frames", [[b"\xc1garbage"], [b""], [b"", b""], [b"a", b"b", b"c"], [b"\x93" * 1000]], ids=repr
)
async def test_garbage_is_answered_and_the_server_lives(serve: Serve, frames: list[bytes]) -> None:
    keys = Keys.generate()
    server = ControlServer(keys, "tcp://127.0.0.1:0", echo)
    client = ControlClient(keys, server.start())
    answers: asyncio.Queue[list[bytes]] = asyncio.Queue()
    socket = client_socket(zmq.DEALER, keys)
    socket.connect(client.endpoint)
    channel = Channel(socket, answers.put_nowait)
    channel.send(frames)
    answer = await asyncio.wait_for(answers.get(), 5)
    assert b"codec" in answer[-1]
    leave = Leave(id="a", incarnation=1)
    assert await client.call("echo", leave, Leave, 5) == leave
    channel.close()
    client.close()
    await server.close()


async def test_taken_port_is_named(serve: Serve) -> None:
    _, client = serve(echo)
    other = ControlServer(Keys.generate(), client.endpoint, echo)
    with pytest.raises(PortInUse, match=client.endpoint):
        other.start()


async def test_endpoint_that_is_none_is_refused() -> None:
    with pytest.raises(TransportError, match="cannot connect"):
        ControlClient(Keys.generate(), "nonsense")
    with pytest.raises(TransportError, match="cannot bind"):
        ControlServer(Keys.generate(), "nonsense", echo).start()


async def test_closing_ends_waiting_calls(serve: Serve) -> None:
    async def never(op: str, body: msgspec.Raw) -> None:
        await asyncio.Event().wait()

    _, client = serve(never)
    call = asyncio.create_task(client.call("wait", None, type(None), 30))
    await asyncio.sleep(0)
    client.close()
    client.close()
    with pytest.raises(PeerLost):
        await asyncio.wait_for(call, 5)
    with pytest.raises(PeerLost):
        await client.call("wait", None, type(None), 30)


def test_works_under_uvloop() -> None:
    import uvloop

    async def main() -> Leave:
        keys = Keys.generate()
        server = ControlServer(keys, "tcp://127.0.0.1:0", echo)
        client = ControlClient(keys, server.start())
        answers = await asyncio.gather(
            *(client.call("echo", Leave(id="a", incarnation=i), Leave, 5) for i in range(100))
        )
        client.close()
        await server.close()
        return answers[-1]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(main()) == Leave(id="a", incarnation=99)


async def test_more_calls_than_the_limit_are_refused(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_MAX_CALLS", 2)
    release = asyncio.Event()

    async def wait(op: str, body: msgspec.Raw) -> None:
        await release.wait()

    _, client = serve(wait)
    calls = [asyncio.create_task(client.call("wait", None, type(None), 10)) for _ in range(3)]
    refused, waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    with pytest.raises(Rejected, match="more than 2 calls"):
        await refused.pop()
    release.set()
    await asyncio.gather(*waiting)


async def test_handler_that_takes_too_long_is_ended(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_HANDLER_DEADLINE_S", 0.05)

    async def never(op: str, body: msgspec.Raw) -> None:
        await asyncio.Event().wait()

    _, client = serve(never)
    with pytest.raises(DeadlineExceeded, match=r"wait took longer than 0\.05 s"):
        await client.call("wait", None, type(None), 10)
