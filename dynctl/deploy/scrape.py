"""All frontends' figures as they are now, for whoever waits: not for an event loop."""

from __future__ import annotations

import http.client
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from dynctl.deploy.ask import open_frontend
from dynctl.deploy.figures import Look, Series, parse

ANSWER_S = 2.0
_AT_ONCE = 16


def look(doors: Mapping[str, str]) -> Look:
    """What each frontend that answers tells; `doors`: name → URL."""
    if not doors:
        return Look(time.monotonic(), {})
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        told = pool.map(scrape, doors.values())
        series = {name: one for name, one in zip(doors, told, strict=True) if one}
    return Look(time.monotonic(), series)


def scrape(url: str) -> Series:
    """A frontend's series; none when it does not answer: it may be on its way out."""
    connection = open_frontend(url, ANSWER_S)
    try:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        return parse(answer.read().decode()) if answer.status == 200 else {}
    except (OSError, http.client.HTTPException):
        return {}
    finally:
        connection.close()
