"""Whether a node can be reached, told by its own kernel: whoever accepts or refuses a connection is there."""

from __future__ import annotations

import asyncio
import contextlib


async def reaches(address: str, port: int, within_s: float) -> bool:
    """Whether something at the address answers, be it by a refusal."""
    try:
        async with asyncio.timeout(within_s):
            _, writer = await asyncio.open_connection(address, port)
    except ConnectionRefusedError:
        return True
    except (OSError, TimeoutError):
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True
