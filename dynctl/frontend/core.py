"""A frontend without its sockets to the rest of the deployment: router, pipeline and routes, put together.

`service` feeds it the membership and the event plane; so can anything else.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any

from dynctl.engines import catalog
from dynctl.frontend.accounts import Accounts
from dynctl.frontend.admission import Models
from dynctl.frontend.attempt import Parts
from dynctl.frontend.circuit import STATES
from dynctl.frontend.disagg import flow_for
from dynctl.frontend.export import exporter
from dynctl.frontend.gate import Gate
from dynctl.frontend.keys import ApiKeys
from dynctl.frontend.migrate import Migrations
from dynctl.frontend.pipeline import Pipeline
from dynctl.frontend.prompt.preprocess import Preprocessor
from dynctl.frontend.pulse import Pulse
from dynctl.frontend.series import Choices, Stages
from dynctl.frontend.server import Edge, Routes, tell
from dynctl.frontend.thresholds import Thresholds
from dynctl.frontend.upstream import Upstream
from dynctl.http.client import Client
from dynctl.observability.metrics import Metrics
from dynctl.observability.tracing import Tracing
from dynctl.protocol.instances import Instance, Role
from dynctl.protocol.registry import Member
from dynctl.protocol.specs import FrontendSpec
from dynctl.router.service import Router, WorkerLinks
from dynctl.transport.keys import bearer, load_engine_key

_WORKER_SERIES = (
    "router_kv_guessed",
    "circuit_state",
    "circuit_opened_total",
    "router_kv_blocks",
    "router_kv_synced",
    "router_worker_requests",
)


_WORKER_ID_SERIES = (
    "worker_active_decode_blocks",
    "worker_active_prefill_tokens",
    "worker_last_time_to_first_token_seconds",
    "worker_last_input_sequence_tokens",
    "worker_last_inter_token_latency_seconds",
    "component_router_worker_registered",
)


class Core:
    """Make it inside a running loop; `routes` is the handler to serve. `close` it at the end."""

    def __init__(self, spec: FrontendSpec, links: WorkerLinks, rng: Random | None = None) -> None:
        self._spec = spec
        self._engine = catalog.get(spec.backend)
        self._members: dict[str, Member] = {}
        self._draining = False
        rng = rng or Random()
        self.metrics = Metrics(prefix=spec.metrics_prefix, own={"router_id": spec.id})
        self.accounts = Accounts(self.metrics)
        self._exporter = exporter(spec, self.metrics)
        self._pulse = Pulse(asyncio.get_running_loop(), self.metrics)
        self.router = Router(spec.router, links, block_size=spec.model.block_size, rng=rng)
        self.engine_headers = (bearer(load_engine_key(spec.engine_key_file)),) if spec.engine_key_file else ()
        """What engines ask for with every request: their key."""
        self.models = Models(spec.model)
        self.gate = Gate(
            self.router, _prompt_roles(spec), spec.router.queue, spec.busy, self.metrics, spec.model.name
        )
        self._client = Client()
        self._client.readers.rest_s = spec.coalesce_s
        self._upstream = Upstream(self._client, spec.limits, self.metrics)
        self._preprocessor = (
            Preprocessor(spec.model, self.metrics, spec.tokenizer_cache_bytes)
            if spec.router.mode == "kv"
            else None
        )
        self.routes = Routes(self._edge(rng))

    def warm(self) -> None:
        """Begin to load what the first request would otherwise wait for."""
        if self._preprocessor is not None:
            self._preprocessor.warm()

    async def close(self) -> None:
        """End the router's tasks and the connections to engines."""
        await self.router.close()
        await self._upstream.close()
        await self._client.close()
        if self._preprocessor is not None:
            self._preprocessor.close()
        self._pulse.cancel()
        if self._exporter is not None:
            await self._exporter.close()

    def members_changed(self, upserts: Sequence[Member], removed: Sequence[str]) -> None:
        """Take over a change of the membership."""
        gone = [self._members[worker].instance for worker in removed if worker in self._members]
        gone += [old for member in upserts if (old := self._replaced_by(member)) is not None]
        silent = [member.instance for member in upserts if self._falls_silent(member)]
        self.router.members_changed(upserts, removed)
        for worker in removed:
            self._members.pop(worker, None)
            for name in _WORKER_SERIES:
                self.metrics.drop(name, worker=worker)
            for name in _WORKER_ID_SERIES:
                self.metrics.drop(name, worker_id=worker)
            self.accounts.forget(worker)
            self.metrics.drop("router_peer_requests", peer=worker)
        for member in upserts:
            if member.instance.role != "frontend":
                known = self._members.get(member.instance.id)
                if known is None or known.instance.incarnation != member.instance.incarnation:
                    self._upstream.circuits.forget(member.instance.id)
                self._members[member.instance.id] = member
        instances = [member.instance for member in self._members.values()]
        for instance in gone:
            self._upstream.lost(instance, "has left")
        for instance in silent:
            self._upstream.lost(instance, "has fallen silent", spare_living=True)
        self._upstream.circuits.members_changed({one.id: one.role for one in instances})
        self.models.members_changed(instances)

    def http_refused(self, code: str) -> None:
        """Count a request that the HTTP server refused before it came here."""
        self.metrics.counter("http_refusals_total", code=code).inc()

    def drain(self) -> None:
        """This frontend is about to stop: say so to whoever asks for its health."""
        self._draining = True

    def _replaced_by(self, member: Member) -> Instance | None:
        known = self._members.get(member.instance.id)
        older = known is not None and known.instance.incarnation < member.instance.incarnation
        return known.instance if known is not None and older else None

    def _falls_silent(self, member: Member) -> bool:
        known = self._members.get(member.instance.id)
        return member.state == "silent" and known is not None and known.state != "silent"

    def health(self) -> dict[str, Any]:
        """Per role what is wanted and what is there, and why requests cannot be served ([] = they can)."""
        ready = self._ready()
        reasons = self.router.ready(self._spec.roles)
        if self._draining:
            reasons.insert(0, "this frontend is stopping")
        return {
            "status": "draining" if self._draining else "not_ready" if reasons else "ready",
            "frontend": self._spec.id,
            "model": self._spec.model.name,
            "reasons": reasons,
            "roles": {
                role: {"ready": ready[role], "wanted": wanted} for role, wanted in self._spec.roles.items()
            },
            "doubts": [*self.router.doubts(), *self.router.peers.doubts()],
        }

    def refresh_metrics(self) -> None:
        """Set the gauges that are read off the router; to be called before metrics are shown."""
        metrics, model = self.metrics, self._spec.model.name
        ready = self._ready()
        for role in self._spec.roles:
            metrics.gauge("router_workers", role=role).set(ready[role])
        metrics.gauge("model_ready", model=model).set(float(not self.router.ready(self._spec.roles)))
        metrics.gauge("model_context_length", model=model).set(self.models.max_model_len)
        metrics.gauge("model_kv_cache_block_size", model=model).set(self.router.block_size)
        metrics.gauge("model_migration_limit", model=model).set(self._spec.migration.limit)
        metrics.gauge("lora_adapters", model=model).set(len(self.models.names()) - 1)
        self._refresh_workers()
        circuits = self._upstream.circuits
        for worker, state in circuits.states(time.monotonic()).items():
            metrics.gauge("circuit_state", worker=worker).set(STATES.index(state))
            metrics.counter("circuit_opened_total", worker=worker).set(circuits.opened[worker])
        peers = self.router.peers.states()
        metrics.gauge("router_peers").set(sum(peer.heard for peer in peers))
        for peer in peers:
            metrics.gauge("router_peer_requests", peer=peer.frontend).set(peer.requests)
            metrics.counter("router_peer_missed_total", peer=peer.frontend).set(peer.missed)
        metrics.gauge("router_index_blocks").set(self.router.index_blocks)
        metrics.counter("router_index_evicted_total").set(self.router.index_evicted)
        for worker in self.router.guessed():
            metrics.gauge("router_kv_guessed", worker=worker).set(1.0)
        held = self.router.held()
        for stream in self.router.streams():
            labels = {"worker": stream.worker, "rank": str(stream.rank)}
            metrics.gauge("router_kv_blocks", **labels).set(held.get((stream.worker, stream.rank), 0))
            metrics.gauge("router_kv_synced", **labels).set(float(stream.state == "synced"))
            metrics.counter("router_kv_gaps_total", **labels).set(stream.gaps)
            metrics.counter("router_kv_reloads_total", **labels).set(stream.reloads)
            metrics.counter("router_kv_worker_resets_total", **labels).set(stream.worker_resets)

    def _refresh_workers(self) -> None:
        metrics, capacity = self.metrics, 0
        for (worker, rank), load in self.router.loads().items():
            metrics.gauge("router_worker_requests", worker=worker, rank=str(rank)).set(load.requests)
            role = self._members[worker].instance.role
            labels = {"worker_id": worker, "dp_rank": str(rank), "worker_type": role}
            metrics.gauge("worker_active_decode_blocks", **labels).set(load.blocks)
            metrics.gauge("worker_active_prefill_tokens", **labels).set(load.prefill_tokens)
            metrics.gauge("component_router_worker_registered", worker_id=worker, worker_type=role).set(1)
            capacity = max(capacity, load.capacity)
        metrics.gauge("model_total_kv_blocks", model=self._spec.model.name).set(capacity)

    def ready_workers(self) -> list[Instance]:
        """Those that get requests now."""
        return [member.instance for member in self._members.values() if member.state == "ready"]

    def _ready(self) -> Counter[str]:
        return Counter(member.instance.role for member in self._members.values() if member.state == "ready")

    def _encode(self, text: str) -> list[int] | None:
        """Tokens of a text, where they can be known here."""
        return self._preprocessor.encode(text) if self._preprocessor is not None else None

    def _edge(self, rng: Random) -> Edge:
        spec = self._spec
        parts = Parts(
            router=self.router,
            gate=self.gate,
            upstream=self._upstream,
            models=self.models,
            metrics=self.metrics,
            stages=Stages(self.metrics),
            choices=Choices(self.metrics),
            rng=rng,
            preprocessor=self._preprocessor,
            migrations=Migrations(
                spec.migration, self._engine.continuation, self.metrics, spec.model.name, self._encode
            ),
            tell=tell,
            request_timeout_s=spec.limits.request_timeout_s,
        )
        flow = flow_for(
            frozenset(spec.roles), catalog.contract(spec.backend, spec.kv_transfer), self._engine.naming
        )
        other: Role = "decode" if "decode" in spec.roles else "aggregated"
        return Edge(
            thresholds=Thresholds(self.gate, spec.model.name, spec.id),
            pipeline=Pipeline(parts, flow, other),
            models=self.models,
            keys=ApiKeys(spec.api_keys, self.metrics),
            accounts=self.accounts,
            metrics=self.metrics,
            tracing=Tracing(
                Random(),
                self._exporter.record if self._exporter is not None else None,
                spec.tracing.sample_ratio,
            ),
            health=self.health,
            refresh=self.refresh_metrics,
            owned_fields=self._engine.client_fields,
            engine_headers=self.engine_headers,
            started_at=int(time.time()),
        )


def _prompt_roles(spec: FrontendSpec) -> list[Role]:
    """The roles a prompt goes through, in order."""
    present: list[Role] = ["prefill", "decode"] if "prefill" in spec.roles else ["aggregated"]
    return present
