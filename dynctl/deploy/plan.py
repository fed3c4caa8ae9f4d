"""A deployment down to every argument: a value that is printed, stored and started as it is.

Pure and deterministic: the same recipe, inventory, taken ports and run make the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from dynctl.command import Command
from dynctl.errors import CodecError
from dynctl.topology.placement import Placement

PLAN_VERSION = 1

Kind = Literal["controller", "agent", "worker", "frontend", "engine"]


@dataclass(frozen=True, slots=True)
class PlannedNode:
    """One host of the plan. `gpus` are the indices in use, `ports` all ports in use, both ascending.

    `agent` is the endpoint of its agent, `run_dir` the run's directory there; "" where the controller starts
    processes by itself.
    """

    name: str
    address: str
    gpus: tuple[int, ...] = ()
    ports: tuple[int, ...] = ()
    agent: str = ""
    run_dir: str = ""


@dataclass(frozen=True, slots=True)
class PlannedProcess:
    """One process. `kind` "engine" is started by its sidecar, all others by a launcher.

    `id` is the seat: "controller", "agent-n1", "frontend-0", "decode-0" (the sidecar), "decode-0.1" (the
    sidecar of the replica's second node), "decode-0/engine", "decode-0/engine.1". `ports` is name → first
    port of the block. `depends` are ids that must have been started before. `also`: further nodes, with GPUs,
    on which its engine starts ranks by itself. `takes`: the seat whose running engine a new one goes on with
    under its own role ("" = it starts one), see `deploy.handover`.
    """

    id: str
    kind: Kind
    role: str
    index: int
    node: str
    command: Command
    gpus: tuple[int, ...] = ()
    ports: Mapping[str, int] = field(default_factory=dict)
    depends: tuple[str, ...] = ()
    also: tuple[tuple[str, tuple[int, ...]], ...] = ()
    takes: str = ""

    @property
    def spots(self) -> list[tuple[str, tuple[int, ...]]]:
        """Nodes, its own first, with its GPUs there."""
        return [(self.node, self.gpus), *self.also]


@dataclass(frozen=True, slots=True)
class Kept:
    """What a plan takes over from the one before: where replicas are, ports by owner ("decode-0:events").

    `others` are GPUs (node, index) that other deployments have.
    """

    placement: Placement
    ports: Mapping[str, int]
    others: frozenset[tuple[str, int]] = frozenset()


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole deployment. `registry` is the controller's control endpoint, `membership` its publisher.

    `roles` is replicas by role, engines only; `url` the public base URL, of the first frontend's host.
    """

    name: str
    run_id: str
    target: str
    backend: str
    model: str
    url: str
    registry: str
    membership: str
    roles: Mapping[str, int]
    nodes: tuple[PlannedNode, ...]
    processes: tuple[PlannedProcess, ...]
    version: int = PLAN_VERSION

    def process(self, process_id: str) -> PlannedProcess:
        """The process of that id. Raises KeyError when there is none."""
        for process in self.processes:
            if process.id == process_id:
                return process
        raise KeyError(process_id)

    def to_json(self) -> str:
        """The stored form, whole and unmasked: for a file of mode 0600. Same plan, same bytes, also from the
        release before: what it did not know is left out where it is empty.
        """
        whole = msgspec.to_builtins(self, order="sorted")
        for process in whole["processes"]:
            for name in ("also", "takes"):
                if not process[name]:
                    del process[name]
        return msgspec.json.format(msgspec.json.encode(whole), indent=2).decode() + "\n"

    @staticmethod
    def from_json(text: str | bytes) -> Plan:
        """Read the stored form. Raises CodecError when it is none, or of another version."""
        try:
            plan = msgspec.json.decode(text, type=Plan)
        except msgspec.MsgspecError as error:
            raise CodecError(f"not a plan: {error}") from error
        if plan.version != PLAN_VERSION:
            raise CodecError(f"plan version {plan.version} is not {PLAN_VERSION}")
        return plan

    def shown(self) -> dict[str, Any]:
        """The printed form: secrets masked, spec files by name only."""
        return {
            "version": self.version,
            "name": self.name,
            "run_id": self.run_id,
            "target": self.target,
            "backend": self.backend,
            "model": self.model,
            "url": self.url,
            "registry": self.registry,
            "membership": self.membership,
            "roles": dict(self.roles),
            "nodes": [
                {
                    "name": n.name,
                    "address": n.address,
                    "gpus": list(n.gpus),
                    "ports": list(n.ports),
                    **({"agent": n.agent, "run_dir": n.run_dir} if n.agent else {}),
                }
                for n in self.nodes
            ],
            "processes": [_shown_process(p) for p in self.processes],
        }


def _shown_process(process: PlannedProcess) -> dict[str, Any]:
    return {
        "id": process.id,
        "kind": process.kind,
        "role": process.role,
        "index": process.index,
        "node": process.node,
        "gpus": list(process.gpus),
        "ports": dict(sorted(process.ports.items())),
        "depends": list(process.depends),
        **({"also": {node: list(gpus) for node, gpus in process.also}} if process.also else {}),
        **({"takes": process.takes} if process.takes else {}),
        "argv": list(process.command.shown_argv()),
        "env": process.command.shown_env(),
        "cwd": process.command.cwd or "",
        "files": sorted(process.command.files),
    }
