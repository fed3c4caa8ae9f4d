"""What is not to be had on the nodes of a deployment that is changed or moved. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dynctl.protocol.day2 import NodeRoom


@dataclass(frozen=True, slots=True)
class Room:
    """What is not to be had: ports in use and GPUs of other deployments, as (node, number); nodes that do not
    answer, and why.
    """

    ports: frozenset[tuple[str, int]] = frozenset()
    gpus: frozenset[tuple[str, int]] = frozenset()
    lost: Mapping[str, str] = field(default_factory=dict)


def merged(room: Room, asked: Mapping[str, NodeRoom]) -> Room:
    """The room with what the nodes have told of themselves."""
    ports = {(node, port) for node, told in asked.items() for port in told.ports}
    gpus = {(node, gpu) for node, told in asked.items() for gpu in told.gpus}
    lost = {node: told.lost for node, told in asked.items() if told.lost}
    return Room(room.ports | ports, room.gpus | gpus, {**room.lost, **lost})
