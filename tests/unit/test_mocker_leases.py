"""Blocks kept for decode: given once, for their prompt, until the lease ends."""

from __future__ import annotations

import pytest

from dynctl.mocker.leases import Pin, PinBoard, TransferRefused


def board(**given: int) -> PinBoard:
    pins = PinBoard(lease_s=30.0, **given)
    pins.add("r", Pin([1, 2], 20, "d", deadline_s=30.0))
    return pins


def refusal(pins: PinBoard, request_id: str = "r", digest: str = "d", now_s: float = 1.0) -> str:
    with pytest.raises(TransferRefused) as caught:
        pins.claim(request_id, digest, now_s)
    return caught.value.reason


def test_a_claim_in_time_for_the_right_prompt_is_granted_and_released_blocks_come_back() -> None:
    pins = board()
    assert pins.claim("r", "d", 29.9).tokens == 20
    assert pins.release("r") == [1, 2]
    assert pins.release("r") == []
    assert len(pins) == 0


def test_parameters_are_good_for_one_use() -> None:
    pins = board()
    pins.claim("r", "d", 1.0)
    assert refusal(pins) == "reused"
    pins.release("r")
    assert refusal(pins) == "reused"


def test_another_prompt_is_refused_and_leaves_the_blocks_claimable() -> None:
    pins = board()
    assert refusal(pins, digest="other") == "prompt"
    assert pins.claim("r", "d", 1.0).blocks == [1, 2]


def test_an_unknown_request_is_refused() -> None:
    assert refusal(board(), "nobody") == "unknown"


def test_an_ended_lease_is_refused_before_and_after_the_blocks_are_freed() -> None:
    pins = board()
    assert refusal(pins, now_s=30.0) == "expired"
    assert pins.expire(29.9) == []
    assert pins.expire(30.0) == [[1, 2]]
    assert pins.expired == 1
    assert refusal(pins, now_s=31.0) == "expired"


def test_a_sign_of_life_prolongs_by_two_thirds_and_never_shortens() -> None:
    pins = board()
    assert pins.renew("r", 5.0)
    assert pins.next_deadline_s() == 30.0
    assert pins.renew("r", 25.0)
    assert pins.next_deadline_s() == 45.0
    assert not pins.renew("nobody", 1.0)
    pins.release("r")
    assert pins.next_deadline_s() is None


def test_only_the_last_ones_that_are_gone_are_remembered() -> None:
    pins = board(memory=1)
    pins.add("s", Pin([3], 1, "d", deadline_s=30.0))
    pins.release("r")
    pins.release("s")
    assert refusal(pins, "r") == "unknown"
    assert refusal(pins, "s") == "reused"
