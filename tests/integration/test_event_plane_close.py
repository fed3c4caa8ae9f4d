"""Closing a control client while its connection goes: in a process of its own, which must come to an end."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import msgspec

from dynctl.protocol.control import Call
from dynctl.transport.control import ControlClient, ControlServer
from dynctl.transport.keys import Keys

ROUNDS = 40
CLIENTS = 30


def test_a_client_closed_while_its_server_goes_does_not_stop_the_process() -> None:
    done = subprocess.run([sys.executable, "-m", __spec__.name], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()


async def _echo(op: str, body: msgspec.Raw) -> msgspec.Struct:
    return Call(id=1, op=op, body=body)


async def _close_all_at_once() -> None:
    keys = Keys.generate()
    for _ in range(ROUNDS):
        server = ControlServer(keys, "tcp://127.0.0.1:0", _echo)
        endpoint = server.start()
        clients = [ControlClient(keys, endpoint) for _ in range(CLIENTS)]
        await asyncio.gather(*(client.call("echo", None, Call, 10) for client in clients))
        await server.close()
        for client in clients:
            client.close()


if __name__ == "__main__":
    asyncio.run(_close_all_at_once())
