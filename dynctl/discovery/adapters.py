"""The list of LoRA adapters that every worker ought to have: part of the controller, outlives it on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec

from dynctl.errors import DiscoveryError, RequestError
from dynctl.protocol.adapters import Adapter, AdapterList, AddAdapter, RemoveAdapter
from dynctl.transport.control import read_body

logger = logging.getLogger(__name__)

_VERSION = 1


class _File(msgspec.Struct, kw_only=True):
    version: int = _VERSION
    adapters: list[Adapter] = []


class Adapters:
    """Give it the control server's "adapters.*" calls. `saved`: what `save` was last given, b"" = nothing.

    `save` raises OSError when it cannot keep it: the change is then not made.
    """

    def __init__(self, saved: bytes, save: Callable[[bytes], None]) -> None:
        self._save = save
        self._wanted = {adapter.name: adapter for adapter in _read(saved)}

    def handle(self, op: str, body: msgspec.Raw) -> AdapterList:
        """Answer one call. Raises CodecError, RequestError for a name taken, DiscoveryError."""
        match op:
            case "adapters.list":
                pass
            case "adapters.add":
                self._add(read_body(body, AddAdapter).adapter)
            case "adapters.remove":
                self._remove(read_body(body, RemoveAdapter).name)
            case _:
                raise DiscoveryError(f"unknown op {op!r}", hint="adapters.list, add or remove")
        return AdapterList(adapters=list(self._wanted.values()))

    def _add(self, adapter: Adapter) -> None:
        known = self._wanted.get(adapter.name)
        if known is not None and known != adapter:
            raise RequestError(
                f"the adapter {adapter.name} is loaded from {known.path}",
                where="lora_name",
                hint="unload it first, or choose another name",
            )
        self._keep({**self._wanted, adapter.name: adapter})

    def _remove(self, name: str) -> None:
        self._keep({known: adapter for known, adapter in self._wanted.items() if known != name})

    def _keep(self, wanted: dict[str, Adapter]) -> None:
        if wanted == self._wanted:
            return
        try:
            self._save(msgspec.json.encode(_File(adapters=list(wanted.values()))))
        except OSError as error:
            raise DiscoveryError(f"the list of adapters cannot be kept: {error}") from error
        logger.info("adapters.changed names=%s", ",".join(wanted))
        self._wanted = wanted


def _read(saved: bytes) -> list[Adapter]:
    if not saved:
        return []
    try:
        file = msgspec.json.decode(saved, type=_File)
    except msgspec.DecodeError as error:
        raise DiscoveryError(f"the list of adapters cannot be read: {error}") from error
    if file.version != _VERSION:
        raise DiscoveryError(f"the list of adapters has version {file.version}, not {_VERSION}")
    return file.adapters
