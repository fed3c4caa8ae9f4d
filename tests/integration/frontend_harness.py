"""A frontend's core and scripted engines in one loop, talking over real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

from dynctl.errors import PeerLost
from dynctl.frontend.core import Core
from dynctl.http.client import Client, Origin, Response, Timeouts
from dynctl.http.server import Exchange, Limits, Request, Server, serve
from dynctl.protocol.instances import Instance, ModelCard, Role
from dynctl.protocol.kv_events import KvSync, KvSyncReply
from dynctl.protocol.registry import InstanceState, Member
from dynctl.protocol.specs import FrontendSpec, LimitsSpec, RouterSpec
from dynctl.router.service import WorkerLinks

DEADLINE_S = 10.0
Script = Callable[["Engine", Request, Exchange], Awaitable[None]]


def sse(*events: Any) -> list[bytes]:
    """Events as an engine writes them, [DONE] last."""
    return [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events] + [b"data: [DONE]\n\n"]


def token(text: str, finish: str | None = None) -> dict[str, Any]:
    """One completion event."""
    choice = {"index": 0, "text": text, "finish_reason": finish}
    return {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]}


def chat_token(text: str, finish: str | None = None) -> dict[str, Any]:
    """One chat event."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}


async def answers(engine: Engine, request: Request, exchange: Exchange) -> None:
    """The well-behaved engine: three tokens, streamed or not."""
    body = json.loads(request.body)
    chat = "messages" in body
    if body.get("stream"):
        make = chat_token if chat else token
        exchange.start(200, [(b"content-type", b"text/event-stream")], framing="chunked")
        for event in sse(make("a"), make("b"), make("c", "stop")):
            exchange.write(event)
            await asyncio.sleep(0)
        exchange.end()
        return
    text: dict[str, Any] = {"message": {"role": "assistant", "content": "abc"}} if chat else {"text": "abc"}
    answer = {
        "id": "x-1",
        "object": "chat.completion" if chat else "text_completion",
        "created": 1,
        "model": body.get("model", ""),
        "choices": [{"index": 0, "finish_reason": "stop", **text}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5},
    }
    exchange.respond(200, json.dumps(answer).encode())


