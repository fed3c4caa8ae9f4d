"""The list of LoRA adapters at the controller, and a sidecar that follows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import msgspec
import pytest

from dynctl.discovery.adapters import Adapters as Listing
from dynctl.engines.base import LoraPaths
from dynctl.errors import DiscoveryError, PeerLost, RequestError
from dynctl.protocol.adapters import Adapter, AdapterList, AddAdapter, RemoveAdapter
from dynctl.transport.control import ControlClient
from dynctl.worker.adapters import Adapters as Sidecar

PATHS = LoraPaths("/load", "/unload")


def raw(body: msgspec.Struct) -> msgspec.Raw:
    return msgspec.Raw(msgspec.msgpack.encode(body))


def add(listing: Listing, name: str, path: str = "/p") -> AdapterList:
    return listing.handle("adapters.add", raw(AddAdapter(adapter=Adapter(name=name, path=path))))


def test_the_list_is_kept_and_read_again() -> None:
    kept: list[bytes] = []
    listing = Listing(b"", kept.append)
    add(listing, "a")
    add(listing, "b")
    add(listing, "a")
    listing.handle("adapters.remove", raw(RemoveAdapter(name="a")))
    listing.handle("adapters.remove", raw(RemoveAdapter(name="never")))
    assert len(kept) == 3
    again = Listing(kept[-1], kept.append).handle("adapters.list", msgspec.Raw(b""))
    assert [adapter.name for adapter in again.adapters] == ["b"]


def test_a_name_stands_for_one_path_and_a_list_that_cannot_be_kept_does_not_change() -> None:
    full = False

    def save(_: bytes) -> None:
        if full:
            raise OSError("no space left")

    listing = Listing(b"", save)
    add(listing, "a")
    with pytest.raises(RequestError, match="loaded from /p"):
        add(listing, "a", "/other")
    full = True
    with pytest.raises(DiscoveryError, match="no space left"):
        add(listing, "b")
    assert [adapter.name for adapter in listing.handle("adapters.list", msgspec.Raw(b"")).adapters] == ["a"]
    for op, saved in (("adapters.x", b""), ("adapters.list", b"{"), ("adapters.list", b'{"version": 9}')):
        with pytest.raises(DiscoveryError):
            Listing(saved, save).handle(op, msgspec.Raw(b""))


class Controller:
    """Stands in for a control client: tells a list, or is away."""

    def __init__(self) -> None:
        self.wanted: dict[str, str] = {}
        self.away = False

    async def call(self, op: str, *_: Any) -> AdapterList:
        assert op == "adapters.list"
        if self.away:
            raise PeerLost("away")
        return AdapterList(adapters=[Adapter(name=name, path=path) for name, path in self.wanted.items()])


class Engine:
    """Stands in for an engine: notes what it is asked and what was told before, and answers `status`."""

    def __init__(self, controller: Controller, paths: LoraPaths | None = PATHS) -> None:
        self.status = 200
        self.log: list[Any] = []
        self.sidecar = Sidecar(cast(ControlClient, controller), paths, self._post, self._told)

    async def _post(self, path: str, body: Mapping[str, str]) -> tuple[int, str]:
        if not self.status:
            raise PeerLost("gone")
        self.log.append((path, body["lora_name"]))
        return self.status, "told"

    async def _told(self, held: list[str]) -> None:
        self.log.append(held)


async def test_an_adapter_is_told_after_it_is_loaded_and_forgotten_before_it_is_unloaded() -> None:
    controller = Controller()
    engine = Engine(controller)
    engine.sidecar.attach(["static"])
    controller.wanted = {"a": "/p", "static": "/q"}
    held = await engine.sidecar.sync()
    assert (held.adapters, held.failed) == (["static", "a"], {})
    assert engine.log == [("/load", "a"), ["static", "a"]]
    engine.log.clear()
    controller.wanted = {}
    assert (await engine.sidecar.sync()).adapters == ["static"]
    assert engine.log == [["static"], ("/unload", "a")]


@pytest.mark.parametrize(("status", "refused"), [(404, ["a"]), (500, []), (0, [])])
async def test_what_the_engine_does_not_do_is_told_and_tried_again(status: int, refused: list[str]) -> None:
    controller = Controller()
    engine = Engine(controller)
    engine.sidecar.attach([])
    controller.wanted, engine.status = {"a": "/p"}, status
    held = await engine.sidecar.sync()
    assert (held.adapters, list(held.failed), held.refused) == ([], ["a"], refused)
    engine.status = 200
    assert (await engine.sidecar.sync()).failed == {}
    assert engine.sidecar.held == ["a"]


async def test_an_engine_without_adapters_refuses_and_a_controller_that_is_away_changes_nothing() -> None:
    controller = Controller()
    engine = Engine(controller, None)
    engine.sidecar.attach(["x"])
    controller.wanted = {"a": "/p"}
    assert (await engine.sidecar.sync()).refused == ["a"]
    controller.away = True
    with pytest.raises(PeerLost):
        await engine.sidecar.sync()
    assert engine.sidecar.held == ["x"]
