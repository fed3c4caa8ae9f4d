"""Who is there: the card of a model and of one running process, as the registry knows it."""

from __future__ import annotations

from typing import Literal

import msgspec

PROTOCOL_VERSION = 1

Role = Literal["prefill", "decode", "aggregated", "encode"]
Seat = Literal["prefill", "decode", "aggregated", "encode", "frontend"]


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """What a frontend must know of a model to tokenise, hash and refuse for it.

    `tokenizer` and `chat_template` are paths readable where the frontend runs, or "" when unknown: then the
    frontend routes without tokens. `max_model_len` in tokens and `block_size` in tokens are what the engine
    really uses, `max_batched_tokens` what it computes per step; 0 = not known. `adapters` are LoRA names that
    the engine serves beside `name`.
    """

    name: str
    path: str = ""
    revision: str = ""
    tokenizer: str = ""
    chat_template: str = ""
    max_model_len: int = 0
    block_size: int = 0
    max_batched_tokens: int = 0
    adapters: list[str] = []


class Instance(msgspec.Struct, frozen=True, kw_only=True):
    """One registered process: `id` is its seat ("decode-0"), `incarnation` rises with each start of it.

    Workers: `url` is the engine's own HTTP base, `events` the PUB endpoint of the sidecar's event plane,
    `kv_events` whether KV events come from there besides load, `control` its ZeroMQ ROUTER endpoint.
    `bootstrap_port` is where decode engines meet a prefill engine, for engines that link both legs by it (0 =
    none), `peers` the names decode engines know its ranks by ([] = they need none). `pid` is the sidecar's,
    `engine_pid` the engine's (0 = none). Frontends: `url` is the public base, or where the port of that is
    shared one that only this frontend answers; `events` tells others what it has in flight. `started_at` is
    Unix time in seconds.
    """

    id: str
    incarnation: int
    role: Seat
    index: int
    node: str
    pid: int
    started_at: float
    url: str
    engine_pid: int = 0
    backend: str = ""
    model: ModelCard | None = None
    dp_size: int = 1
    bootstrap_port: int = 0
    peers: list[str] = []
    engine_version: str = ""
    events: str = ""
    kv_events: bool = True
    control: str = ""
    protocol: int = PROTOCOL_VERSION
