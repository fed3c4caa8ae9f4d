"""Which port each process listens on. Pure: what is taken is told, nothing is probed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from zlib import crc32

from dynctl.errors import PlacementError

FIRST_PORT = 20000
LAST_PORT = 32767
"""The range lies below the ports that Linux gives to outgoing connections (32768 and up by default)."""


def first_port_of(run_id: str) -> int:
    """Where the ports of a run start: spread over the lower half of the range by the run's id."""
    return FIRST_PORT + crc32(run_id.encode()) % ((LAST_PORT - FIRST_PORT) // 2) // 50 * 50


class PortAllocator:
    """Hands out blocks of free ports, upwards from `first`, then from the range's start.

    The same questions get the same answers. Deployments that do not know of each other (two users of one
    machine) should start at different places: an engine may bind its port a minute after it was found free.
    `kept`: what owners ("decode-0:events") have already and are given again, taken as it looks.
    """

    def __init__(
        self,
        taken: Iterable[tuple[str, int]] = (),
        first: int = FIRST_PORT,
        kept: Mapping[str, int] | None = None,
    ) -> None:
        self._first = first
        self._kept = kept or {}
        self._taken = set(taken)
        self._given: set[tuple[str, int]] = set()
        self._passed: dict[tuple[tuple[str, ...], int, int], int] = {}
        """Where the last search with these arguments ended: ports are never given back."""

    def allocate(self, nodes: Iterable[str], count: int = 1, owner: str = "") -> int:
        """The first of `count` consecutive ports free on all of `nodes`, taken from now on.

        Raises PlacementError when there is no such block.
        """
        wanted = tuple(nodes)
        found = self._kept.get(owner, 0)
        found = found or self._find(wanted, count, self._first) or self._find(wanted, count, FIRST_PORT)
        if not found:
            raise PlacementError(
                f"no {count} consecutive ports are free on {', '.join(wanted)}",
                hint=f"ports {FIRST_PORT} to {LAST_PORT} are used",
            )
        self._give((node, port) for node in wanted for port in range(found, found + count))
        return found

    def _find(self, nodes: tuple[str, ...], count: int, start: int) -> int:
        """The first free block at or above `start`; 0 when there is none."""
        search = (nodes, count, start)
        at = self._passed.get(search, start)
        while at + count - 1 <= LAST_PORT:
            block = range(at, at + count)
            clash = max((p for p in block for node in nodes if (node, p) in self._taken), default=0)
            if not clash:
                break
            at = clash + 1
        self._passed[search] = at
        return at if at + count - 1 <= LAST_PORT else 0

    def take(self, node: str, port: int, owner: str = "") -> bool:
        """Take one port; False when another has it already."""
        if (node, port) in self._taken and self._kept.get(owner) != port:
            return False
        self._give([(node, port)])
        return True

    def given(self, node: str) -> tuple[int, ...]:
        """All ports handed out on a node, ascending."""
        return tuple(sorted(port for name, port in self._given if name == node))

    def _give(self, ports: Iterable[tuple[str, int]]) -> None:
        given = set(ports)
        self._given |= given
        self._taken |= given
