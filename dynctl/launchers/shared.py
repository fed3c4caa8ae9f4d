"""Whether hosts see one directory or each its own: found by what each of them leaves there for the others."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Coroutine, Iterable, Mapping

from dynctl.launchers.ssh_host import SshHost

_STEP_S = 30.0
_LEAVE = 'set -eu; umask 077; mkdir -p -- "$1"; : > "$1/.seen-$2-$3"'
# The file made first has the directory read anew where it is cached, as network file systems do.
_LOOK = 'set -eu; : > "$1/.seen-$2-$3.look"; rm -f -- "$1/.seen-$2-$3.look"; ls -A -- "$1"'
_CLEAR = 'rm -f -- "$1/.seen-$2-$3"'


def same_directory(seen: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Hosts by what they share: `seen` is host → the hosts whose traces it found. Both must see each other.

    Groups and hosts are in the order given; one that shares with nobody is a group of its own.
    """
    found = {host: set(others) for host, others in seen.items()}
    groups: list[list[str]] = []
    for host in found:
        home = next((g for g in groups if host in found[g[0]] and g[0] in found[host]), None)
        if home is None:
            groups.append([host])
        else:
            home.append(host)
    return groups


async def shared_groups(hosts: Mapping[str, SshHost], directory: str) -> list[list[str]]:
    """Which hosts see the same `directory` (absolute; made when it is not there). Raises SshError."""
    token, names = secrets.token_hex(6), list(hosts)

    def each(script: str) -> list[Coroutine[None, None, bytes]]:
        words = [["sh", "-c", script, "sh", directory, token, str(n)] for n in range(len(names))]
        pairs = zip(hosts.values(), words, strict=True)
        return [host.check(argv, timeout_s=_STEP_S) for host, argv in pairs]

    try:
        await asyncio.gather(*each(_LEAVE))
        listed = await asyncio.gather(*each(_LOOK))
    finally:
        await asyncio.gather(*each(_CLEAR), return_exceptions=True)  # a lost host keeps an empty file
    prefix = f".seen-{token}-"
    seen = {
        name: [
            names[int(entry.removeprefix(prefix))]
            for entry in text.decode("utf-8", "replace").split("\n")
            if entry.startswith(prefix) and entry.removeprefix(prefix).isdigit()
        ]
        for name, text in zip(names, listed, strict=True)
    }
    return same_directory(seen)
