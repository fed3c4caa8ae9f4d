"""Metrics that are read off a frontend's parts whenever they are shown."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from dynctl.frontend.admission import Models
from dynctl.frontend.circuit import STATES, Circuits
from dynctl.observability.metrics import Metrics
from dynctl.protocol.kv_events import LoadReport
from dynctl.protocol.planner import PlannerFigures
from dynctl.protocol.registry import Member
from dynctl.protocol.specs import FrontendSpec
from dynctl.router.service import Router

_WORKER_SERIES = (
    "router_kv_guessed",
    "circuit_state",
    "circuit_opened_total",
    "router_kv_blocks",
    "router_kv_synced",
    "router_worker_requests",
    "router_worker_running",
    "router_worker_waiting",
    "router_worker_kv_usage",
    "router_worker_prefix_queries_total",
    "router_worker_prefix_hits_total",
)
_WORKER_ID_SERIES = (
    "worker_active_decode_blocks",
    "worker_active_prefill_tokens",
    "worker_last_time_to_first_token_seconds",
    "worker_last_input_sequence_tokens",
    "worker_last_inter_token_latency_seconds",
    "component_router_worker_registered",
)


def ready_by_role(members: Mapping[str, Member]) -> Counter[str]:
    """How many of the members get requests now."""
    return Counter(member.instance.role for member in members.values() if member.state == "ready")


_PLANNER_BY_ROLE = ("planner_target_replicas", "planner_floor_replicas", "planner_ready_replicas")
_PLANNER = (
    "planner_observed_requests_per_second",
    "planner_predicted_requests_per_second",
    "planner_predicted_input_tokens",
    "planner_predicted_output_tokens",
)


def show_planner(metrics: Metrics, figures: PlannerFigures) -> None:
    """What the planner told, of the metrics that are known here."""
    for name in _PLANNER_BY_ROLE:
        metrics.drop(name)
        for role, value in figures.gauges.get(name, {}).items():
            metrics.gauge(name, role=role).set(value)
    for name in _PLANNER:
        for value in figures.gauges.get(name, {}).values():
            metrics.gauge(name).set(value)
    for role, code, count in figures.decisions:
        metrics.counter("planner_decisions_total", role=role, decision=code).set(count)


@dataclass(frozen=True, slots=True)
class Gauges:
    """`members` are the workers as the frontend knows them; it goes on to change them."""

    spec: FrontendSpec
    metrics: Metrics
    router: Router
    models: Models
    circuits: Circuits
    members: Mapping[str, Member]

    def refresh(self) -> None:
        """Bring them up to date."""
        self._model()
        self._workers()
        self._circuits()
        self._peers()
        self._index()

    def forget(self, seat: str) -> None:
        """A worker or another frontend has left: its series are shown no more."""
        for name in _WORKER_SERIES:
            self.metrics.drop(name, worker=seat)
        for name in _WORKER_ID_SERIES:
            self.metrics.drop(name, worker_id=seat)
        self.metrics.drop("router_peer_requests", peer=seat)

    def _model(self) -> None:
        metrics, model = self.metrics, self.spec.model.name
        ready = ready_by_role(self.members)
        for role in self.spec.roles:
            metrics.gauge("router_workers", role=role).set(ready[role])
        metrics.gauge("model_ready", model=model).set(float(not self.router.ready(self.spec.roles)))
        metrics.gauge("model_context_length", model=model).set(self.models.max_model_len)
        metrics.gauge("model_kv_cache_block_size", model=model).set(self.router.block_size)
        metrics.gauge("model_migration_limit", model=model).set(self.spec.migration.limit)
        metrics.gauge("lora_adapters", model=model).set(len(self.models.names()) - 1)

    def _workers(self) -> None:
        metrics, capacity = self.metrics, 0
        for (worker, rank), load in self.router.loads().items():
            metrics.gauge("router_worker_requests", worker=worker, rank=str(rank)).set(load.requests)
            role = self.members[worker].instance.role
            labels = {"worker_id": worker, "dp_rank": str(rank), "worker_type": role}
            metrics.gauge("worker_active_decode_blocks", **labels).set(load.blocks)
            metrics.gauge("worker_active_prefill_tokens", **labels).set(load.prefill_tokens)
            metrics.gauge("component_router_worker_registered", worker_id=worker, worker_type=role).set(1)
            capacity = max(capacity, load.capacity)
            if load.last is not None:
                self._told(load.last)
        metrics.gauge("model_total_kv_blocks", model=self.spec.model.name).set(capacity)

    def _told(self, report: LoadReport) -> None:
        """What an engine said of itself last."""
        metrics, labels = self.metrics, {"worker": report.worker, "rank": str(report.rank)}
        metrics.gauge("router_worker_running", **labels).set(report.running)
        metrics.gauge("router_worker_waiting", **labels).set(report.waiting)
        metrics.gauge("router_worker_kv_usage", **labels).set(report.kv_usage)
        metrics.counter("router_worker_prefix_queries_total", **labels).set(report.prefix_queries)
        metrics.counter("router_worker_prefix_hits_total", **labels).set(report.prefix_hits)

    def _circuits(self) -> None:
        for worker, state in self.circuits.states(time.monotonic()).items():
            self.metrics.gauge("circuit_state", worker=worker).set(STATES.index(state))
            self.metrics.counter("circuit_opened_total", worker=worker).set(self.circuits.opened[worker])

    def _peers(self) -> None:
        peers = self.router.peers.states()
        self.metrics.gauge("router_peers").set(sum(peer.heard for peer in peers))
        for peer in peers:
            self.metrics.gauge("router_peer_requests", peer=peer.frontend).set(peer.requests)
            self.metrics.counter("router_peer_missed_total", peer=peer.frontend).set(peer.missed)

    def _index(self) -> None:
        metrics, router = self.metrics, self.router
        metrics.gauge("router_index_blocks").set(router.index_blocks)
        metrics.counter("router_index_evicted_total").set(router.index_evicted)
        guessed = set(router.guessed())
        for worker in self.members:
            metrics.gauge("router_kv_guessed", worker=worker).set(float(worker in guessed))
        held = router.held()
        for stream in router.streams():
            labels = {"worker": stream.worker, "rank": str(stream.rank)}
            metrics.gauge("router_kv_blocks", **labels).set(held.get((stream.worker, stream.rank), 0))
            metrics.gauge("router_kv_synced", **labels).set(float(stream.state == "synced"))
            metrics.counter("router_kv_gaps_total", **labels).set(stream.gaps)
            metrics.counter("router_kv_reloads_total", **labels).set(stream.reloads)
            metrics.counter("router_kv_worker_resets_total", **labels).set(stream.worker_resets)
