"""How long after a client has gone its request is over in the engines, prefill and decode apart.

    python -m tests.perf.cancellation [ROUNDS]

For every engine's contract (scripted engines, see tests/contract/pd_engines.py) and every stage of a request:
milliseconds from the client's close to the end of the last leg, by the engine's own means.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

from dynctl.protocol.specs import FrontendSpec
from tests.contract.pd_engines import ALL, Fault, Json, PdEngine, Referee, Rules
from tests.integration.frontend_harness import Front, frontend, make_spec

STAGES: dict[str, tuple[str, Fault]] = {
    "prefill": ("prefill", "hang"),
    "decode, before its first token": ("decode", "hang"),
    "decode, in the stream": ("decode", "mid"),
}
BODY: Json = {"model": "m", "prompt": "hi", "max_tokens": 9, "stream": True}


async def main(rounds: int) -> None:
    """Print one row for each engine and stage."""
    print(f"{'engine':18} {'stage':32} {'p50 ms':>8} {'max ms':>8}")
    for rules in ALL:
        for stage, (side, fault) in STAGES.items():
            taken = [1000 * await _one(rules, side, fault) for _ in range(rounds)]
            print(f"{rules.name:18} {stage:32} {statistics.median(taken):8.2f} {max(taken):8.2f}")


async def _one(rules: Rules, side: str, fault: Fault) -> float:
    """Seconds until no engine works on a request whose client has left."""
    async with _scene(rules, side, fault) as (front, engines, stuck):
        asking = asyncio.create_task(front.post("/v1/completions", BODY))
        await stuck.until(lambda: stuck.asked == 1)
        await asyncio.sleep(0.02)
        left_s = time.perf_counter()
        asking.cancel()
        for engine in engines:
            await engine.all_ended()
        return time.perf_counter() - left_s


@contextlib.asynccontextmanager
async def _scene(
    rules: Rules, side: str, fault: Fault
) -> AsyncIterator[tuple[Front, list[PdEngine], PdEngine]]:
    referee = Referee()
    engines = {name: PdEngine(rules, referee, name, [fault if name == side else ""]) for name in _SIDES}
    given: dict[str, Any] = {"backend": rules.backend, "kv_transfer": rules.transfer}
    spec: FrontendSpec = make_spec(roles={"prefill": 1, "decode": 1}, **given)
    async with frontend(spec, decode=[engines["decode"]]) as front:
        await engines["prefill"].start()
        front.join("prefill", 0, engines["prefill"].url, **rules.joins())
        try:
            yield front, list(engines.values()), engines[side]
        finally:
            await engines["prefill"].stop()


_SIDES = ("prefill", "decode")

if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20))
