from __future__ import annotations

from dynctl.frontend.series import Choices, Stages
from dynctl.observability.metrics import Metrics
from dynctl.observability.tracing import UNRECORDED
from dynctl.router.active import Footprint, RankLoad
from dynctl.router.request import Choice
from dynctl.router.shared import SharedBlocks
from tests.workers import worker_instance


def choice(overlap: int, best: int) -> Choice:
    return Choice(worker_instance(), 0, overlap, 2, RankLoad(SharedBlocks()).add(Footprint()), best)


def test_regret_is_what_the_best_worker_had_beyond_the_chosen_one() -> None:
    metrics = Metrics(own={"router_id": "f"})
    choices = Choices(metrics)
    choices.overlap("prefill", choice(2, 8), 10, 16)
    choices.overlap("prefill", choice(8, 8), 10, 16)
    text = metrics.render().decode()
    assert 'kv_selected_cached_prefix_tokens_total{router_id="f"} 160.0' in text
    assert 'kv_best_eligible_cached_prefix_tokens_total{router_id="f"} 256.0' in text
    assert 'non_max_overlap_selections_total{router_id="f",worker_type="prefill"} 1.0' in text
    assert 'overlap_blocks_lost_sum{router_id="f",worker_type="prefill"} 6.0' in text
    assert 'kv_hit_rate_sum{router_id="f"} 1.0' in text


def test_a_stage_counts_who_is_in_it_and_how_long_they_were() -> None:
    metrics = Metrics()
    stages = Stages(metrics)
    with stages.enter("dispatch", UNRECORDED, "decode"):
        assert metrics.gauge("stage_requests", stage="dispatch", phase="decode").value == 1
    assert metrics.gauge("stage_requests", stage="dispatch", phase="decode").value == 0
    assert sum(metrics.histogram("stage_duration_seconds", stage="dispatch").counts) == 1
