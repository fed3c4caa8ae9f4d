"""Every metric of the serving tower: name, type, labels, help and buckets.

Names, labels and buckets are those documented of Dynamo's frontend (`dynamo_frontend_*`) and of its router
(`dynamo_component_router_*`, `dynamo_router_overhead_*_ms`) where it has the metric, so that with the prefix
`dynamo` what is asked of it can be asked here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


def log_buckets(low: float, high: float, count: int) -> tuple[float, ...]:
    """`count` upper bounds: 0, then up to `high` evenly spaced in the logarithm from `low`.

    Two significant figures each, and 0 in the place of `low`, as Dynamo's are.
    """
    ratio = (high / low) ** (1 / (count - 1))
    return (0.0, *(float(f"{low * ratio**i:.1e}") for i in range(1, count)))


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the catalogue; counters end in `_total`. In the exposition: prefix, `scope`, `name`."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    scope: str = "frontend_"


_MODEL = ("model",)
_RANK = ("worker", "rank")
_WORKER = ("worker_id", "dp_rank", "worker_type")
_QUEUE = ("model", "worker_type", "policy_class")
_ROUTER = ("router_id",)
_RATIO = tuple(i / 20 for i in range(21))
_TTFT_S = log_buckets(0.001, 480, 18)
_ITL_S = log_buckets(0.001, 80, 20)
_TPOT_S = tuple(float(f"{10 ** (i / 24):.2e}") for i in range(-72, 25))
"""A tenth from one to the next, 1 ms to 10 s: what is asked of it is told to a few per cent."""
_INPUT_TOKENS = log_buckets(50, 128_000, 12)
_OUTPUT_TOKENS = log_buckets(50, 32_000, 10)
_STAGE_S = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0)
_OVERHEAD_MS = tuple(float(f"{0.01 * 3**i:.6g}") for i in range(17))

_REQUESTS: tuple[Metric, ...] = (
    Metric(
        "requests_total",
        "counter",
        "Requests ended. status: success or error; error_type: empty, validation, unauthorized, not_found, "
        "overload, unavailable, cancelled, response_timeout, engine, internal. Model and endpoint are empty "
        "where a request named none that is served.",
        ("model", "endpoint", "request_type", "status", "error_type"),
    ),
    Metric("requests_started_total", "counter", "Requests begun.", ("model", "endpoint", "request_type")),
    Metric("active_requests", "gauge", "Requests, from their last byte to the last of the answer.", _MODEL),
    Metric("inflight_requests", "gauge", "Requests being worked on: active_requests' older name.", _MODEL),
    Metric("queued_requests", "gauge", "Requests of which nothing has been answered yet.", _MODEL),
    Metric("disconnected_clients", "gauge", "Clients that went away before their answer had ended, ever."),
    Metric("connections", "gauge", "Client connections open."),
    Metric(
        "http_refusals_total",
        "counter",
        "Requests refused for their HTTP alone: malformed, too large, too slow, a connection too many.",
        ("code",),
    ),
    Metric("stage_requests", "gauge", "Requests in a stage now.", ("stage", "phase")),
    Metric(
        "stage_duration_seconds",
        "histogram",
        "Time in a stage: preprocess, route, dispatch (sent until the first byte).",
        ("stage",),
        _STAGE_S,
    ),
    Metric(
        "model_cancellation_total",
        "counter",
        "Requests cancelled by their client.",
        ("model", "endpoint", "request_type"),
    ),
    Metric(
        "model_rejection_total",
        "counter",
        "Requests refused for want of a worker or of room.",
        ("model", "endpoint"),
    ),
)

_LATENCY: tuple[Metric, ...] = (
    Metric(
        "request_duration_seconds",
        "histogram",
        "From the request's last byte to the answer's last byte.",
        _MODEL,
        log_buckets(1, 512, 10),
    ),
    Metric(
        "time_to_first_token_seconds",
        "histogram",
        "From the request's last byte to the first byte of a streamed answer.",
        _MODEL,
        _TTFT_S,
    ),
    Metric(
        "inter_token_latency_seconds", "histogram", "Between two tokens of a streamed answer.", _MODEL, _ITL_S
    ),
    Metric(
        "time_per_output_token_seconds",
        "histogram",
        "Mean time between the tokens of a streamed answer, one for each answer: what `sla.itl` is about.",
        _MODEL,
        _TPOT_S,
    ),
    Metric("embedding_latency_seconds", "histogram", "Requests for embeddings, whole.", _MODEL, _TTFT_S),
    Metric("prefill_seconds", "histogram", "The prefill leg, whole.", _MODEL, _TTFT_S),
)

_TOKENS: tuple[Metric, ...] = (
    Metric(
        "input_sequence_tokens",
        "histogram",
        "Tokens of a prompt, where the frontend knows them.",
        _MODEL,
        _INPUT_TOKENS,
    ),
    Metric(
        "output_sequence_tokens",
        "histogram",
        "Tokens of an answer: the engine's usage when it is in the answer, else the events streamed.",
        _MODEL,
        _OUTPUT_TOKENS,
    ),
    Metric(
        "output_tokens_total", "counter", "Tokens of all answers, counted as output_sequence_tokens.", _MODEL
    ),
    Metric(
        "cached_tokens",
        "histogram",
        "Prompt tokens the engine had in its cache, where its usage tells.",
        _MODEL,
        _INPUT_TOKENS,
    ),
    Metric(
        "template_seconds",
        "histogram",
        "Rendering the chat template.",
        (),
        (0.00001, 0.00005, 0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05),
    ),
    Metric(
        "tokenize_seconds",
        "histogram",
        "Tokenising a prompt.",
        (),
        (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0),
    ),
    Metric(
        "tokenizer_latency_ms",
        "histogram",
        "Work of the tokenizer; operation: tokenize.",
        ("operation",),
        tuple(float(2**i) for i in range(-1, 10)),
    ),
    Metric("tokenize_fallbacks_total", "counter", "Prompts routed without tokens, and why.", ("reason",)),
    Metric("tokenizer_cache_hits_total", "counter", "Prompts of which a part had been tokenised before."),
    Metric("tokenizer_cache_misses_total", "counter", "Prompts of which no part had been tokenised before."),
    Metric("tokenizer_cache_cached_tokens_total", "counter", "Tokens taken from the token cache."),
    Metric("tokenizer_cache_uncached_tokens_total", "counter", "Tokens that had to be made."),
    Metric(
        "event_loop_delay_seconds",
        "histogram",
        "How much later than asked a timer of the event loop goes off.",
        (),
        (0.0, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0),
    ),
    Metric("event_loop_stall_total", "counter", "Timers that went off more than 5 ms late."),
)

_CARD: tuple[Metric, ...] = (
    Metric("model_ready", "gauge", "1 when the model has the workers it needs.", _MODEL),
    Metric("model_total_kv_blocks", "gauge", "KV blocks of one worker (rank), as it reports them.", _MODEL),
    Metric("model_context_length", "gauge", "Tokens of prompt and answer together, at most.", _MODEL),
    Metric("model_kv_cache_block_size", "gauge", "Tokens of a KV block.", _MODEL),
    Metric("model_migration_limit", "gauge", "How often one request may migrate.", _MODEL),
    Metric("lora_adapters", "gauge", "LoRA adapters that requests may name.", _MODEL),
)

_FAULTS: tuple[Metric, ...] = (
    Metric(
        "model_migration_total",
        "counter",
        "Requests that went on elsewhere. migration_type: new_request (nothing was said yet), "
        "ongoing_request.",
        ("model", "migration_type"),
    ),
    Metric(
        "model_migration_duration_seconds",
        "histogram",
        "From the failure seen to the next token. outcome: success, failure, cancelled.",
        ("model", "migration_type", "outcome"),
        _TTFT_S,
    ),
    Metric(
        "model_migration_max_seq_len_exceeded_total",
        "counter",
        "Requests too long to be migrated.",
        _MODEL,
    ),
    Metric("retries_total", "counter", "Attempts made again on another worker, and why.", ("reason",)),
    Metric(
        "retries_refused_total", "counter", "Attempts not made again: too many were, of late.", ("reason",)
    ),
    Metric(
        "circuit_state",
        "gauge",
        "0 closed; 2 open: the worker failed and gets no requests; 1 half open: one is tried.",
        ("worker",),
    ),
    Metric("circuit_opened_total", "counter", "Times a worker was left alone: it had failed.", ("worker",)),
    Metric("upstream_failures_total", "counter", "Failed calls to a worker's engine.", ("worker", "reason")),
    Metric("trace_spans_total", "counter", "Spans for the collector; outcome: sent, dropped.", ("outcome",)),
    Metric("handoffs_refused_total", "counter", "Prefill answers not given to decode, and why.", ("reason",)),
)

_WORKERS: tuple[Metric, ...] = (
    Metric("worker_active_decode_blocks", "gauge", "KV blocks of the requests a worker has.", _WORKER),
    Metric("worker_active_prefill_tokens", "gauge", "Prompt tokens a worker has yet to compute.", _WORKER),
    Metric(
        "worker_last_time_to_first_token_seconds", "gauge", "Of the last stream that began there.", _WORKER
    ),
    Metric("worker_last_input_sequence_tokens", "gauge", "Prompt of that same stream.", _WORKER),
    Metric(
        "worker_last_inter_token_latency_seconds",
        "gauge",
        "Mean of the last stream that ended there.",
        _WORKER,
    ),
    Metric("router_choices_total", "counter", "Requests given to a worker.", ("role", "worker")),
    Metric(
        "router_choice_seconds",
        "histogram",
        "Choosing a worker.",
        (),
        (0.00001, 0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.1),
    ),
    Metric("start_wait_seconds", "gauge", "Waited for the membership and KV indexes before listening."),
    Metric("start_unsynced_ranks", "gauge", "Ranks of workers without a synced KV index at that time."),
    Metric("router_peers", "gauge", "Other frontends whose requests in flight are known."),
    Metric("router_peer_requests", "gauge", "Requests another frontend has in flight.", ("peer",)),
    Metric("router_peer_missed_total", "counter", "Messages of it that were lost, or late.", ("peer",)),
    Metric("router_workers", "gauge", "Workers that may be given requests.", ("role",)),
    Metric("router_worker_requests", "gauge", "Requests a worker has, ours and those it reports.", _RANK),
    Metric("router_worker_running", "gauge", "Requests its engine works on, as it says.", _RANK),
    Metric("router_worker_waiting", "gauge", "Requests that wait in its engine, as it says.", _RANK),
    Metric("router_worker_kv_usage", "gauge", "Part of its KV blocks in use, 0 to 1, as it says.", _RANK),
    Metric("router_worker_prefix_queries_total", "counter", "Tokens it looked for in its cache.", _RANK),
    Metric("router_worker_prefix_hits_total", "counter", "Tokens of these that were cached.", _RANK),
    Metric("router_kv_blocks", "gauge", "KV blocks the index holds for a worker.", _RANK),
    Metric("router_kv_synced", "gauge", "1 when the index knows all the worker's KV events.", _RANK),
    Metric("router_kv_guessed", "gauge", "1 when a worker's cache is guessed by past choices.", ("worker",)),
    Metric("router_index_blocks", "gauge", "Different blocks in the index, over all workers and tiers."),
    Metric("router_index_evicted_total", "counter", "Blocks the index forgot because it was full."),
    Metric("router_prefill_skipped_total", "counter", "Prompts left to decode workers to compute."),
    Metric("router_kv_gaps_total", "counter", "Gaps seen in a worker's numbered KV events.", _RANK),
    Metric(
        "router_kv_reloads_total", "counter", "Times a worker's index was begun anew from a snapshot.", _RANK
    ),
    Metric(
        "router_kv_worker_resets_total",
        "counter",
        "Times a worker lost its engine's KV events for good, as it says.",
        _RANK,
    ),
    Metric("api_key_requests_total", "counter", "Requests let in with an API key.", ("key",)),
    Metric("api_key_inflight_requests", "gauge", "Requests under way with an API key.", ("key",)),
    Metric("api_key_rejections_total", "counter", "Requests beyond an API key's limit.", ("key",)),
    Metric("router_queue_pending_requests", "gauge", "Requests that wait for a worker.", _QUEUE),
    Metric("router_queue_pending_isl_tokens", "gauge", "Prompt tokens of the requests that wait.", _QUEUE),
    Metric("router_queue_pending_cached_tokens", "gauge", "Of these, tokens known to be cached.", _QUEUE),
    Metric("router_queue_backpressure_total", "counter", "Requests refused by a full queue.", _QUEUE),
)


def _routing(
    name: str,
    kind: Literal["counter", "gauge", "histogram"],
    help_: str,
    labels: tuple[str, ...] = (),
    buckets: tuple[float, ...] = (),
) -> Metric:
    return Metric(name, kind, help_, (*_ROUTER, *labels), buckets, scope="")


_ROUTING: tuple[Metric, ...] = (
    _routing("component_router_requests_started_total", "counter", "Requests to be routed."),
    _routing("component_router_requests_total", "counter", "Requests routed."),
    _routing(
        "component_router_time_to_first_token_seconds", "histogram", "Until the first byte.", (), _TTFT_S
    ),
    _routing("component_router_inter_token_latency_seconds", "histogram", "Mean of each stream.", (), _ITL_S),
    _routing("component_router_input_sequence_tokens", "histogram", "Of a prompt.", (), _INPUT_TOKENS),
    _routing("component_router_output_sequence_tokens", "histogram", "Of an answer.", (), _OUTPUT_TOKENS),
    _routing(
        "component_router_kv_hit_rate",
        "histogram",
        "Share of a prompt's blocks that the chosen worker is known to hold.",
        (),
        _RATIO,
    ),
    _routing(
        "component_router_kv_best_eligible_cached_prefix_tokens_total",
        "counter",
        "Prompt tokens cached on the eligible worker that has the most of them.",
    ),
    _routing(
        "component_router_kv_selected_cached_prefix_tokens_total",
        "counter",
        "Prompt tokens cached on the worker chosen.",
    ),
    _routing(
        "component_router_kv_worker_reused_tokens_total",
        "counter",
        "Prompt tokens taken from the cache, as the engine says in its usage.",
    ),
    _routing(
        "component_router_non_max_overlap_selections_total",
        "counter",
        "Choices of a worker with less of the prompt than another one had.",
        ("worker_type",),
    ),
    _routing(
        "component_router_overlap_blocks_lost",
        "histogram",
        "Cached blocks given up by such a choice.",
        ("worker_type",),
        tuple(float(2**i) for i in range(12)),
    ),
    _routing(
        "component_router_kv_transfer_estimated_latency_seconds",
        "histogram",
        "From prefill's answer to decode's first byte: no transfer of KV blocks took longer.",
        (),
        log_buckets(0.001, 10, 15),
    ),
    _routing(
        "component_router_worker_registered", "gauge", "1 for each worker.", ("worker_id", "worker_type")
    ),
    _routing("router_overhead_scheduling_ms", "histogram", "Choosing a worker.", (), _OVERHEAD_MS),
    _routing("router_overhead_total_ms", "histogram", "All of routing but the hashing.", (), _OVERHEAD_MS),
)


def _planned(
    name: str, kind: Literal["counter", "gauge"], help_: str, labels: tuple[str, ...] = ()
) -> Metric:
    """Told by the controller; the same at each frontend: not to be added up."""
    return Metric(name, kind, help_, labels, scope="")


_PLANNER: tuple[Metric, ...] = (
    _planned("planner_target_replicas", "gauge", "Replicas the planner wants.", ("role",)),
    _planned("planner_floor_replicas", "gauge", "Replicas that forecast demand takes.", ("role",)),
    _planned("planner_ready_replicas", "gauge", "Replicas that serve, as the planner sees it.", ("role",)),
    _planned("planner_observed_requests_per_second", "gauge", "Arrivals since its last look."),
    _planned("planner_predicted_requests_per_second", "gauge", "The most it forecasts within a boot time."),
    _planned("planner_predicted_input_tokens", "gauge", "Tokens of a prompt it forecasts."),
    _planned("planner_predicted_output_tokens", "gauge", "Tokens of an answer it forecasts."),
    _planned(
        "planner_decisions_total",
        "counter",
        "Looks since the controller began; decision: hold, up, down, undo.",
        ("role", "decision"),
    ),
)

FRONTEND = (*_REQUESTS, *_LATENCY, *_TOKENS, *_CARD, *_FAULTS, *_WORKERS, *_ROUTING, *_PLANNER)
"""All metrics of a frontend."""
