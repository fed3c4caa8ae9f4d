from __future__ import annotations

import pytest

from dynctl.errors import PlacementError
from dynctl.topology.ports import FIRST_PORT, LAST_PORT, PortAllocator, first_port_of


def test_blocks_are_consecutive_and_per_node() -> None:
    ports = PortAllocator()
    assert ports.allocate(["a"], 3) == FIRST_PORT
    assert ports.allocate(["b"]) == FIRST_PORT
    assert ports.allocate(["a", "b"], 2) == FIRST_PORT + 3
    assert ports.allocate(["b"]) == FIRST_PORT + 1
    assert ports.given("b") == tuple(FIRST_PORT + i for i in (0, 1, 3, 4))


def test_taken_ports_are_stepped_over() -> None:
    ports = PortAllocator({("a", FIRST_PORT + 1), ("a", FIRST_PORT + 3), ("b", FIRST_PORT)})
    assert ports.allocate(["a"], 2) == FIRST_PORT + 4
    assert ports.allocate(["a"]) == FIRST_PORT
    assert ports.given("b") == ()


def test_a_named_port_is_given_once() -> None:
    ports = PortAllocator({("a", 80)})
    assert not ports.take("a", 80)
    assert ports.take("a", 8000)
    assert not ports.take("a", 8000)
    assert ports.take("b", 8000)


def test_ports_run_out() -> None:
    ports = PortAllocator()
    ports.allocate(["a"], LAST_PORT - FIRST_PORT + 1)
    with pytest.raises(PlacementError, match="no 1 consecutive ports are free on a"):
        ports.allocate(["a"])
    with pytest.raises(PlacementError):
        ports.allocate(["b"], LAST_PORT)


def test_deployments_unknown_to_each_other_start_at_different_ports() -> None:
    firsts = {first_port_of(f"run-{i}") for i in range(40)}
    assert len(firsts) > 20
    assert all(FIRST_PORT <= port < LAST_PORT for port in firsts)


def test_the_search_wraps_to_the_start_of_the_range() -> None:
    ports = PortAllocator({("a", p) for p in range(32000, LAST_PORT + 1)}, first=32000)
    assert ports.allocate(["a"]) == FIRST_PORT


def test_a_long_search_goes_on_where_the_last_ended_and_finds_the_same() -> None:
    taken = {("a", FIRST_PORT + i) for i in range(0, 40, 3)}
    ports = PortAllocator(taken)
    found = [ports.allocate(["a"], count) for count in (2, 1, 2, 1, 3, 1, 2)]
    held: set[int] = {port for _, port in taken}
    for first, count in zip(found, (2, 1, 2, 1, 3, 1, 2), strict=True):
        free = (p for p in range(FIRST_PORT, LAST_PORT) if held.isdisjoint(range(p, p + count)))
        assert first == next(free)
        held.update(range(first, first + count))
