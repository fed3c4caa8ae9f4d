"""The port an engine is to listen on, looked at before it starts."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator

import pytest

from dynctl.errors import PortInUse
from dynctl.http.client import Origin
from dynctl.worker import readiness
from dynctl.worker.readiness import wait_for_free_port


@pytest.fixture
def taken() -> Iterator[tuple[socket.socket, Origin]]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener, Origin.parse(f"http://127.0.0.1:{listener.getsockname()[1]}")


async def test_free_port_is_not_waited_for(taken: tuple[socket.socket, Origin]) -> None:
    listener, origin = taken
    listener.close()
    await wait_for_free_port(origin, 5)


async def test_stranger_on_the_port_is_refused_at_once(taken: tuple[socket.socket, Origin]) -> None:
    with pytest.raises(PortInUse, match=f"held by pid {os.getpid()}.*choose another port"):
        await wait_for_free_port(taken[1], 3600)


async def test_former_start_of_the_seat_is_waited_for(
    taken: tuple[socket.socket, Origin], monkeypatch: pytest.MonkeyPatch
) -> None:
    listener, origin = taken
    monkeypatch.setattr(readiness, "is_former_self", lambda pid: pid == os.getpid())
    asyncio.get_running_loop().call_later(0.1, listener.close)
    await wait_for_free_port(origin, 10)


async def test_former_start_that_does_not_end_is_refused(
    taken: tuple[socket.socket, Origin], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "is_former_self", lambda pid: True)
    with pytest.raises(PortInUse, match="former start of this seat"):
        await wait_for_free_port(taken[1], 0.1)
