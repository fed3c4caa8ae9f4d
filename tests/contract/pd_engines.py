"""Scripted prefill and decode engines that hold their callers to each engine's prefill/decode contract.

What the real engine would answer wrongly, hang on or die of is refused, and noted in `Referee.violations`. An
engine's own failures are `Fault`s, one for each of its requests in turn.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from dynctl.http.server import Exchange, Request
from tests.integration.frontend_harness import Engine, answers, chat_token, sse, token

Json = dict[str, Any]
Fault = Literal["", "400", "500", "503", "hang", "lost", "dies", "took", "mid"]
"""How a request ends: well, by a status, never, by a lost connection; "dies": a prefill whose blocks are gone
once it has answered; "took": a decode lost when it has its blocks; "mid": one that hangs after a token."""
ENDED_BY_NAME = "/abort_request"
LEASE_S = 30.0


class Refused(Exception):
    """An engine's answer other than 200."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


@dataclass
class Lease:
    """What a prefill keeps for one decode."""

    prompt: str
    expires_s: float
    used: bool = False
    gone: bool = False


@dataclass
class Referee:
    """What the two sides of one deployment have seen. `plain` counts decodes without prefill."""

    violations: list[str] = field(default_factory=list)
    leases: dict[str, Lease] = field(default_factory=dict)
    seen: dict[str, set[Any]] = field(default_factory=lambda: defaultdict(set))
    bodies: dict[Any, list[Json]] = field(default_factory=lambda: defaultdict(list))
    arrived: asyncio.Condition = field(default_factory=asyncio.Condition)
    plain: int = 0

    def violated(self, what: str) -> Refused:
        """Note a breach; the engine's answer to it."""
        self.violations.append(what)
        return Refused(500, what)

    def once(self, what: str, key: Any) -> None:
        """`key` may be used once as `what`."""
        if key in self.seen[what]:
            raise self.violated(f"{what} {key} is used again")
        self.seen[what].add(key)

    def take(self, name: Any, prompt: str) -> None:
        """Decode reads the blocks of lease `name`."""
        lease = self.leases.get(str(name))
        now_s = asyncio.get_running_loop().time()
        if lease is None:
            raise self.violated(f"nobody prefilled {name}")
        for wrong, why in (
            (lease.used, "is used a second time"),
            (lease.prompt != prompt, "is of another prompt"),
            (now_s > lease.expires_s, "has expired"),
        ):
            if wrong:
                raise self.violated(f"{name} {why}")
        lease.used = True
        if lease.gone:
            raise Refused(500, "the prefill engine is gone")

    async def meet(self, room: Any, body: Json, legs: int = 2) -> list[Json]:
        """Wait for the other leg; the bodies of both."""
        async with self.arrived:
            self.bodies[room].append(body)
            self.arrived.notify_all()
            await self.arrived.wait_for(lambda: len(self.bodies[room]) >= legs)
            return self.bodies[room]


class Rules(Protocol):
    """One engine's contract. Both calls raise Refused; decode returns once it has the blocks."""

    @property
    def name(self) -> str: ...

    @property
    def backend(self) -> str: ...

    @property
    def transfer(self) -> str: ...

    @property
    def order(self) -> Literal["prefill_first", "concurrent"]: ...

    def joins(self) -> Json:
        """What a prefill worker of this engine registers with."""
        ...

    async def prefill(self, referee: Referee, request: Request, body: Json, fault: Fault) -> Json:
        """The answer of a prefill leg."""
        ...

    async def decode(self, referee: Referee, request: Request, body: Json) -> None:
        """Take a decode leg's blocks."""
        ...


def prompt_of(body: Json) -> str:
    """What was asked, to tell prompts apart."""
    return json.dumps(body.get("messages") or body.get("prompt"))


def many(body: Json) -> bool:
    """Whether a request asks for several sequences."""
    given = body.get("prompt")
    batch = isinstance(given, list) and len(given) > 1 and not isinstance(given[0], int)
    return batch or (body.get("n") or 1) > 1 or (body.get("best_of") or 1) > 1


def _one_token(referee: Referee, body: Json) -> None:
    chat = "messages" in body
    wrong: list[str] = [name for name in ("stream_options", "min_tokens", "logprobs") if name in body]
    wrong += ["stream"] if body.get("stream") else []
    wrong += ["max_tokens"] if body.get("max_tokens") != 1 else []
    wrong += ["max_completion_tokens"] if chat and body.get("max_completion_tokens") != 1 else []
    wrong += ["n"] if many(body) else []
    if wrong:
        raise referee.violated(f"prefill with {', '.join(wrong)}")


