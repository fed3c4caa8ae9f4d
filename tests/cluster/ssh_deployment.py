"""A deployment on the SSH hosts of the cluster, as a user on another machine starts and sees it."""

from __future__ import annotations

import http.client
import json
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cluster.cluster import Cluster
from tests.cluster.commands import eventually
from tests.cluster.hosts import MACHINE
from tests.deployment import RECIPES

UP_S = 120.0


@dataclass
class Laptop:
    """A machine that reaches the hosts by SSH and has a home of its own."""

    cluster: Cluster
    home: Path
    name: str
    hosts: tuple[str, ...] = ("n1", "n2", "n3", "n4")
    port: int = 0
    sets: list[str] = field(default_factory=list)
    gpus: int = 0
    """GPUs that each host is said to have."""

    @property
    def there(self) -> Path:
        """Where dynctl keeps its runs on the hosts, which share it."""
        return self.home.parent / "there"

    @property
    def inventory(self) -> Path:
        """Written anew at each call."""
        defaults = f"defaults: {{directory: {self.there}}}"
        said = f"python: {self.cluster.python}, gpus: {self.gpus}"
        lines = [f"  - {{name: {host}, {said}}}" for host in self.hosts]
        path = self.home.parent / "hosts.yaml"
        path.write_text("\n".join([defaults, "hosts:", *lines]) + "\n")
        path.chmod(0o644)
        return path

    def dynctl(
        self, *args: str, check: bool = True, timeout: float = UP_S
    ) -> subprocess.CompletedProcess[str]:
        """A verb, called here."""
        return self.cluster.dynctl(*args, home=self.home, host=MACHINE, check=check, timeout=timeout)

    def up_args(self, *more: str) -> list[str]:
        """`up` of four simulated engines."""
        sets = [
            f"name={self.name}",
            "roles.aggregated.replicas=4",
            "frontend.host=0.0.0.0",
            "frontend.port=0",
        ]
        options = [word for one in [*sets, *self.sets] for word in ("--set", one)]
        quickstart = self.home.parent / "quickstart.yaml"
        quickstart.write_text((RECIPES / "quickstart.yaml").read_text())
        quickstart.chmod(0o644)
        where = ["--target", "ssh", "--inventory", str(self.inventory)]
        return ["up", str(quickstart), *where, *options, "--detach", *more]

    def up(self, *more: str) -> dict[str, Any]:
        """Started and ready; what it says of itself."""
        told: dict[str, Any] = json.loads(self.dynctl(*self.up_args("--json", *more)).stdout)
        return told

    def ps(self) -> list[dict[str, Any]]:
        """Its processes."""
        rows: list[dict[str, Any]] = json.loads(self.dynctl("ps", self.name, "--json").stdout)
        return rows

    def status(self) -> dict[str, Any]:
        """Is it ready."""
        told: dict[str, Any] = json.loads(self.dynctl("status", self.name, "--json", check=False).stdout)
        return told

    def await_ready(self, timeout: float = 60.0) -> None:
        """Until it says that it is ready."""
        eventually(lambda: bool(self.status().get("ready")), f"{self.name} is ready", timeout)


@contextmanager
def deployed(laptop: Laptop, *more: str) -> Iterator[dict[str, Any]]:
    """Up, and down again whatever happens."""
    try:
        yield laptop.up(*more)
    finally:
        laptop.dynctl("down", laptop.name, check=False)


@dataclass
class Load:
    """Clients that stream chats one after another, and what came of each."""

    url: str
    outcomes: Counter[str] = field(default_factory=Counter)
    over: threading.Event = field(default_factory=threading.Event)

    def client(self, number: int) -> None:
        """One client, until it is over."""
        count = 0
        while not self.over.is_set():
            count += 1
            try:
                self.outcomes[self.ask(f"hello {number} {count}")] += 1
            except (OSError, http.client.HTTPException) as error:
                self.outcomes[f"{type(error).__name__}: {error}"] += 1

    def ask(self, prompt: str) -> str:
        """One chat; how it ended."""
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=60.0)
        body = {"model": "tiny", "stream": True, "max_tokens": 200, "ignore_eos": True}
        messages = [{"role": "user", "content": prompt}]
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps({**body, "messages": messages}))
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        if answer.status != 200:
            return f"status {answer.status}"
        whole = text.rstrip().endswith(b"data: [DONE]") and b'"error"' not in text
        return "whole" if whole else f"broken: {text[-200:]!r}"


@contextmanager
def under_load(url: str, clients: int = 8) -> Iterator[Load]:
    """Streams go on while the block runs; those under way at its end are read to theirs."""
    load = Load(url)
    threads = [threading.Thread(target=load.client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield load
    finally:
        load.over.set()
        for thread in threads:
            thread.join()
