"""Which port each process listens on. Pure: what is taken is told, nothing is probed."""

from __future__ import annotations

from collections.abc import Iterable

from dynctl.errors import PlacementError

FIRST_PORT = 20000
LAST_PORT = 32767
"""The range lies below the ports that Linux gives to outgoing connections (32768 and up by default)."""


class PortAllocator:
    """Hands out blocks of free ports, lowest first: the same questions get the same answers."""

    def __init__(self, taken: Iterable[tuple[str, int]] = ()) -> None:
        self._taken = set(taken)
        self._given: set[tuple[str, int]] = set()

    def allocate(self, nodes: Iterable[str], count: int = 1) -> int:
        """The first of `count` consecutive ports free on all of `nodes`, taken from now on.

        Raises PlacementError when there is no such block.
        """
        wanted = tuple(nodes)
        start = FIRST_PORT
        while start + count - 1 <= LAST_PORT:
            block = range(start, start + count)
            clash = max((p for p in block for node in wanted if (node, p) in self._taken), default=0)
            if not clash:
                self._give((node, port) for node in wanted for port in block)
                return start
            start = clash + 1
        raise PlacementError(
            f"no {count} consecutive ports are free on {', '.join(wanted)}",
            hint=f"ports {FIRST_PORT} to {LAST_PORT} are used",
        )

    def take(self, node: str, port: int) -> bool:
        """Take one port; False when it was taken already."""
        if (node, port) in self._taken:
            return False
        self._give([(node, port)])
        return True

    def given(self, node: str) -> tuple[int, ...]:
        """All ports handed out on a node, ascending."""
        return tuple(sorted(port for name, port in self._given if name == node))

    def _give(self, ports: Iterable[tuple[str, int]]) -> None:
        self._given.update(ports)
        self._taken.update(self._given)
