"""The order of an engine's batches: gaps, replays, restarts."""

from __future__ import annotations

import msgspec
import pytest

from dynctl.transport.engine_order import Action, AskReplay, Deliver, EngineOrder, Reset


def batch(timestamp: float, text: str = "") -> bytes:
    return msgspec.msgpack.encode([timestamp, [text], 0])


def delivered(actions: list[Action]) -> list[int]:
    return [action.seq for action in actions if isinstance(action, Deliver)]


def started(*, replayed: int = 0) -> EngineOrder:
    """An order that is live, with `replayed` batches behind it."""
    order = EngineOrder(can_replay=True)
    assert order.start() == [AskReplay(0)]
    for seq in range(replayed):
        order.replayed(seq, batch(seq))
    assert order.replay_ended() == []
    return order


def test_live_batches_wait_for_the_first_replay_and_are_not_doubled() -> None:
    order = EngineOrder(can_replay=True)
    order.start()
    assert order.live(1, batch(1)) == []
    assert order.live(2, batch(2)) == []
    assert delivered(order.replayed(0, batch(0))) == [0]
    assert delivered(order.replayed(1, batch(1))) == [1]
    assert delivered(order.replay_ended()) == [2]
    assert order.next == 3


def test_starting_twice_asks_once() -> None:
    order = EngineOrder(can_replay=True)
    assert order.start() == [AskReplay(0)]
    assert order.start() == []


def test_gap_triggers_replay_from_the_first_missing() -> None:
    order = started(replayed=2)
    assert order.live(4, batch(4)) == [AskReplay(2)]
    assert delivered(order.replayed(2, batch(2))) == [2]
    assert delivered(order.replayed(3, batch(3))) == [3]
    assert delivered(order.replayed(4, batch(4))) == [4]
    assert order.live(5, batch(5)) == []
    assert delivered(order.replay_ended()) == [5]


def test_gap_older_than_what_is_kept_resets() -> None:
    order = started(replayed=2)
    order.live(9, batch(9))
    actions = order.replayed(7, batch(7))
    assert actions == [Reset("batches 2 to 6 are gone"), Deliver(7, batch(7))]
    assert delivered(order.replayed(8, batch(8))) == [8]
    assert delivered(order.replay_ended()) == [9]


def test_first_replay_that_begins_late_is_a_visible_reset() -> None:
    order = EngineOrder(can_replay=True)
    order.start()
    assert order.replayed(5, batch(5)) == [Reset("batches 0 to 4 are gone"), Deliver(5, batch(5))]


def test_repeat_is_dropped() -> None:
    order = started(replayed=3)
    assert order.live(1, batch(1)) == []
    assert order.live(2, batch(2)) == []


def test_lower_number_with_newer_time_is_a_restart() -> None:
    order = started(replayed=3)
    actions = order.live(0, batch(100))
    assert isinstance(actions[0], Reset)
    assert delivered(actions) == [0]
    assert order.next == 1


def test_restart_noticed_late_replays_from_zero() -> None:
    order = started(replayed=10)
    actions = order.live(4, batch(100))
    assert isinstance(actions[0], Reset)
    assert actions[1] == AskReplay(0)
    for seq in range(5):
        assert delivered(order.replayed(seq, batch(96 + seq))) == [seq]
    assert order.replay_ended() == []
    assert order.next == 5


def test_payload_without_a_time_is_no_restart() -> None:
    order = started(replayed=2)
    assert order.live(0, b"\xc1") == []


def test_hole_inside_a_replay_asks_again() -> None:
    order = EngineOrder(can_replay=True)
    order.start()
    order.replayed(0, batch(0))
    assert order.replayed(3, batch(3)) == []
    assert order.replayed(4, batch(4)) == []
    assert order.replay_ended() == [AskReplay(1)]
    assert delivered(order.replayed(1, batch(1))) == [1]


def test_replay_without_an_end_is_tried_again_then_given_up() -> None:
    order = started(replayed=1)
    order.live(5, batch(5))
    assert order.replay_failed() == [AskReplay(1)]
    assert order.replay_failed() == [AskReplay(1)]
    assert order.replay_failed() == [Reset("batches 1 to 4 are gone"), Deliver(5, batch(5))]
    assert not order.replaying


def test_replay_given_up_with_nothing_waiting_goes_live() -> None:
    order = EngineOrder(can_replay=True)
    order.start()
    for _ in range(3):
        order.replay_failed()
    assert not order.replaying
    assert delivered(order.live(0, batch(0))) == [0]


def test_progress_of_a_cut_replay_counts() -> None:
    order = EngineOrder(can_replay=True)
    order.start()
    for seq in range(20):
        assert delivered(order.replayed(seq, batch(seq))) == [seq]
        assert order.replay_failed() == [AskReplay(seq + 1)]


def test_replay_that_gives_nothing_for_a_gap_resets() -> None:
    order = started(replayed=1)
    order.live(5, batch(5))
    assert order.replay_ended() == [Reset("batches 1 to 4 are gone"), Deliver(5, batch(5))]


def test_replay_of_only_old_batches_does_not_loop() -> None:
    order = started(replayed=3)
    order.live(5, batch(5))
    assert order.replayed(1, batch(1)) == []
    assert order.replay_ended() == [Reset("batches 3 to 4 are gone"), Deliver(5, batch(5))]


def test_second_gap_behind_a_replay_is_replayed_too() -> None:
    order = started(replayed=1)
    order.live(2, batch(2))
    order.live(4, batch(4))
    order.replayed(1, batch(1))
    actions = order.replay_ended()
    assert actions == [Deliver(2, batch(2)), AskReplay(3)]
    assert delivered(order.replayed(3, batch(3))) == [3]
    assert delivered(order.replay_ended()) == [4]


def test_without_a_replay_socket_a_gap_resets_at_once() -> None:
    order = EngineOrder(can_replay=False)
    assert order.start() == []
    assert delivered(order.live(0, batch(0))) == [0]
    assert order.live(3, batch(3)) == [Reset("batches 1 to 2 are gone"), Deliver(3, batch(3))]


@pytest.mark.parametrize("late", ["replayed", "replay_ended", "replay_failed"])
def test_answers_when_no_replay_runs_are_ignored(late: str) -> None:
    order = started(replayed=1)
    actions = {
        "replayed": lambda: order.replayed(1, batch(1)),
        "replay_ended": order.replay_ended,
        "replay_failed": order.replay_failed,
    }[late]()
    assert actions == []
    assert order.next == 1
