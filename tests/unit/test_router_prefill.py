from __future__ import annotations

from dynctl.engines.base import Handoff
from dynctl.router.prefill import HandoffGuard, Refused

HANDOFF = Handoff(params={"remote_port": 1}, expires_at_s=100.0)


def test_handoff_is_given_out_once() -> None:
    guard = HandoffGuard(HANDOFF, b"prompt")
    assert guard.take(b"prompt", 10.0) is HANDOFF
    assert guard.take(b"prompt", 10.0) == Refused("used")


def test_other_prompt_gets_nothing_and_spoils_nothing() -> None:
    guard = HandoffGuard(HANDOFF, b"prompt")
    assert guard.take(b"another", 10.0) == Refused("other prompt")
    assert guard.take(b"prompt", 10.0) is HANDOFF


def test_handoff_ends_before_its_lease_does() -> None:
    guard = HandoffGuard(HANDOFF, b"prompt", margin_s=2.0)
    assert guard.take(b"prompt", 98.0) == Refused("expired")
    assert guard.take(b"prompt", 97.9) is HANDOFF