@dataclass
class Nixl:
    """vLLM with NIXL in pull mode, and the mocker."""

    backend: str = "vllm"
    transfer: str = "nixl"
    order: Literal["prefill_first", "concurrent"] = "prefill_first"
    required: tuple[str, ...] = (
        "remote_engine_id",
        "remote_request_id",
        "remote_host",
        "remote_port",
        "remote_block_ids",
        "tp_size",
        "kept_as_it_is",
    )

    @property
    def name(self) -> str:
        return f"{self.backend}-{self.transfer}"

    def joins(self) -> Json:
        return {}

    async def prefill(self, referee: Referee, request: Request, body: Json, fault: Fault) -> Json:
        _one_token(referee, body)
        if body.get("kv_transfer_params") != {"do_remote_decode": True, "do_remote_prefill": False}:
            raise referee.violated("prefill without its kv_transfer_params")
        name = f"r{len(referee.leases)}"
        ends_s = asyncio.get_running_loop().time() + LEASE_S
        referee.leases[name] = Lease(prompt_of(body), ends_s, gone=fault == "dies")
        params = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": "e",
            "remote_request_id": name,
            "remote_host": "h",
            "remote_port": 5600,
            "remote_block_ids": [[1, 2]],
            "tp_size": 1,
            "kept_as_it_is": {"x": [1.5, None]},
        }
        return {"choices": [{"index": 0, "finish_reason": "length"}], "kv_transfer_params": params}

    async def decode(self, referee: Referee, request: Request, body: Json) -> None:
        params = body.get("kv_transfer_params")
        if params is None:
            referee.plain += 1
            return
        if many(body):
            raise referee.violated("several sequences share one transfer")
        missing = [key for key in self.required if not params.get(key)]
        if missing or params.get("do_remote_prefill") is not True:
            raise referee.violated(f"decode without {missing}")
        referee.take(params["remote_request_id"], prompt_of(body))


@dataclass
class MooncakeRules:
    """vLLM with Mooncake: a transfer id of the caller's, both legs at once."""

    name: str = "vllm-mooncake"
    backend: str = "vllm"
    transfer: str = "mooncake"
    order: Literal["prefill_first", "concurrent"] = "concurrent"

    def joins(self) -> Json:
        return {"bootstrap_port": 8998, "peers": ["e_dp0", "e_dp1"], "dp_size": 2}

    async def prefill(self, referee: Referee, request: Request, body: Json, fault: Fault) -> Json:
        _one_token(referee, body)
        params = body.get("kv_transfer_params") or {}
        if set(params) != {"do_remote_decode", "do_remote_prefill", "transfer_id"}:
            raise referee.violated(f"prefill with params {sorted(params)}")
        if not body.get("ignore_eos") or "stop" in body:
            raise referee.violated("prefill may end otherwise than by length, which frees its blocks")
        referee.once("prefill's transfer id", params["transfer_id"])
        if fault == "dies":
            raise ConnectionError("the engine is gone")
        rank = int(request.header(b"x-data-parallel-rank") or b"-1")
        told = {"prompt": prompt_of(body), "engine": f"e_dp{rank}"}
        await referee.meet(params["transfer_id"], told, legs=1)
        return {"choices": [{"index": 0, "finish_reason": "length"}]}

    async def decode(self, referee: Referee, request: Request, body: Json) -> None:
        params = body.get("kv_transfer_params")
        if params is None:
            referee.plain += 1
            return
        address = str(params.get("remote_bootstrap_addr"))
        if not (params.get("do_remote_prefill") and address == "http://127.0.0.1:8998"):
            raise referee.violated(f"decode with params {params}")
        referee.once("decode's transfer id", params.get("transfer_id"))
        told = {"prompt": prompt_of(body), "engine": params.get("remote_engine_id")}
        bodies = await referee.meet(params["transfer_id"], told)
        if bodies[0] != bodies[1]:
            raise referee.violated(f"the legs of one transfer differ: {bodies}")


