"""What the loss of a node under load costs a deployment on a cluster, step by step."""

from __future__ import annotations

import json
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.cluster.cluster import Cluster
from tests.cluster.commands import eventually
from tests.cluster.ssh_deployment import Load, under_load
from tests.deployment import counter

SCRAPE_S = 0.05
MOVED_S = 60.0
NODE_ROWS = {
    "until the controller says node.lost": ("s", "≤ 5 s"),
    "until its lease has ended": ("s", ""),
    "until the frontend routes around it": ("s", "≤ node.lost + 1 s"),
    "until its worker is ordered elsewhere": ("s", ""),
    "until its worker is ready elsewhere": ("s", "≤ 10 s"),
    "until the frontend routes to that": ("s", ""),
    "requests whole": ("", ""),
    "requests broken": ("", "0"),
}

Measured = dict[str, list[float]]


def events_of(runs: Path) -> list[dict[str, Any]]:
    """The events of the only run there."""
    (file,) = runs.glob("*/events.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def first(events: Sequence[Mapping[str, Any]], name: str, since: float = 0.0, **fields: object) -> float:
    """When the first such event was since then. Raises StopIteration when there was none."""
    return next(
        float(event["ts"])
        for event in events
        if event["event"] == name and event["ts"] >= since and fields.items() <= event.items()
    )


class Routed:
    """When a frontend's workers became fewer than they were, and as many again."""

    def __init__(self, url: str, workers: int) -> None:
        self._url, self._workers = url, workers
        self.fewer_at = self.again_at = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Routed:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(SCRAPE_S):
            with suppress(OSError):
                with urllib.request.urlopen(f"{self._url}/metrics", timeout=10.0) as answer:
                    text = answer.read().decode()
                workers = counter(text, "dynctl_frontend_router_workers", role="aggregated")
                if workers < self._workers and not self.fewer_at:
                    self.fewer_at = time.time()
                if workers == self._workers and self.fewer_at and not self.again_at:
                    self.again_at = time.time()


class Cut:
    """When a host's link went down."""

    def __init__(self, host: str) -> None:
        self._file = Path(f"/sys/class/net/dyv-{host}/operstate")
        self.at = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Cut:
        assert self._file.read_text().strip() == "up"
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.002):
            try:
                up = self._file.read_text().strip() == "up"
            except OSError:
                up = False
            if not up:
                self.at = time.time()
                return


def total(load: Load) -> int:
    """Requests that have ended, however."""
    return sum(list(load.outcomes.values()))


def lose(cluster: Cluster, url: str, rows: Sequence[Mapping[str, Any]], runs: Path, into: Measured) -> None:
    """Cut the power of the node of one worker, and measure until it is ready elsewhere.

    `rows`: what `ps` says. `runs`: where the events of the only run are. The node is none of a frontend.
    """
    frontends = {row["node"] for row in rows if row["role"] == "frontend"}
    workers = [row for row in rows if row["role"] == "aggregated"]
    victim = next(row for row in workers if row["node"] not in frontends)
    seat, host = victim["id"], victim["node"]

    def moved_at() -> float:
        events = events_of(runs)
        try:
            return first(events, "process.ready", first(events, "process.moved", id=seat), id=seat)
        except StopIteration:
            return 0.0

    with under_load(url) as load, Routed(url, len(workers)) as routed, Cut(host) as cut:
        eventually(lambda: load.outcomes["whole"] > 24, "streams flow", 60.0)
        before = total(load)
        with cluster.off(host):
            eventually(lambda: moved_at() > 0 and routed.again_at > 0, "moved", MOVED_S)
            seen = total(load)
            eventually(lambda: total(load) > seen + 24, "streams go on", 60.0)
            load.over.set()
    events = events_of(runs)
    lost = first(events, "node.lost", cut.at)
    leases = [e["ts"] for e in events if e["event"] == "lease.lost" and e["ts"] >= cut.at]
    into["until the controller says node.lost"].append(lost - cut.at)
    into["until its lease has ended"].append(min(leases, default=lost) - cut.at)
    into["until the frontend routes around it"].append(routed.fewer_at - cut.at)
    into["until its worker is ordered elsewhere"].append(first(events, "process.moved", id=seat) - cut.at)
    into["until its worker is ready elsewhere"].append(moved_at() - cut.at)
    into["until the frontend routes to that"].append(routed.again_at - cut.at)
    into["requests whole"].append(load.outcomes["whole"] - before)
    into["requests broken"].append(total(load) - load.outcomes["whole"])
    for outcome in load.outcomes:
        if outcome != "whole":
            sys.stderr.write(f"\n{outcome}\n")
