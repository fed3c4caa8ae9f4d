"""What is to be placed, on whom it may be, and what came of it: the words that all router modes share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from dynctl.kv.index import SlotKey
from dynctl.protocol.instances import Instance, Role
from dynctl.router.active import Footprint, RankLoad, Ticket


class RouteRequest(msgspec.Struct, frozen=True):
    """What is to be placed.

    `hashes`: sequence hashes of the prompt's full blocks in the router's block size; None = tokens unknown.
    Where only the request's bytes are known, hashes of these (`kv.hashing.OF_BYTES`).
    `prompt_tokens`: 0 = unknown. `expected_output` in tokens: an estimate, not the client's upper limit;
    None = unknown. `exclude`: instance ids not to choose (they have just failed this request).
    `adapter`: LoRA name, "" = the model itself. `session`: "" = none. `pinned`: the instance id the client
    asks for, "" = any; `pinned_rank` likewise. `priority`: higher goes first where requests wait.
    `reads_prompt`: a decode worker is to compute the prompt itself.
    """

    role: Role
    hashes: Sequence[int] | None = None
    prompt_tokens: int = 0
    expected_output: int | None = None
    exclude: frozenset[str] = frozenset()
    adapter: str = ""
    session: str = ""
    pinned: str = ""
    pinned_rank: int | None = None
    priority: int = 0
    reads_prompt: bool = False

    @property
    def prefills(self) -> bool:
        """Whether the prompt is computed where this goes."""
        return self.role != "decode" or self.reads_prompt

    @property
    def decodes(self) -> bool:
        """Whether the answer is generated there."""
        return self.role != "prefill"

    def blocks(self, size: int) -> int:
        """Blocks of `size` tokens that prompt and expected output fill, the last one perhaps in part."""
        return -(-(self.prompt_tokens + (self.expected_output or 0)) // size)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One (worker, rank) that may be chosen.

    `memory`: its place in `router.approximate`, -1 = none; `likeness`: that for hashes of bytes.
    """

    key: SlotKey
    instance: Instance
    load: RankLoad
    memory: int = -1
    likeness: int = -1

    def has(self, adapter: str) -> bool:
        """Whether it has this LoRA adapter loaded; "" is the model itself."""
        model = self.instance.model
        return not adapter or (model is not None and adapter in model.adapters)


class Weighed(msgspec.Struct, frozen=True):
    """All candidates as a mode sees them, in their order; the lowest price is the best.

    `overlaps`: blocks of the prompt that each holds, in any tier. `barred`: whom the guard keeps out, None =
    nobody.
    """

    prices: Sequence[float]
    overlaps: Sequence[int]
    barred: Sequence[bool] | None = None


class Picked(msgspec.Struct, frozen=True):
    """A choice, with the prompt's blocks cached there, what the request will add to its load, and the most
    blocks that any candidate holds.
    """

    candidate: Candidate
    overlap: int
    footprint: Footprint
    best_overlap: int = 0


class Choice(msgspec.Struct, frozen=True):
    """Where a request goes. The caller must call `ticket.finish()` when the request is over, however it ends.

    `overlap_blocks`: blocks of the prompt cached there, `best_overlap_blocks` at the one of all `candidates`
    (worker, rank)s that has most of them; both 0 where nobody looked.
    """

    instance: Instance
    rank: int
    overlap_blocks: int
    candidates: int
    ticket: Ticket
    best_overlap_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Preview:
    """One (worker, rank) as a choice would see it. `barred`: the guard keeps requests from it now."""

    worker: str
    rank: int
    chosen: bool
    cost: float
    overlap_blocks: int
    requests: int
    prefill_tokens: int
    blocks: int
    barred: bool


class Policy(Protocol):
    """One router mode. Neither call changes anything: a choice that is made is told by `took`."""

    def pick(self, request: RouteRequest, candidates: Sequence[Candidate], block_size: int) -> Picked:
        """Choose among `candidates` (at least one, sorted by key). `block_size` in tokens, at least 1."""
        ...

    def weigh(self, request: RouteRequest, candidates: Sequence[Candidate], block_size: int) -> Weighed:
        """What `pick` goes by."""
        ...

    def took(self, request: RouteRequest, picked: Picked) -> None:
        """The request went where `picked` says."""
        ...


def unhashed(request: RouteRequest, block_size: int) -> Footprint:
    """The load of a request whose blocks are not told apart."""
    return Footprint(
        request.prompt_tokens if request.prefills else 0,
        (),
        request.blocks(block_size) if request.decodes else 0,
    )