@dataclass
class Rooms:
    """SGLang: one body for both legs, one room for each prompt, ended by name."""

    name: str = "sglang"
    backend: str = "sglang"
    transfer: str = ""
    order: Literal["prefill_first", "concurrent"] = "concurrent"

    def joins(self) -> Json:
        return {"bootstrap_port": 8998, "dp_size": 2}

    async def prefill(self, referee: Referee, request: Request, body: Json, fault: Fault) -> Json:
        rooms = self._rooms(referee, "prefill", body)
        rank = int(request.header(b"x-data-parallel-rank") or b"-1")
        if any(room % 2 != rank for room in rooms):
            raise referee.violated(f"rooms {rooms} are not of the rank {rank} that was asked")
        if fault == "dies":
            raise ConnectionError("the engine is gone")
        await self._meet(referee, rooms, body)
        return {"choices": []}

    async def decode(self, referee: Referee, request: Request, body: Json) -> None:
        await self._meet(referee, self._rooms(referee, "decode", body), body)

    def _rooms(self, referee: Referee, side: str, body: Json) -> list[int]:
        missing = [key for key in ("bootstrap_host", "bootstrap_port", "rid") if not body.get(key)]
        given = body.get("bootstrap_room")
        rooms: list[Any] = given if isinstance(given, list) else [given]
        prompts = len(body["prompt"]) if many(body) and isinstance(body.get("prompt"), list) else 1
        if missing or len(rooms) != prompts or not all(room and 0 < room < 2**63 for room in rooms):
            raise referee.violated(f"{side} with rooms {rooms} for {prompts} prompts, without {missing}")
        if (body.get("n") or 1) > 1:
            raise referee.violated("several samples share one room")
        for room in rooms:
            referee.once(f"{side}'s room", room)
        return rooms

    async def _meet(self, referee: Referee, rooms: list[int], body: Json) -> None:
        one, other = (await referee.meet(rooms[0], body))[:2]
        if one != other:
            raise referee.violated(f"the legs of room {rooms[0]} differ: {one} and {other}")


@dataclass
class Trtllm:
    """TensorRT-LLM: context, then generation; a field that a release does not know is refused."""

    version: str = "1.2.1"
    backend: str = "trtllm"
    transfer: str = ""
    order: Literal["prefill_first", "concurrent"] = "prefill_first"
    known = frozenset(
        {
            "model",
            "prompt",
            "messages",
            "max_tokens",
            "stream",
            "stream_options",
            "temperature",
            "n",
            "best_of",
        }
        | {"disaggregated_params", "prompt_token_ids"}
    )

    @property
    def name(self) -> str:
        return f"trtllm-{self.version or 'unknown'}"

    @property
    def _has_ids(self) -> bool:
        return self.version.startswith("1.3")

    def joins(self) -> Json:
        return {"engine_version": self.version}

    async def prefill(self, referee: Referee, request: Request, body: Json, fault: Fault) -> Json:
        params = self._params(referee, body, {"request_type"})
        if params["request_type"] != "context_only" or body.get("stream") or body.get("stream_options"):
            raise referee.violated("a context leg that streams or is none")
        if body.get("max_tokens") == 1:
            raise referee.violated("the context leg's max_tokens is not the request's")
        if self._has_ids:
            referee.once("context's request id", params["disagg_request_id"])
        number = len(referee.leases) + 1
        prompt = json.dumps([number, len(prompt_of(body))])
        ends_s = asyncio.get_running_loop().time() + LEASE_S
        referee.leases[str(number)] = Lease(prompt, ends_s, gone=fault == "dies")
        referee.bodies[prompt].append(params)
        told = {**params, "ctx_request_id": number, "first_gen_tokens": [5]}
        choice = {"index": 0, "finish_reason": "not_finished", "disaggregated_params": told}
        return {"choices": [choice], "prompt_token_ids": json.loads(prompt)}

    async def decode(self, referee: Referee, request: Request, body: Json) -> None:
        if "disaggregated_params" not in body:
            referee.plain += 1
            return
        params = self._params(referee, body, {"request_type", "ctx_request_id", "first_gen_tokens"})
        if params["request_type"] != "generation_only" or many(body):
            raise referee.violated("a generation leg that is none")
        ids = body.get("prompt_token_ids") if "messages" in body else body.get("prompt")
        referee.take(params["ctx_request_id"], json.dumps(ids))
        context = referee.bodies[json.dumps(ids)][0]
        if context.get("disagg_request_id") != params.get("disagg_request_id"):
            raise referee.violated("the legs have different request ids")

    def _params(self, referee: Referee, body: Json, names: set[str]) -> Json:
        params: Json = body.get("disaggregated_params") or {}
        expected = names | ({"disagg_request_id"} if self._has_ids else set())
        unknown = set(body) - self.known
        if set(params) != expected or unknown:
            raise referee.violated(f"fields {sorted(params)} and unknown {sorted(unknown)}")
        if self._has_ids and not 2**42 <= params["disagg_request_id"] < 2**63:
            raise referee.violated(f"request id {params['disagg_request_id']}")
        return params


