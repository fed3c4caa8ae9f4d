"""A frontend without its sockets to the rest of the deployment: router, pipeline and routes, put together.

`service` feeds it the membership and the event plane; so can anything else.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from dynctl.engines import catalog
from dynctl.frontend.accounts import Accounts
from dynctl.frontend.admission import Models
from dynctl.frontend.attempt import Parts
from dynctl.frontend.disagg import can_skip, flow_for, roles_for
from dynctl.frontend.export import exporter
from dynctl.frontend.gate import Gate
from dynctl.frontend.gauges import Gauges, ready_by_role, show_planner
from dynctl.frontend.keys import ApiKeys
from dynctl.frontend.migrate import Migrations
from dynctl.frontend.pipeline import Pipeline
from dynctl.frontend.prompt.images import ImageNames
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
from dynctl.protocol.planner import PlannerFigures
from dynctl.protocol.registry import Member
from dynctl.protocol.specs import FrontendSpec
from dynctl.router.service import Router, WorkerLinks
from dynctl.transport.keys import bearer, load_engine_key


class Core:
    """Make it inside a running loop; `routes` is the handler to serve. `close` it at the end."""

    def __init__(self, spec: FrontendSpec, links: WorkerLinks, rng: Random | None = None) -> None:
        self._spec = spec
        self._engine = catalog.get(spec.backend)
        self._members: dict[str, Member] = {}
        self._wanted = dict(spec.roles)
        self._draining = False
        self._complete = False
        """Whether all roles have had a worker at once: from then on decode may stand in for prefill."""
        rng = rng or Random()
        self.metrics = Metrics(prefix=spec.metrics_prefix, own={"router_id": spec.id})
        self.accounts = Accounts(self.metrics)
        self._exporter = exporter(spec, self.metrics)
        self._pulse = Pulse(asyncio.get_running_loop(), self.metrics)
        self.router = Router(spec.router, links, block_size=spec.model.block_size, rng=rng)
        self.engine_headers = (bearer(load_engine_key(spec.engine_key_file)),) if spec.engine_key_file else ()
        """What engines ask for with every request: their key."""
        self.models = Models(spec.model)
        self._contract = catalog.contract(spec.backend, spec.kv_transfer)
        self.gate = Gate(
            self.router, _prompt_roles(spec), spec.router.queue, spec.busy, self.metrics, spec.model.name
        )
        self.gate.spills = "prefill" in spec.roles and can_skip(self._contract) and self.router.spills
        self._client = Client()
        self._client.readers.rest_s = spec.coalesce_s
        self._upstream = Upstream(self._client, spec.limits, self.metrics)
        secret = b"".join(value for _, value in self.engine_headers)
        field = self._engine.media_name
        names = ImageNames(field, secret) if field and spec.router.mode == "kv" else None
        self._preprocessor = Preprocessor(
            spec.model, self.metrics, spec.tokenizer_cache_bytes, names, self.router.layouts
        )
        self._reads_prompts = spec.router.mode == "kv"
        """Else tokens are only made for answers that go on elsewhere, and what it takes is loaded then."""
        self._gauges = Gauges(
            spec, self.metrics, self.router, self.models, self._upstream.circuits, self._members
        )
        self.routes = Routes(self._edge(rng))

    def warm(self) -> None:
        """Begin to load what the first request would otherwise wait for."""
        if self._reads_prompts:
            self._preprocessor.warm()

    async def close(self) -> None:
        """End the router's tasks and the connections to engines."""
        await self.router.close()
        await self._upstream.close()
        await self._client.close()
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
        self._complete = self._complete or not self.router.ready(self._wanted)
        for worker in removed:
            self._members.pop(worker, None)
            self._gauges.forget(worker)
            self.accounts.forget(worker)
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

    def wanted_changed(self, wanted: Mapping[str, int]) -> None:
        """So many replicas there should be from now on. The roles themselves stay those of the start."""
        self._wanted.update({role: count for role, count in wanted.items() if role in self._wanted})

    def planned(self, figures: PlannerFigures) -> None:
        """Show what the planner told last; of metrics that this release does not know, nothing."""
        show_planner(self.metrics, figures)

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
        ready = ready_by_role(self._members)
        reasons = self.router.ready(self._needed())
        if self._draining:
            reasons.insert(0, "this frontend is stopping")
        return {
            "status": "draining" if self._draining else "not_ready" if reasons else "ready",
            "frontend": self._spec.id,
            "model": self._spec.model.name,
            "reasons": reasons,
            "roles": {
                role: {"ready": ready[role], "wanted": wanted} for role, wanted in self._wanted.items()
            },
            "doubts": [*self._stands_in(), *self.router.doubts(), *self.router.peers.doubts()],
        }

    def _needed(self) -> dict[str, int]:
        """Replicas wanted of the roles without which no request can be served."""
        stood_in = self._complete and can_skip(self._contract) and self.router.lacks_prefill
        return {role: count for role, count in self._wanted.items() if not (stood_in and role == "prefill")}

    def _stands_in(self) -> list[str]:
        if self._needed().keys() == self._wanted.keys():
            return []
        return [f"{why}: decode workers compute prompts" for why in self.router.ready({"prefill": 1})]

    def ready_workers(self) -> list[Instance]:
        """Those that get requests now."""
        return [member.instance for member in self._members.values() if member.state == "ready"]

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
            preprocessor=self._preprocessor if self._reads_prompts else None,
            migrations=Migrations(
                spec.migration, self._engine.continuation, self.metrics, self.models, self._preprocessor
            ),
            tell=tell,
            request_timeout_s=spec.limits.request_timeout_s,
        )
        roles = frozenset(spec.roles)
        flow = flow_for(roles, self._contract, self._engine.naming)
        other: Role = "decode" if "decode" in spec.roles else "aggregated"
        return Edge(
            thresholds=Thresholds(self.gate, self.router.peers, spec.model.name, spec.id),
            pipeline=Pipeline(parts, flow, roles_for(roles, self._contract), other),
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
            refresh=self._gauges.refresh,
            owned_fields=self._engine.client_fields,
            engine_headers=self.engine_headers,
            started_at=int(time.time()),
        )


def _prompt_roles(spec: FrontendSpec) -> list[Role]:
    """The roles a prompt goes through, in order."""
    present: list[Role] = ["prefill", "decode"] if "prefill" in spec.roles else ["aggregated"]
    return present
