"""Workers as the registry tells of them, for tests of what hears of them."""

from __future__ import annotations

from typing import Any

from dynctl.protocol.instances import Instance


def worker_instance(number: int = 0, **fields: Any) -> Instance:
    """An aggregated worker `w-NUMBER` that nothing can be asked of; `fields` over these."""
    given: dict[str, Any] = {
        "id": f"w-{number}",
        "incarnation": 1,
        "role": "aggregated",
        "index": number,
        "node": "n",
        "pid": 1,
        "started_at": 0.0,
        "url": "http://127.0.0.1:1",
    }
    return Instance(**{**given, **fields})
