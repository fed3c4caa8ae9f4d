"""The nodes that do not answer the controller: why, since when, and which of them are shown. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from dynctl.deploy.state import RunState
from dynctl.launchers.fleet import NodeNews
from dynctl.protocol.day2 import NodeRoom


@dataclass(frozen=True, slots=True)
class Unseen:
    """A node that does not answer, for people why, and since when (monotonic)."""

    why: str
    since: float

    @staticmethod
    def of(news: NodeNews, now: float) -> Unseen:
        """As the fleet has told."""
        return Unseen(news.why, now - news.silent_s)


def rooms(lost: Mapping[str, Unseen]) -> dict[str, NodeRoom]:
    """What is to be had on them: nothing."""
    return {node: NodeRoom(lost=one.why or "it does not answer") for node, one in lost.items()}


def shown(lost: Mapping[str, Unseen], state: RunState, hosts: Collection[str], now: float) -> dict[str, str]:
    """What is said of those that matter, by node: the deployment's `hosts`, and where it has processes."""
    used = {seat.node for seat in state.seats}
    return {
        node: f"{one.why or 'it does not answer'} ({now - one.since:.0f} s)"
        for node, one in lost.items()
        if node in used or node in hosts
    }
