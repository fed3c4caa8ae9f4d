"""Which machines there are and how many GPUs each has: from a file, from the recipe, or this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from dynctl.errors import PlacementError

LOCAL = "local"
AWAITED = "node+"
"""With a number behind it, the name of a node that is still to be given. No machine can be called so."""


@dataclass(frozen=True, slots=True)
class Ssh:
    """How SSH reaches a host. What is "" or None is left to the SSH configuration; `host` is what is dialled.

    `key` is an absolute path, `proxy_jump` as ssh -J takes it ("none": a direct connection).
    """

    host: str = ""
    user: str = ""
    port: int | None = None
    key: str = ""
    proxy_jump: str = ""


@dataclass(frozen=True, slots=True)
class Host:
    """One machine: its address on the data network, and GPUs 0 .. gpus - 1.

    `discover`: how many GPUs it has is still to be found there; `with_gpus` fills it in. `python` is the
    interpreter there that has dynctl, `directory` where it keeps its runs; "" when none is named.
    """

    name: str
    address: str
    gpus: int = 0
    discover: bool = False
    labels: tuple[str, ...] = ()
    ssh: Ssh = field(default_factory=Ssh)
    python: str = ""
    directory: str = ""


@dataclass(frozen=True, slots=True)
class Inventory:
    """Machines in the order they are filled; never empty. `source` tells people where this is from.

    `groups` is group → names of its hosts; `more` tells people how there would be more of them.
    """

    hosts: tuple[Host, ...]
    source: str
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    more: str = "--inventory FILE with more hosts"

    def select(self, wanted: Sequence[str]) -> tuple[Host, ...]:
        """The hosts that these names, groups and labels mean, each once, in the order they are asked for.

        Raises PlacementError that tells which there are.
        """
        found: dict[str, Host] = {}
        for word in wanted:
            members = self.groups.get(word, ())
            meant = [h for h in self.hosts if h.name == word or h.name in members or word in h.labels]
            if not meant:
                raise PlacementError(f"no host '{word}' in {self.source}", hint=self._there())
            found.update((host.name, host) for host in meant)
        return tuple(found.values())

    def undiscovered(self) -> tuple[str, ...]:
        """Names of the hosts whose number of GPUs is still to be found there."""
        return tuple(host.name for host in self.hosts if host.discover)

    def _there(self) -> str:
        labels = dict.fromkeys(label for host in self.hosts for label in host.labels)
        kinds = {"": [host.name for host in self.hosts], "groups ": self.groups, "labels ": labels}
        return "there are " + "; ".join(f"{kind}{', '.join(names)}" for kind, names in kinds.items() if names)


def is_awaited(node: str) -> bool:
    """Whether this is no node yet, but one that is still to be given."""
    return node.startswith(AWAITED)


def with_gpus(inventory: Inventory, found: Mapping[str, int]) -> Inventory:
    """The inventory with the GPUs found filled in, by host; only where they are to be discovered."""
    hosts = tuple(
        replace(host, gpus=found[host.name], discover=False) if host.discover and host.name in found else host
        for host in inventory.hosts
    )
    return replace(inventory, hosts=hosts)
