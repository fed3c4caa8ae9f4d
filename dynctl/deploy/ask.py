"""One call to a deployment's controller, or one look at a frontend, by a command that waits for it."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import ssl
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

import msgspec

from dynctl.deploy.home import RunDir

T = TypeVar("T")


def ask_controller(
    run: RunDir,
    endpoint: str,
    op: str,
    body: msgspec.Struct | None,
    reply_type: type[T],
    *,
    deadline_s: float,
) -> T:
    """The controller's answer. Raises TransportError, or the error that it answered."""
    # Here, since most commands never call and zmq is slow to load.
    from dynctl.transport.control import ControlClient
    from dynctl.transport.keys import Keys

    keys = Keys.load(run.keys)

    async def call() -> T:
        client = ControlClient(keys, endpoint)
        try:
            return await client.call(op, body, reply_type, deadline_s)
        finally:
            client.close()

    return asyncio.run(call())


def listens(endpoint: str, timeout_s: float) -> bool:
    """Whether somebody listens at a tcp:// endpoint: a quick look; a call would wait for one to come."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()
    except OSError:
        return False
    return True


def open_frontend(url: str, timeout_s: float) -> http.client.HTTPConnection:
    """A connection to the frontend, not yet dialled. Its certificate is the user's own: not verified."""
    parts = urlsplit(url)
    host = parts.hostname or "127.0.0.1"
    if parts.scheme != "https":
        return http.client.HTTPConnection(host, parts.port, timeout=timeout_s)
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return http.client.HTTPSConnection(host, parts.port, timeout=timeout_s, context=context)


@dataclass(frozen=True, slots=True)
class Health:
    """What a frontend says of itself.

    `reason` is against being ready, "" = it is. `doubts` are why choices are not as good as they could be.
    """

    reason: str = ""
    doubts: tuple[str, ...] = ()


def ask_health(url: str, timeout_s: float = 2.0) -> Health:
    """What the frontend at `url` says of itself; that it does not answer is a reason."""
    connection = open_frontend(url, timeout_s)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, http.client.HTTPException) as error:
        return Health(f"{url} does not answer: {error}")
    finally:
        connection.close()
    return Health("" if answer.status == 200 else health_reason(body, answer.status), health_doubts(body))


def health_doubts(body: bytes) -> tuple[str, ...]:
    """The doubts in a /health answer, whatever its shape."""
    try:
        said = json.loads(body)
    except ValueError:
        return ()
    found = said.get("doubts") if isinstance(said, dict) else None
    return tuple(str(item) for item in found) if isinstance(found, list) else ()


def health_reason(body: bytes, status: int) -> str:
    """The reason in a /health answer, whatever its shape."""
    try:
        said = json.loads(body)
    except ValueError:
        said = None
    if isinstance(said, dict):
        error = said.get("error")
        found = said.get("reason") or said.get("reasons") or (error or {}).get("message")
        if isinstance(found, list):
            return "; ".join(str(item) for item in found)
        if found:
            return str(found)
    return f"/health answers {status}"
