"""The engine's state as one metrics page."""

from __future__ import annotations

from dynctl.mocker.engine import SimulatedEngine
from dynctl.mocker.leases import REASONS
from dynctl.mocker.metrics import Page, escape
from dynctl.mocker.rank import Rank


def metrics_page(engine: SimulatedEngine) -> bytes:
    """Prometheus text: vLLM's names, and `dynctl_mocker_*` for what only the mocker has."""
    page = Page()
    model = escape(engine.serving.model)
    for rank in engine.ranks:
        labels = f'engine="{rank.number}",model_name="{model}"'
        _rank(page, rank, labels)
        _configuration(page, rank, labels)
    _transfers(page, engine, model)
    page.value("counter", "dynctl_mocker_lost_event_batches_total", "", engine.faults.lost_batches)
    return page.text()


def _rank(page: Page, rank: Rank, labels: str) -> None:
    scheduler = rank.scheduler
    counters = scheduler.counters
    waiting = len(scheduler.waiting) + len(scheduler.receiving)
    page.value("gauge", "vllm:num_requests_running", labels, len(scheduler.running))
    page.value("gauge", "vllm:num_requests_waiting", labels, waiting)
    page.value("gauge", "vllm:kv_cache_usage_perc", labels, scheduler.pool.usage)
    for name, value in (
        ("vllm:num_preemptions_total", counters.preemptions),
        ("vllm:prefix_cache_queries_total", counters.prefix_queries),
        ("vllm:prefix_cache_hits_total", counters.prefix_hits),
        ("vllm:external_prefix_cache_queries_total", counters.external_queries),
        ("vllm:external_prefix_cache_hits_total", counters.external_hits),
        ("vllm:prompt_tokens_total", counters.prompt),
        ("vllm:prompt_tokens_cached_total", counters.prefix_hits),
        ("vllm:generation_tokens_total", counters.generated),
        ("vllm:nixl_num_kv_expired_reqs_total", scheduler.pins.expired),
    ):
        page.value("counter", name, labels, value)
    for source, value in (
        ("local_compute", counters.local_compute),
        ("local_cache_hit", counters.prefix_hits),
        ("external_kv_transfer", counters.external_hits),
    ):
        page.value("counter", "vllm:prompt_tokens_by_source_total", f'{labels},source="{source}"', value)
    for reason, value in counters.finished.items():
        page.value("counter", "vllm:request_success_total", f'{labels},finished_reason="{reason}"', value)
    for name, histogram in rank.latencies.named().items():
        page.histogram(name, labels, histogram)


def _configuration(page: Page, rank: Rank, labels: str) -> None:
    pool = rank.scheduler.pool
    facts = (
        f'block_size="{pool.block_size}",enable_prefix_caching="{pool.caching}",num_gpu_blocks="{pool.count}"'
    )
    page.value("gauge", "vllm:cache_config_info", f"{labels},{facts}", 1)


def _transfers(page: Page, engine: SimulatedEngine, model: str) -> None:
    pinned = sum(len(rank.scheduler.pins) for rank in engine.ranks)
    page.value("gauge", "dynctl_mocker_pinned_requests", f'model_name="{model}"', pinned)
    name = "dynctl_mocker_transfer_violations_total"
    for side, counts in (
        ("prefill", engine.prefill_side.violations),
        ("decode", engine.decode_side.violations),
    ):
        for reason in REASONS:
            labels = f'model_name="{model}",side="{side}",reason="{reason}"'
            page.value("counter", name, labels, counts[reason])
