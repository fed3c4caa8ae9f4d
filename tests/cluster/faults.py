"""Faults, as context managers that heal on leaving: the host is reachable, the node usable again.

What Slurm is told of last (a drain, a job) may be lost with its controller, and a new controller names nodes
idle before it can use them: `repair` sees to that, after every test in which a fault acted.
"""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.cluster.commands import CommandFailed, eventually, run
from tests.cluster.hosts import MACHINE, spaces
from tests.cluster.slurm import Slurm

_ACT_S = 20.0
_HEAL_S = 60.0


class Faults(Slurm):
    """What can go wrong, on purpose. Faults nest: the last to be left waits until all is well again."""

    _acting = 0
    _touched: frozenset[str] = frozenset()

    @contextmanager
    def _fault(self, *hosts: str) -> Iterator[None]:
        """Around each fault, its healing included."""
        self.faulted = True
        self._acting += 1
        self._touched |= set(hosts)
        try:
            yield
        finally:
            self._acting -= 1
            if not self._acting:
                touched, self._touched = self._touched, frozenset()
                self._await(*(host for host in self.names if host in touched))

    @contextmanager
    def cut(self, host: str) -> Iterator[None]:
        """The host's links are down: silence, no FIN or RST; all in it runs on."""
        links = self._links(host)
        with self._fault(host):
            try:
                for link in links:
                    run(["ip", "link", "set", link, "down"], timeout=_ACT_S)
                yield
            finally:
                for link in links:
                    run(["ip", "link", "set", link, "up"], timeout=_ACT_S)

    @contextmanager
    def off(self, host: str) -> Iterator[None]:
        """A power cut: silence, and all that ran there is gone; the host boots again on leaving."""
        with self._fault(host):
            try:
                self.script("down.sh", "off", host)
                yield
            finally:
                self.script("up.sh", "boot", host)

    def boot(self, host: str) -> None:
        """Power on, if it is off, and wait until it can be used."""
        with self._fault(host):
            self.script("up.sh", "boot", host)

    @contextmanager
    def partition(self, a: str, b: str) -> Iterator[None]:
        """Nothing passes between two hosts; both reach all others."""
        one, other = self._link_towards(a, b), self._link_towards(b, a)
        chain = f"between_{a}_{b}"
        rules = "".join(
            f"add rule bridge dyn {chain} iifname {i} oifname {o} drop\n"
            for i, o in ((one, other), (other, one))
        )
        hook = "{ type filter hook forward priority 0; }"
        made = f"add table bridge dyn\nadd chain bridge dyn {chain} {hook}\n"
        with self._fault(a, b):
            run(["nft", "-f", "-"], input=made + rules, timeout=_ACT_S)
            try:
                yield
            finally:
                run(["nft", "delete", "chain", "bridge", "dyn", chain], timeout=_ACT_S)
                if self._acting == 1:
                    self._await_way(a, b)

    def kill_sshd_sessions(self, host: str) -> int:
        """SIGKILL to the sshd processes of the test user's connections; how many. Their commands live on."""
        killed = 0
        there = spaces(self._first(host))
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if not entry.name.isdigit() or spaces(int(entry.name)) != there:
                    continue
                if (entry / "cmdline").read_bytes().startswith(b"sshd: dyn"):
                    os.kill(int(entry.name), signal.SIGKILL)
                    killed += 1
        return killed

    @contextmanager
    def sshd_dead(self, host: str) -> Iterator[None]:
        """The listening sshd is killed: new connections are refused, the old ones live on."""
        log = self.folder / "log" / f"sshd.{host}.log"
        with self._fault(host):
            self.exec(host, "sh", "-c", "kill -9 $(cat /run/sshd.pid)", timeout=_ACT_S)
            try:
                yield
            finally:
                self.exec(host, "/usr/sbin/sshd", "-f", "/run/sshd_config", "-E", log, timeout=_ACT_S)

    @contextmanager
    def kill_slurmd(self, host: str) -> Iterator[None]:
        """slurmd is killed: the node is down after 15 s to 20 s, its jobs' processes live on meanwhile."""
        pid_file = self.folder / f"slurm/spool/{host}.pid"
        with self._fault(host):
            self.exec(host, "sh", "-c", f"kill -9 $(cat {pid_file})", timeout=_ACT_S)
            try:
                yield
            finally:
                self.exec(host, "slurmd", "-N", host, timeout=_ACT_S)

    @contextmanager
    def drain(self, node: str) -> Iterator[None]:
        """The node takes no new jobs."""
        with self._fault(node):
            self.update_node(node, "state=drain", "reason=test")
            try:
                yield
            finally:
                with suppress(CommandFailed):  # Not drained any more: a new controller may have forgotten it.
                    self.update_node(node, "state=resume")

    @contextmanager
    def slow(self, host: str, rate: str = "20mbit") -> Iterator[None]:
        """What the host receives comes at no more than this rate."""
        links = self._links(host)
        limit = ["root", "tbf", "rate", rate, "burst", "64kb", "latency", "100ms"]
        with self._fault(host):
            try:
                for link in links:
                    run(["tc", "qdisc", "add", "dev", link, *limit], timeout=_ACT_S)
                yield
            finally:
                for link in links:
                    run(["tc", "qdisc", "del", "dev", link, "root"], timeout=_ACT_S, check=False)

    @contextmanager
    def slurmctld_down(self, *, kill: bool = False) -> Iterator[None]:
        """The controller has ended, with its state saved if not by `kill`; it is started on leaving.

        It answers then; it may take 5 s more until it starts jobs.
        """
        pid_file = self.folder / "slurm/state/slurmctld.pid"
        pid = self.exec("head", "cat", pid_file, timeout=_ACT_S).stdout.strip()
        runs = ["grep", "-qsa", "slurmctld", f"/proc/{pid}/cmdline"]
        with self._fault("head"):
            self.exec("head", "kill", "-9" if kill else "-15", pid, timeout=_ACT_S)
            try:
                eventually(lambda: self.exec("head", *runs, check=False).returncode != 0, "it ends", _HEAL_S)
                yield
            finally:
                self.exec("head", "slurmctld", timeout=_ACT_S)

    def restart_slurmctld(self, *, kill: bool = False) -> None:
        """Its end and its start; back when it answers."""
        with self.slurmctld_down(kill=kill):
            pass

    @contextmanager
    def full_disk(self, host: str, at: str | Path | None = None, size: str = "1m") -> Iterator[Path]:
        """A file system without a free byte, at a folder of one host; what was there is hidden.

        Without `at` it is a new folder in /run/local.
        """
        where = Path(at or f"/run/local/full-{secrets.token_hex(4)}")
        made = self.exec(host, "test", "-d", where, check=False).returncode != 0
        if made:
            self.exec(host, "mkdir", "-p", where)
        self.exec(
            host, "mount", "-t", "tmpfs", "-o", f"size={size},uid={self.user_id},mode=755", "tmpfs", where
        )
        try:
            fill = f"cat /dev/zero >{where}/filler; test -s {where}/filler"
            self.exec(host, "sh", "-c", fill)
            yield where
        finally:
            if self.is_up(host):
                self.exec(host, "umount", "-l", where, check=False)
            if made and self.is_up(host):
                self.exec(host, "rmdir", where, check=False)

    def repair(self) -> None:
        """All of the cluster as new, whatever a test did to it; jobs are not cancelled."""
        self.script("up.sh")
        self.faulted = False

    def _links(self, host: str) -> list[str]:
        self._known(host)
        return ["dyv-n1", "dyv-n1p"] if host == "n1" else [f"dyv-{host}"]

    def _link_towards(self, host: str, peer: str) -> str:
        self._known(host)
        return "dyv-n1p" if (host, peer) == ("n1", "priv") else f"dyv-{host}"

    def _await(self, *hosts: str) -> None:
        """Until each sshd can be reached, from where it can be at all, and Slurm can use the nodes."""
        for host in hosts:
            self._await_way("n1" if host == "priv" else MACHINE, host)
        if "head" in hosts:
            eventually(lambda: self.reaches("head", "head", 6817), "slurmctld listens", _HEAL_S)
        nodes = self.nodes if "head" in hosts else [host for host in hosts if host in self.nodes]
        if nodes:
            self.await_nodes(*nodes, timeout=_HEAL_S)

    def _await_way(self, source: str, target: str) -> None:
        eventually(lambda: self.reaches(source, target), f"{target} reached from {source}", _HEAL_S)