ALL: tuple[Rules, ...] = (
    Nixl(),
    MooncakeRules(),
    Rooms(),
    Trtllm("1.2.1"),
    Trtllm("1.3.0rc4"),
    Trtllm(""),
    Nixl("mocker"),
)


class PdEngine(Engine):
    """One worker. `faults` by request in turn, the last one for good. `open` counts requests not yet ended.

    An engine that is told by name when a request is over does not notice a closed connection.
    """

    def __init__(self, rules: Rules, referee: Referee, side: str, faults: Iterable[Fault] = ("",)) -> None:
        super().__init__(self._serve)
        self.rules = rules
        self.referee = referee
        self.side = side
        self.faults = deque(faults)
        self.asked = 0
        self.open: dict[int, asyncio.Task[None]] = {}
        self.arrived = 0
        self.reads_after_s = 0.0
        self._names: dict[str, int] = {}

    async def _handle(self, request: Request, exchange: Exchange) -> None:
        if request.path == ENDED_BY_NAME:
            self._end(str(json.loads(request.body)["rid"]))
            exchange.respond(200, b"")
            return
        self.arrived += 1
        self.changed.set()
        if self.reads_after_s:  # whoever names it until then names nobody
            await asyncio.sleep(self.reads_after_s)
        number = self.asked
        self.asked += 1
        self.requests.append(request)
        task = asyncio.current_task()
        assert task is not None
        self.open[number] = task
        self.changed.set()
        by_name = self.rules.backend == "sglang"
        if by_name:
            self._names[json.dumps(json.loads(request.body).get("rid"))] = number

        def gone() -> None:
            if not by_name:
                self.cancelled += 1
                task.cancel()

        exchange.on_disconnect = gone
        try:
            await self._serve(self, request, exchange)
        finally:
            self.open.pop(number, None)
            self.changed.set()

    def _end(self, rid: str) -> None:
        number = next((n for names, n in self._names.items() if rid in names), None)
        task = self.open.get(number) if number is not None else None
        if task is not None:
            self.cancelled += 1
            task.cancel()

    async def _serve(self, engine: Engine, request: Request, exchange: Exchange) -> None:
        fault: Fault = self.faults.popleft() if len(self.faults) > 1 else self.faults[0]
        body = json.loads(request.body)
        try:
            if fault in ("400", "500", "503"):
                raise Refused(int(fault), "as scripted")
            if fault == "hang":
                await asyncio.Event().wait()
            if fault == "lost":
                raise ConnectionError
            await (self._prefill if self.side == "prefill" else self._decode)(request, body, exchange, fault)
        except Refused as refusal:
            told = {"error": {"message": str(refusal), "type": "t", "code": refusal.status}}
            exchange.respond(refusal.status, json.dumps(told).encode())
        except ConnectionError:
            exchange.abort()

    async def _prefill(self, request: Request, body: Json, exchange: Exchange, fault: Fault) -> None:
        answer = await self.rules.prefill(self.referee, request, body, fault)
        if body.get("stream"):
            exchange.start(200, [(b"content-type", b"text/event-stream")], framing="chunked")
            for event in sse(answer):
                exchange.write(event)
            exchange.end()
        else:
            exchange.respond(200, json.dumps(answer).encode())

    async def _decode(self, request: Request, body: Json, exchange: Exchange, fault: Fault) -> None:
        await self.rules.decode(self.referee, request, body)
        if fault == "took":
            raise ConnectionError
        if fault != "mid":
            await answers(self, request, exchange)
            return
        exchange.start(200, [(b"content-type", b"text/event-stream")], framing="chunked")
        exchange.write(sse((chat_token if "messages" in body else token)("a"))[0])
        await asyncio.Event().wait()

    async def all_ended(self, deadline_s: float = 10.0) -> None:
        """Until no request is open here."""
        async with asyncio.timeout(deadline_s):
            while self.open:
                self.changed.clear()
                await self.changed.wait()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Until `condition` holds after something happened here."""
        await self.wait(condition)
