"""The walk along a prompt's blocks: who holds how many of them, without a hole. Pure.

Who holds a block is a mask, one bit a place. Blocks stored together share a mask object, so that most of a
prompt is passed over by identity. Compiled where it can be (`native/walk.c`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from dynctl.native import load

_STRIDE = 32


@lru_cache(maxsize=1024)
def places_of(mask: int) -> tuple[int, ...]:
    """The numbers of the bits that are set, from low to high: the same sets come again and again."""
    places = []
    while mask:
        low = mask & -mask
        mask ^= low
        places.append(low.bit_length() - 1)
    return tuple(places)


def walk(
    masks: dict[int, int], hashes: list[int], alive: int, found: list[int], *, shrinking: bool = False
) -> int:
    """How many of `hashes`, from the start, each place in `alive` holds: into `found`, by place.

    `masks`: who holds a hash, nobody where it is absent. `shrinking`: whoever holds a block holds those
    before it, so where the last of some is held by all, they need not be looked at. Returns at which hash the
    last of `alive` parted; `len(hashes)` if some hold all.
    """
    if load.compiled is not None:
        return load.compiled.walk(masks, hashes, alive, found, shrinking, places_of)
    return python_walk(masks.get, hashes, alive, found, shrinking=shrinking)


def python_walk(
    get: Callable[[int], int | None],
    hashes: list[int],
    alive: int,
    found: list[int],
    *,
    shrinking: bool = False,
) -> int:
    """`walk`, in Python, with `get` in place of the masks."""
    total, at = len(hashes), 0
    last: int | None = -1
    while alive and at < total:
        until = min(at + _STRIDE, total)
        if shrinking and get(hashes[until - 1]) == alive:
            at = until
            continue
        row = list(map(get, hashes[at:until]))
        if row[-1] is not last or row.count(last) != len(row):
            for depth, mask in enumerate(row, at):
                if mask is last:
                    continue
                last = mask
                still = alive & mask if mask else 0
                if still != alive:
                    for place in places_of(alive ^ still):
                        found[place] = depth
                    alive = still
                    if not alive:
                        return depth
        at = until
    for place in places_of(alive):
        found[place] = total
    return total if alive else 0
