"""Slurm of the cluster as the test user sees it: its commands, with deadlines, and their answers read."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.commands import CommandFailed, eventually, run
from tests.cluster.hosts import USER, Hosts

_CLIENT_S = 25.0
"""A client gives up by itself after 14 s to 19 s when the controller's host is silent."""
USABLE = frozenset({"idle", "mix", "alloc"})
FINISHED = frozenset(
    {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY"}
)


@dataclass(frozen=True)
class Job:
    """One line of squeue; `nodes` is empty while it is pending; an id may come again, `submitted` not."""

    id: str
    name: str
    state: str
    submitted: str
    nodes: str

    def __str__(self) -> str:
        return f"job {self.id} {self.name} {self.state} {self.nodes}".strip()


class Slurm(Hosts):
    """Slurm's commands, run as the test user on `head` if no other host is said."""

    def srun(
        self, *args: str | Path, host: str = "head", timeout: float = 30.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """`srun ARGS...`; killed when time is up, as a job that cannot run waits for ever."""
        return self.run_as_user(["srun", *args], host=host, timeout=timeout, check=check)

    def sbatch(self, script: str, *args: str | Path, host: str = "head", timeout: float = _CLIENT_S) -> str:
        """Submit the text of a script (without its first line, `#!/bin/bash`); the job's id."""
        argv = ["sbatch", "--parsable", *args]
        done = self.run_as_user(argv, host=host, input=f"#!/bin/bash\n{script}\n", timeout=timeout)
        return done.stdout.strip().partition(";")[0]

    def squeue(self, *, finished: bool = False, host: str = "head", timeout: float = _CLIENT_S) -> list[Job]:
        """The test user's jobs that have not ended; with `finished` the ended ones of this run too."""
        argv = ["squeue", "-h", "-u", USER, "-o", "%i|%j|%T|%V|%N", *(["-t", "all"] if finished else [])]
        lines = self.run_as_user(argv, host=host, timeout=timeout).stdout.splitlines()
        return [Job(*line.split("|")) for line in lines]

    def scancel(self, *ids: str, timeout: float = _CLIENT_S) -> None:
        """Cancel jobs; it does not wait for their end."""
        self.run_as_user(["scancel", *ids], timeout=timeout)

    def job_state(self, job: str) -> str:
        """RUNNING, COMPLETED and so on; "" for a job that the controller does not know."""
        return next((found.state for found in self.squeue(finished=True) if found.id == job), "")

    def await_job(self, job: str, *states: str, timeout: float = 30.0) -> str:
        """Wait until a job is in one of these states (any of `FINISHED` if none is said); which."""
        wanted = set(states) or FINISHED
        seen: list[str] = []

        def there() -> bool:
            seen.append(self.job_state(job))
            return seen[-1] in wanted

        eventually(there, f"job {job} in {sorted(wanted)}", timeout)
        return seen[-1]

    def node_states(self, *, timeout: float = _CLIENT_S) -> dict[str, str]:
        """Node to sinfo's short state: idle, mix, alloc, drain, drng, down; with "*": not responding."""
        lines = self._as_admin(["sinfo", "-h", "-N", "-p", "gpu", "-o", "%N %t"], timeout).splitlines()
        return dict((name, state) for name, state in (line.split() for line in lines))

    def update_node(self, node: str, *settings: str, timeout: float = _CLIENT_S) -> None:
        """`scontrol update nodename=NODE SETTINGS...` with the rights of an administrator."""
        self._as_admin(["scontrol", "update", f"nodename={node}", *settings], timeout)

    @contextmanager
    def partition_closed(self, partition: str, *, timeout: float = _CLIENT_S) -> Iterator[None]:
        """A partition that takes no more jobs; those that it has go on."""
        update = ["scontrol", "update", f"partitionname={partition}"]
        self._as_admin([*update, "state=drain"], timeout)
        try:
            yield
        finally:
            self._as_admin([*update, "state=up"], timeout)

    def await_nodes(self, *nodes: str, timeout: float = 60.0) -> None:
        """Wait until these nodes can run jobs; one that is down is resumed, a drained one is not."""

        def usable() -> bool:
            try:
                states = self.node_states()
                for node in nodes:
                    if states[node].startswith("down"):
                        self.update_node(node, "state=resume")
            except CommandFailed:
                return False  # The controller is starting, or the node has just changed.
            return all(states[node] in USABLE or states[node] in {"drain", "drng"} for node in nodes)

        eventually(usable, f"usable: {' '.join(nodes)}", timeout)

    def _as_admin(self, argv: Sequence[str], timeout: float) -> str:
        given = {**self.user_env(), "HOME": "/root"}
        return run([*self._enter("head"), *argv], timeout=timeout, env=given).stdout
