"""The mocker's process: from options to a listening server, and to a clean end on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any, Final, NoReturn

from dynctl.errors import UsageError
from dynctl.http.server import Limits, serve
from dynctl.mocker.engine import SimulatedEngine
from dynctl.mocker.options import Options
from dynctl.mocker.requests import Serving
from dynctl.mocker.server import Api
from dynctl.mocker.tokens import BUILTIN, Vocabulary, max_positions
from dynctl.perfmodel.profile import DEFAULT, load_profile
from dynctl.transport.engine_events import EngineEventSource, EnginePublisher

logger = logging.getLogger(__name__)

_FLUSH_S: Final = 2.0
"""How long the last answers may take to reach their clients at the end."""
_LAST_PORT: Final = re.compile(r":(\d+)$")


def build(options: Options) -> tuple[Serving, int]:
    """What is served, and its context length in tokens. Raises UsageError for a model that cannot be."""
    directory = Path(options.model) if options.model else BUILTIN
    vocabulary = Vocabulary(
        Path(options.tokenizer) if options.tokenizer else directory, options.chat_template
    )
    room = options.num_gpu_blocks_override * options.block_size
    length = options.max_model_len or max_positions(directory) or room
    if length > room:
        raise UsageError(
            f"a request of max_model_len={length} tokens needs more than the {room} tokens of KV cache",
            hint="raise --num-gpu-blocks-override or lower --max-model-len",
        )
    name = options.served_model_name or options.model or "tiny"
    return Serving(name, vocabulary, length, options.default_max_tokens), length


async def run(options: Options) -> int:
    """Serve until SIGTERM or SIGINT; the exit code. Raises DynctlError when it cannot start."""
    await asyncio.sleep(options.fault_slow_start)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    serving, length = build(options)
    profile = load_profile(Path(options.layout.named(options.profile))) if options.profile else DEFAULT
    engine = SimulatedEngine(options, serving, profile, _crash)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(engine.close)
        sources = _start_publishers(engine, stack)
        server = await serve(
            Api(engine, sources, os.environ.get("VLLM_API_KEY", "")),
            host=options.host,
            port=options.port,
            limits=Limits(body_timeout_s=300.0),
        )
        stack.push_async_callback(server.close)
        engine.address = (options.host, server.port)
        engine.run()
        logger.info(
            "engine.ready model=%s url=http://%s:%d max_model_len=%d ranks=%d",
            serving.model,
            options.host,
            server.port,
            length,
            len(engine.ranks),
        )
        await stop.wait()
        await _drain(engine, options.shutdown_timeout)
        await server.drain(_FLUSH_S)
    return 0


async def _drain(engine: SimulatedEngine, timeout_s: float) -> None:
    """Let requests finish for a while, then abort what is left. New ones are answered with "abort"."""
    engine.draining = True
    mode = "drain" if timeout_s else "abort"
    logger.info("engine.stopping mode=%s timeout_s=%g inflight=%d", mode, timeout_s, engine.inflight)
    if not await engine.settled(timeout_s):
        engine.abort_all()


def _start_publishers(engine: SimulatedEngine, stack: contextlib.AsyncExitStack) -> dict[str, Any]:
    """One publisher of KV events per rank; what `/kv_event_sources` tells of them."""
    config = engine.options.kv_events_config
    if not config.get("enable_kv_cache_events"):
        return {}
    told: dict[str, Any] = {}
    for rank in engine.ranks:
        source = EngineEventSource(
            endpoint=_of_rank(str(config.get("endpoint", "tcp://*:5557")), rank.number),
            replay=_of_rank(str(config.get("replay_endpoint") or ""), rank.number),
            topic=str(config.get("topic", "")),
        )
        steps = int(config.get("buffer_steps", 10_000))
        publisher = EnginePublisher(source, buffer_steps=steps, drop=engine.faults.loses)
        endpoint, replay = publisher.start()
        stack.callback(publisher.close)
        rank.publish = publisher.publish
        told[str(rank.number)] = {
            **config,
            "endpoint": endpoint,
            "replay_endpoint": replay or None,
            "topic": source.topic,
        }
    return told


def _of_rank(endpoint: str, rank: int) -> str:
    """The endpoint of a rank: its port is that many higher; port 0 is left to the system."""
    match = _LAST_PORT.search(endpoint)
    if match is None or match.group(1) == "0":
        return endpoint
    return f"{endpoint[: match.start()]}:{int(match.group(1)) + rank}"


def _crash() -> NoReturn:
    """End at once, as an engine does that hits a fatal error."""
    sys.stderr.write("RuntimeError: the simulated engine crashed on purpose\n")
    sys.stderr.flush()
    os._exit(1)
