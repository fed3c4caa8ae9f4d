"""Which idle upstream connection to use again: a decider, with the time passed in."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

C = TypeVar("C")


class IdlePool(Generic[C]):
    """Idle connections by origin, the last used first, so that the others can expire."""

    def __init__(self, *, max_idle: int, idle_expiry_s: float) -> None:
        self._max_idle = max_idle
        self._idle_expiry_s = idle_expiry_s
        self._idle: dict[Hashable, list[tuple[float, C]]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._idle.values()))

    def take(self, origin: Hashable, now: float) -> C | None:
        """The most recently used connection that has not expired, now the caller's."""
        stack = self._idle.get(origin)
        if not stack or stack[-1][0] + self._idle_expiry_s <= now:
            return None
        connection = stack.pop()[1]
        if not stack:
            del self._idle[origin]
        return connection

    def put(self, origin: Hashable, connection: C, now: float) -> C | None:
        """Keep a connection; gives back the one to close instead, when there are `max_idle` already."""
        if self._max_idle == 0:
            return connection
        stack = self._idle.setdefault(origin, [])
        stack.append((now, connection))
        return stack.pop(0)[1] if len(stack) > self._max_idle else None

    def discard(self, origin: Hashable, connection: C) -> None:
        """Forget a connection that has closed; nothing happens if it is not here."""
        stack = self._idle.get(origin, [])
        kept = [pair for pair in stack if pair[1] is not connection]
        if kept:
            self._idle[origin] = kept
        else:
            self._idle.pop(origin, None)

    def expire(self, now: float) -> list[C]:
        """Forget and give back the connections that have been idle too long."""
        expired: list[C] = []
        for origin, stack in list(self._idle.items()):
            expired += [one for since, one in stack if since + self._idle_expiry_s <= now]
            kept = [pair for pair in stack if pair[0] + self._idle_expiry_s > now]
            if kept:
                self._idle[origin] = kept
            else:
                del self._idle[origin]
        return expired

    def clear(self) -> list[C]:
        """Forget and give back all."""
        everything = [one for stack in self._idle.values() for _, one in stack]
        self._idle.clear()
        return everything
