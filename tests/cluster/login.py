"""dynctl on the login node of the cluster, with the deployment of one test."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.cluster.cluster import Cluster

READY_S = 90.0


class Login:
    """dynctl as a user calls it on the login node, with jobs of one test's name."""

    def __init__(self, cluster: Cluster, home: Path, token: str) -> None:
        self.cluster, self.home, self.name = cluster, home, token

    def run(
        self, verb: str, *args: str, check: bool = True, timeout: float = READY_S
    ) -> subprocess.CompletedProcess[str]:
        """One command line to its end."""
        return self.cluster.dynctl(verb, *args, home=self.home, check=check, timeout=timeout)

    def up(
        self, *sets: str, args: tuple[str, ...] = (), check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """`up` of the quickstart as two mockers on two nodes, unless told otherwise."""
        given = [f"name={self.name}", "frontend.port=0", "slurm.nodes=2", *sets]
        words = [word for one in given for word in ("--set", one)]
        return self.run("up", "quickstart", "--target", "slurm", "-d", *words, *args, check=check)

    def status(self) -> dict[str, Any]:
        """`status --json`."""
        told: dict[str, Any] = json.loads(self.run("status", self.name, "--json").stdout)
        return told

    def ps(self) -> list[dict[str, Any]]:
        """`ps --json`."""
        rows: list[dict[str, Any]] = json.loads(self.run("ps", self.name, "--json").stdout)
        return rows

    def url(self) -> str:
        """Where it serves."""
        return str(self.status()["url"])

    def health(self) -> str:
        """What the frontend says, asked from the login node."""
        return self.cluster.run_as_user(["curl", "-s", f"{self.url()}/health"], check=False).stdout

    def jobs(self) -> list[str]:
        """Jobs of this test that have not ended, with their states."""
        return [f"{job.id} {job.state}" for job in self.cluster.squeue() if self.name in job.name]

    def job(self) -> str:
        """The id of its job."""
        return str(self.status()["job"]["id"])


@contextmanager
def served(login: Login, *sets: str) -> Iterator[str]:
    """A deployment that is ready, and is ended afterwards; its URL."""
    url = login.up(*sets).stdout.strip()
    try:
        yield url
    finally:
        login.run("down", login.name, "--timeout", "5s", check=False)
