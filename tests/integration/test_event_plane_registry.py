"""Registrars and watchers against a registry over real sockets; the registry comes and goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest

from dynctl.discovery.client import Registrar, Watcher
from dynctl.discovery.registry import Registry
from dynctl.errors import CodecError, DiscoveryError
from dynctl.protocol.instances import Instance
from dynctl.protocol.registry import LeaseReply, Member, Register
from dynctl.transport.control import ControlClient, ControlServer
from dynctl.transport.event_plane import Publisher
from dynctl.transport.keys import Keys
from tests.workers import worker_instance


def instance(incarnation: int = 1, seat: str = "decode-0") -> Instance:
    return worker_instance(id=seat, incarnation=incarnation, role="decode")


async def until(condition: Callable[[], bool], deadline_s: float = 15) -> None:
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110 - the condition has no event to wait for
            await asyncio.sleep(0.01)


class Controller:
    """The part of a controller that is the registry."""

    def __init__(self, keys: Keys, control: str, membership: str, ttl_s: float) -> None:
        self._publisher = Publisher(keys, membership)
        self.membership = self._publisher.start()
        self.late: list[frozenset[str]] = []
        self.registry = Registry(self._publisher, ttl_s=ttl_s, on_late=self.late.append)
        self._server = ControlServer(keys, control, self.registry.handle)
        self.control = self._server.start()
        self.registry.start()

    async def close(self) -> None:
        await self._server.close()
        await self.registry.close()
        self._publisher.close()

    def ids(self) -> list[tuple[str, int, str]]:
        return [(m.instance.id, m.instance.incarnation, m.state) for m in self.registry.members()]


class House:
    """Makes parts and closes them."""

    def __init__(self) -> None:
        self.keys = Keys.generate()
        self.control = self.membership = "tcp://127.0.0.1:0"
        self._clients: list[ControlClient] = []
        self._closing: list[Controller | Registrar | Watcher] = []

    def controller(self, ttl_s: float = 0.6) -> Controller:
        made = Controller(self.keys, self.control, self.membership, ttl_s)
        self.control, self.membership = made.control, made.membership
        self._closing.append(made)
        return made

    def client(self) -> ControlClient:
        made = ControlClient(self.keys, self.control)
        self._clients.append(made)
        return made

    def registrar(self, what: Instance, on_superseded: Callable[[], None] = lambda: None) -> Registrar:
        made = Registrar(self.client(), what, on_superseded=on_superseded)
        self._closing.append(made)
        made.start()
        return made

    def watcher(self) -> tuple[Watcher, dict[str, Member]]:
        seen: dict[str, Member] = {}

        def on_change(upserts: list[Member], removed: list[str]) -> None:
            for seat in removed:
                del seen[seat]
            seen.update({m.instance.id: m for m in upserts})

        made = Watcher(self.keys, self.client(), self.membership, on_change=on_change)
        self._closing.append(made)
        made.start()
        return made, seen

    async def close(self) -> None:
        for thing in reversed(self._closing):
            await thing.close()
        for client in self._clients:
            client.close()


@pytest.fixture
async def house() -> AsyncIterator[House]:
    made = House()
    yield made
    await made.close()


async def test_a_controller_that_was_stopped_does_not_take_the_living_for_dead(house: House) -> None:
    """Their renewals wait to be read. Who is dead is missed later by so much, and no more."""
    now = [0.0]
    publisher = Publisher(house.keys, "tcp://127.0.0.1:0")
    publisher.start()
    try:
        registry = Registry(publisher, ttl_s=5.0, clock=lambda: now[0])
        body = msgspec.Raw(msgspec.msgpack.encode(Register(instance=instance(), state="ready")))
        await registry.handle("registry.register", body)

        def held_at(*times: float) -> bool:
            for now[0] in times:
                registry.unreachable(())
            return bool(registry.members())

        assert held_at(0.5, 1.0, 1.5)
        assert held_at(60.0, 60.5, 61.0, 61.5, 62.0, 62.5)
        assert not held_at(63.0, 63.5, 64.0)
    finally:
        publisher.close()


async def test_watcher_sees_register_drain_and_leave(house: House) -> None:
    controller = house.controller()
    watcher, seen = house.watcher()
    assert await watcher.synced(5)
    registrar = house.registrar(instance())
    assert await registrar.registered(5)
    await until(lambda: "decode-0" in seen)
    assert await registrar.set_state("draining")
    await until(lambda: seen["decode-0"].state == "draining")
    await registrar.leave("done")
    await until(lambda: not seen)
    assert controller.ids() == []
    assert watcher.members == []


async def test_lease_is_kept_by_renewals_and_ends_without_them(house: House) -> None:
    controller = house.controller(ttl_s=0.3)
    _, seen = house.watcher()
    registrar = house.registrar(instance())
    await until(lambda: "decode-0" in seen)
    for _ in range(100):
        assert controller.ids() == [("decode-0", 1, "ready")]
        await asyncio.sleep(0.01)
    await registrar.close()
    await until(lambda: not controller.ids())
    await until(lambda: not seen)


async def test_a_silent_holder_is_told_late_and_its_lease_ends_once_its_node_does_not_answer(
    house: House,
) -> None:
    controller = house.controller(ttl_s=4.0)
    _, seen = house.watcher()
    registrar = house.registrar(instance())
    await until(lambda: "decode-0" in seen)
    controller.registry.unreachable(["decode-0"])
    assert controller.ids() == [("decode-0", 1, "ready")], "it still renews"
    await registrar.close()
    await until(lambda: controller.late[-1:] == [frozenset({"decode-0"})])
    assert controller.ids() == [("decode-0", 1, "ready")], "late is not ended"
    controller.registry.unreachable(["decode-0"])
    assert controller.ids() == []
    await until(lambda: not seen)


async def test_superseded_incarnation_is_told(house: House) -> None:
    controller = house.controller(ttl_s=0.3)
    told = asyncio.Event()
    house.registrar(instance(1), told.set)
    await until(lambda: bool(controller.ids()))
    house.registrar(instance(2))
    await asyncio.wait_for(told.wait(), 5)
    assert controller.ids() == [("decode-0", 2, "ready")]


async def test_superseded_incarnation_is_told_by_a_restarted_controller(house: House) -> None:
    first = house.controller(ttl_s=0.3)
    told = asyncio.Event()
    registrar = house.registrar(instance(1), told.set)
    assert await registrar.registered(5)
    await first.close()
    second = house.controller(ttl_s=0.3)
    second.registry.set_current("decode-0", 2)
    await asyncio.wait_for(told.wait(), 10)
    assert second.ids() == []


async def test_watcher_keeps_its_view_while_the_registry_is_away_and_after_it_is_back(house: House) -> None:
    first = house.controller(ttl_s=1.0)
    watcher, seen = house.watcher()
    living = house.registrar(instance(seat="decode-0"))
    dying = house.registrar(instance(seat="decode-1"))
    await until(lambda: len(seen) == 2)
    await first.close()
    await dying.close()
    await asyncio.sleep(0.3)
    assert len(seen) == 2
    second = house.controller(ttl_s=1.0)
    await until(lambda: second.registry.complete())
    await until(lambda: list(seen) == ["decode-0"])
    assert [m.instance.id for m in watcher.members] == ["decode-0"]
    await living.close()


async def test_process_known_to_have_ended_loses_its_lease_at_once(house: House) -> None:
    controller = house.controller(ttl_s=60)
    _, seen = house.watcher()
    registrar = house.registrar(instance())
    await until(lambda: "decode-0" in seen)
    await registrar.close()
    controller.registry.gone("decode-0", 1)
    await until(lambda: not seen)


async def test_registrar_started_before_the_registry_gets_its_lease(house: House) -> None:
    await house.controller().close()
    registrar = house.registrar(instance())
    assert not await registrar.registered(0.2)
    controller = house.controller()
    assert await registrar.registered(10)
    assert controller.ids() == [("decode-0", 1, "ready")]


async def test_leaving_a_registry_that_is_away_ends(house: House) -> None:
    controller = house.controller()
    registrar = house.registrar(instance())
    assert await registrar.registered(5)
    await controller.close()
    await registrar.leave("done", deadline_s=0.2)


async def test_unknown_op_and_wrong_body_are_errors(house: House) -> None:
    house.controller()
    client = house.client()
    with pytest.raises(DiscoveryError, match="unknown op"):
        await client.call("registry.nonsense", None, LeaseReply, 5)
    with pytest.raises(CodecError, match="not a Renew"):
        await client.call("registry.renew", None, LeaseReply, 5)


async def test_a_process_of_another_protocol_is_refused_with_a_word(house: House) -> None:
    controller = house.controller()
    other = msgspec.structs.replace(instance(), protocol=99)
    with pytest.raises(DiscoveryError, match="decode-0 speaks protocol 99"):
        await house.client().call("registry.register", Register(instance=other), LeaseReply, 5)
    assert controller.ids() == []


async def test_broken_listener_stops_neither_side(house: House, caplog: pytest.LogCaptureFixture) -> None:
    controller = house.controller()
    calls: list[int] = []

    def on_change(upserts: list[Member], removed: list[str]) -> None:
        calls.append(1)
        raise ValueError

    watcher = Watcher(house.keys, house.client(), house.membership, on_change=on_change)
    watcher.start()
    house.registrar(instance(seat="a"))
    await until(lambda: len(calls) == 1)
    house.registrar(instance(seat="b"))
    await until(lambda: len(calls) == 2)
    assert "membership.listener_failed" in caplog.text
    await watcher.close()
    assert len(controller.ids()) == 2


async def test_malformed_change_is_dropped(house: House, caplog: pytest.LogCaptureFixture) -> None:
    class Other(msgspec.Struct):
        nothing: int = 0

    controller = house.controller()
    _, seen = house.watcher()
    house.registrar(instance(seat="a"))
    await until(lambda: "a" in seen)
    controller._publisher.publish(b"members", Other())
    house.registrar(instance(seat="b"))
    await until(lambda: "b" in seen)
    assert "membership.malformed" in caplog.text
