"""The queue before routing: whose turn it is, when it is full, and that nobody starves."""

from __future__ import annotations

from random import Random

import pytest

from dynctl.errors import Overloaded
from dynctl.frontend.queue import LONGEST_RETRY_S, Ask, Place, Queue
from dynctl.protocol.specs import QueueSpec


def queue(policy: str = "fcfs", **fields: int) -> Queue:
    return Queue(QueueSpec(policy=policy, **fields))


def turns(some: Queue) -> list[Place]:
    places = []
    while (place := some.next(0.0)) is not None:
        places.append(place)
    return places


def test_first_come_first_served() -> None:
    some = queue()
    places = [some.join(Ask(), now_s=float(number)) for number in range(9)]
    assert turns(some) == places


def test_a_step_of_priority_is_worth_a_second() -> None:
    some = queue()
    early = some.join(Ask(), 10.0)
    soon = some.join(Ask(priority=2), 11.0)
    late = some.join(Ask(priority=2), 13.0)
    assert turns(some) == [soon, early, late]


def test_the_shortest_work_goes_first_cached_tokens_being_none() -> None:
    some = queue("shortest")
    long = some.join(Ask(tokens=4000), 0.0)
    cached = some.join(Ask(tokens=8000, cached=7990), 1.0)
    short = some.join(Ask(tokens=100), 2.0)
    assert turns(some) == [cached, short, long]


def test_priority_weighs_against_length() -> None:
    some = queue("shortest")
    short = some.join(Ask(tokens=100, priority=-2), 0.0)
    long = some.join(Ask(tokens=1000, priority=99), 1.0)
    assert turns(some) == [long, short]


@pytest.mark.parametrize("policy", ["fcfs", "shortest"])
def test_nobody_starves_while_better_requests_keep_coming(policy: str) -> None:
    some = queue(policy)
    for _ in range(5):
        some.join(Ask(tokens=10), 0.0)
    poor = some.join(Ask(tokens=100_000, priority=-1000), 0.0)
    turns_of_others = 0
    while turns_of_others < 10_000:
        some.join(Ask(tokens=1, priority=1000), 0.0)
        turns_of_others += 1
        if some.next(0.0) is poor:
            break
    assert turns_of_others <= 6 * 4


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    some = queue(limit=10)
    for _ in range(10):
        some.join(Ask(), 0.0)
    for turn in range(8):
        some.next(0.5 * turn)
        some.join(Ask(), 0.5 * turn)
    with pytest.raises(Overloaded, match="10 requests wait") as refused:
        some.join(Ask(), 4.0)
    assert 3.0 < refused.value.retry_after_s < 9.0
    assert some.next(4.0)
    some.join(Ask(), 4.0)


def test_the_wait_that_is_told_has_bounds() -> None:
    some = queue()
    assert some.retry_after_s() == 1.0
    for _ in range(4000):
        some.join(Ask(), 0.0)
    some.next(1000.0)
    assert some.retry_after_s() == LONGEST_RETRY_S


def test_tokens_have_a_limit_but_one_long_prompt_may_wait_alone() -> None:
    some = queue(limit_tokens=100)
    some.join(Ask(tokens=1000), 0.0)
    with pytest.raises(Overloaded, match="1000 prompt tokens"):
        some.join(Ask(tokens=1), 0.0)


def test_who_leaves_frees_the_place_and_gets_no_turn() -> None:
    some = queue(limit=2)
    first, second = some.join(Ask(tokens=7), 0.0), some.join(Ask(tokens=8, cached=3), 0.0)
    some.leave(first)
    some.leave(first)
    assert (some.waiting.requests, some.waiting.tokens, some.waiting.cached) == (1, 8, 3)
    third = some.join(Ask(), 0.0)
    assert turns(some) == [second, third]
    some.leave(second)
    assert some.waiting.requests == 0


@pytest.mark.parametrize("policy", ["fcfs", "shortest"])
def test_those_who_left_take_no_memory(policy: str) -> None:
    some = queue(policy)
    for _ in range(10_000):
        some.leave(some.join(Ask(), 0.0))
    assert len(some._ranked) < 200
    assert len(some._by_arrival) < 200


@pytest.mark.parametrize("policy", ["fcfs", "shortest"])
def test_those_who_had_their_turn_take_no_memory_while_others_wait(policy: str) -> None:
    some = queue(policy)
    for step in range(10_000):
        some.join(Ask(tokens=1000 if step % 4 == 0 else 1), float(step))
        if step > 20:
            some.next(float(step))
    assert some.waiting.requests > 10
    assert len(some._ranked) < 200
    assert len(some._by_arrival) < 200


@pytest.mark.parametrize("policy", ["fcfs", "shortest"])
def test_every_place_gets_exactly_one_turn_or_is_left(policy: str) -> None:
    rng, some = Random(3), queue(policy)
    waiting: list[Place] = []
    had: list[Place] = []
    left: list[Place] = []
    for step in range(3000):
        kind = rng.random()
        if kind < 0.5:
            waiting.append(some.join(Ask(rng.randrange(100), 0, rng.randrange(5)), step * 0.1))
        elif kind < 0.7 and waiting:
            left.append(waiting.pop(rng.randrange(len(waiting))))
            some.leave(left[-1])
        elif (place := some.next(step * 0.1)) is not None:
            waiting.remove(place)
            had.append(place)
    had += turns(some)
    assert len(had) == len({id(place) for place in had})
    assert not {id(place) for place in had} & {id(place) for place in left}
    assert some.waiting.requests == some.waiting.tokens == 0
