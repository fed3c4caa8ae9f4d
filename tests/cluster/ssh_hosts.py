"""Hosts of the cluster as the SSH layer is given them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

from dynctl.launchers.ssh import SshHosts
from dynctl.launchers.ssh_config import SshOptions
from dynctl.topology.inventory import Host, Ssh
from tests.cluster.cluster import Cluster
from tests.cluster.commands import eventually, run

DEADLINE_S = 30.0


def host(name: str, ssh: Ssh | None = None, *, python: str = "") -> Host:
    """A host of the cluster, reached by its name unless said otherwise."""
    return Host(name, name, ssh=ssh or Ssh(name), python=python)


def hosts(*names: str) -> list[Host]:
    """Several of them."""
    return [host(name) for name in names]


def ssh_of(cluster: Cluster, *, connect_s: float = DEADLINE_S, config: Path | None = None) -> SshHosts:
    """All that connects by the cluster's own configuration, or another."""
    return SshHosts(SshOptions(configs=(config or cluster.ssh_config,), connect_s=connect_s))


def config_with(cluster: Cluster, file: Path, *lines: str) -> Path:
    """A configuration in which these lines come before the cluster's own."""
    file.write_text("\n".join(["Host *", *lines, f"Include {cluster.ssh_config}"]) + "\n")
    return file


def key_in(folder: Path, name: str = "key", passphrase: str = "") -> Path:
    """A new private key, which no host knows."""
    file = folder / name
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-f", file], timeout=30)
    return file


async def until(holds: Callable[[], bool], what: str) -> None:
    """Wait, while connections go on living, until `holds`. Raises CommandFailed with `what`."""
    await asyncio.to_thread(eventually, holds, what, DEADLINE_S)


def mode_of(path: Path) -> int:
    """Its permission bits."""
    return path.stat().st_mode & 0o777


def content_of(path: str | Path) -> bytes:
    """What is in a file; nothing when it is not there."""
    return Path(path).read_bytes() if Path(path).exists() else b""


def names_in(folder: Path) -> list[str]:
    """What is in a directory."""
    return sorted(os.listdir(folder)) if folder.exists() else []


def user_file(cluster: Cluster, path: Path, text: str, mode: int = 0o755) -> Path:
    """A file of the test user."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    for made in (path, path.parent):
        os.chown(made, cluster.user_id, cluster.user_id)
    return path
