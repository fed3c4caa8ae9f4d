"""How long the sidecar waits between two polls of an engine's events."""

from __future__ import annotations

import pytest

from dynctl.worker.kv_poll import pause_s


@pytest.mark.parametrize(
    ("failures", "pause"), [(0, 0.025), (1, 0.05), (2, 0.1), (6, 1.6), (7, 2.0), (10**6, 2.0)]
)
def test_failures_in_a_row_make_pauses_longer(failures: int, pause: float) -> None:
    assert pause_s(0.025, failures) == pytest.approx(pause)