@dataclass
class Engine:
    """A scripted engine. `requests` are what it was sent; `cancelled` counts requests cut by the caller."""

    script: Script = answers
    requests: list[Request] = field(default_factory=list)
    cancelled: int = 0
    server: Server | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def url(self) -> str:
        assert self.server is not None
        return f"http://127.0.0.1:{self.server.port}"

    def bodies(self) -> list[dict[str, Any]]:
        """The requests' bodies, decoded."""
        return [json.loads(request.body) for request in self.requests]

    async def start(self) -> None:
        self.server = await serve(self._handle, host="127.0.0.1", port=0, limits=Limits())

    async def stop(self) -> None:
        assert self.server is not None
        await self.server.close()

    async def wait(self, condition: Callable[[], bool]) -> None:
        """Until `condition` holds after something happened here."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def _handle(self, request: Request, exchange: Exchange) -> None:
        self.requests.append(request)
        self.changed.set()
        task = asyncio.current_task()
        assert task is not None

        def gone() -> None:
            self.cancelled += 1
            self.changed.set()
            task.cancel()

        exchange.on_disconnect = gone
        await self.script(self, request, exchange)


async def hangs(engine: Engine, request: Request, exchange: Exchange) -> None:
    """An engine that never answers."""
    await asyncio.Event().wait()


def status(code: int, body: Any = None) -> Script:
    """An engine that answers with a status and an error body."""
    told = body if body is not None else {"error": {"message": "no", "type": "t", "code": code}}

    async def script(engine: Engine, request: Request, exchange: Exchange) -> None:
        exchange.respond(code, json.dumps(told).encode())

    return script


def in_turn(*scripts: Script) -> Script:
    """The n-th request gets the n-th script, the last one for good."""

    async def script(engine: Engine, request: Request, exchange: Exchange) -> None:
        await scripts[min(len(engine.requests), len(scripts)) - 1](engine, request, exchange)

    return script


async def _no_sync(instance: Instance, request: KvSync) -> KvSyncReply:
    raise PeerLost("no sidecar in this test", where=instance.id)


class Front:
    """A core that is served, and a client to it."""

    def __init__(self, spec: FrontendSpec, core: Core, server: Server) -> None:
        self.spec = spec
        self.core = core
        self.server = server
        self.client = Client()
        self.url = f"http://127.0.0.1:{server.port}"
        self.origin = Origin.parse(self.url)

    def join(self, role: Role, index: int, url: str, **fields: Any) -> None:
        """A worker comes."""
        state: InstanceState = fields.pop("state", "ready")
        instance = Instance(
            id=f"{role}-{index}",
            incarnation=fields.pop("incarnation", 1),
            role=role,
            index=index,
            node="n",
            pid=1,
            started_at=0.0,
            url=url,
            **fields,
        )
        self.core.members_changed([Member(instance=instance, state=state)], [])

    async def call(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Response:
        """One whole exchange; `body` bytes as they are, else as JSON."""
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        sent = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        return await self.client.request(
            self.origin, method, path, headers=sent, body=data, timeout_s=DEADLINE_S
        )

    async def post(self, path: str, body: Any, headers: Mapping[str, str] | None = None) -> Response:
        return await self.call("POST", path, body, headers)

    async def pieces(self, path: str, body: Any) -> AsyncIterator[bytes]:
        """The payload of a streamed answer, as it comes. Leaving early disconnects."""
        timeouts = Timeouts(DEADLINE_S, DEADLINE_S, DEADLINE_S)
        data = json.dumps(body).encode()
        stream = await self.client.open(self.origin, "POST", path, body=data, timeouts=timeouts)
        async for piece in stream.iter_body():
            yield piece

    async def idle(self) -> None:
        """Until no request weighs on any worker: each ticket has been given back."""
        async with asyncio.timeout(DEADLINE_S):
            while any(load.requests for load in self.core.router.loads().values()):
                await self.call("GET", "/live")

    async def metrics(self) -> str:
        return (await self.call("GET", "/metrics")).body.decode()


def error_of(response: Response) -> dict[str, Any]:
    """The error object of an answer."""
    error = json.loads(response.body)["error"]
    assert isinstance(error, dict)
    return error


def make_spec(**fields: Any) -> FrontendSpec:
    """A spec for tests: model "m", one aggregated worker wanted, short deadlines."""
    given: dict[str, Any] = {
        "id": "frontend-0",
        "index": 0,
        "node": "n",
        "host": "127.0.0.1",
        "port": 0,
        "registry": "",
        "membership": "",
        "keys_file": "",
        "backend": "external",
        "model": ModelCard(name="m"),
        "roles": {"aggregated": 1},
        "router": RouterSpec(mode="round_robin"),
        "limits": LimitsSpec(request_timeout_s=DEADLINE_S),
    }
    return FrontendSpec(**{**given, **fields})


@asynccontextmanager
async def frontend(spec: FrontendSpec, **roles: list[Engine]) -> AsyncIterator[Front]:
    """A frontend over `roles` (role → engines), all started here and stopped at the end."""
    links = WorkerLinks(sync=_no_sync, subscribe=lambda _: None, unsubscribe=lambda _: None)
    core = Core(spec, links, Random(7))
    limits = Limits(body_bytes=spec.limits.body_bytes, header_bytes=spec.limits.header_bytes)
    server = await serve(core.routes, host="127.0.0.1", port=0, limits=limits)
    front = Front(spec, core, server)
    engines = [engine for group in roles.values() for engine in group]
    try:
        for role, group in roles.items():
            for index, engine in enumerate(group):
                await engine.start()
                front.join(role, index, engine.url)  # type: ignore[arg-type]
        yield front
    finally:
        await front.client.close()
        await server.close()
        await core.close()
        for engine in engines:
            await engine.stop()
        await asyncio.sleep(0.01)  # aborted connections close their sockets in the next turns of the loop
