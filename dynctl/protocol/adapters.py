"""LoRA adapters loaded at run time: the deployment's list, kept by the controller, and what comes of it.

The list is what ought to be there; each sidecar brings its engine in line with it: before it registers, when
it is told to look, and now and then by itself.
"""

from __future__ import annotations

import msgspec


class Adapter(msgspec.Struct, frozen=True, kw_only=True):
    """`name` is what requests say as `model`; `path` a directory that every engine can read, or a hub id."""

    name: str
    path: str


class GetAdapters(msgspec.Struct, frozen=True, kw_only=True, tag="adapters"):
    """Op "adapters.list" at the controller. Answer: `AdapterList`."""


class AddAdapter(msgspec.Struct, frozen=True, kw_only=True, tag="add_adapter"):
    """Op "adapters.add" at the controller: refused when another path has the name. Answer: `AdapterList`."""

    adapter: Adapter


class RemoveAdapter(msgspec.Struct, frozen=True, kw_only=True, tag="remove_adapter"):
    """Op "adapters.remove" at the controller; a name that is not there is no error. Answer: `AdapterList`."""

    name: str


class AdapterList(msgspec.Struct, frozen=True, kw_only=True):
    """What ought to be loaded everywhere."""

    adapters: list[Adapter] = []


class SyncAdapters(msgspec.Struct, frozen=True, kw_only=True, tag="sync_adapters"):
    """Op "adapters.sync" at a sidecar: bring the engine in line with the list now. Answer: `AdaptersHeld`."""


class AdaptersHeld(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine serves beside the model, and by name why what ought to be there, or gone, is not.

    `refused`: of `failed` those that the engine itself did not want (HTTP 4xx).
    """

    adapters: list[str]
    failed: dict[str, str] = {}
    refused: list[str] = []
