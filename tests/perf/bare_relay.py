"""Nothing but dynctl.http between a client and one engine: what the frontend's own work is measured beside.

python -m tests.perf.bare_relay PORT ENGINE_PORT
"""

from __future__ import annotations

import asyncio
import sys

from dynctl.http.client import Client, Origin, Timeouts
from dynctl.http.relay import relay
from dynctl.http.runtime import run
from dynctl.http.server import Exchange, Limits, Request, serve


async def main(port: int, engine: int) -> None:
    """Every request goes to the engine, every answer comes back as bytes. Serves until killed."""
    client = Client()
    origin, timeouts = Origin("http", "127.0.0.1", engine), Timeouts()

    async def handle(request: Request, exchange: Exchange) -> None:
        stream = await client.open(
            origin,
            request.method,
            request.target,
            headers=request.headers,
            body=request.body,
            timeouts=timeouts,
        )
        await relay(stream, exchange)

    await serve(handle, host="127.0.0.1", port=port, limits=Limits())
    await asyncio.Event().wait()


if __name__ == "__main__":
    run(main(int(sys.argv[1]), int(sys.argv[2])))
