"""What judges see: one host's facts beside what the recipe wants of it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from dynctl.deploy.plan import Plan, PlannedNode, PlannedProcess
from dynctl.engines import catalog
from dynctl.engines.base import Engine, EngineEnvironment, Inquiry
from dynctl.hostfacts import OWN
from dynctl.protocol.hosts import HostFacts
from dynctl.recipe.load import LoadedRecipe
from dynctl.recipe.schema import Recipe
from dynctl.topology.inventory import Host


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be started. All None = nothing in particular; `plan` alone None = it does not fit the hosts.

    `version` is the asking dynctl's own, `home` the directory of runs on hosts that name none, `here` whether
    the hosts are this machine. `tried`: ids of processes whose start failed: their ports as planned are
    judged, instead of those that a start would not go round.
    """

    version: str
    home: str
    loaded: LoadedRecipe | None = None
    plan: Plan | None = None
    here: bool = True
    tried: frozenset[str] = frozenset()

    @property
    def recipe(self) -> Recipe | None:
        """The recipe."""
        return self.loaded.recipe if self.loaded else None

    @property
    def engine(self) -> Engine | None:
        """The recipe's engine."""
        return catalog.get(self.loaded.recipe.backend) if self.loaded else None

    @property
    def apart(self) -> bool:
        """Whether KV blocks move between engines."""
        return self.recipe is not None and self.recipe.roles.prefill is not None

    @property
    def spread(self) -> bool:
        """Whether engines talk to engines on other hosts: of one replica, or prefill to decode."""
        if self.plan is None:
            return False
        engines = [process for process in self.plan.processes if process.kind == "engine"]
        replicas: dict[tuple[str, int], set[str]] = {}
        for process in engines:
            replicas.setdefault((process.role, process.index), set()).add(process.node)
        many = any(len(nodes) > 1 for nodes in replicas.values())
        return many or (self.apart and len({process.node for process in engines}) > 1)

    @property
    def shards(self) -> bool:
        """Whether a replica has several ranks, which exchange data through shared memory."""
        if self.recipe is None:
            return False
        sections = self.recipe.roles.present().values()
        return any(s.tensor_parallel * s.pipeline_parallel * s.data_parallel > 1 for s in sections)

    @property
    def inquiry(self) -> Inquiry | None:
        """How the recipe's engine is asked what it is; None = there is none to ask."""
        if self.recipe is None or self.engine is None:
            return None
        given = self.recipe.engine
        where = EngineEnvironment(given.venv or "", given.python or "", given.container or "", own=OWN)
        return self.engine.inquiry(where)

    def engine_env(self) -> Mapping[str, str]:
        """The recipe's variables of engine processes; of those of several roles one."""
        if self.recipe is None:
            return {}
        env = dict(self.recipe.engine.env)
        for section in self.recipe.roles.present().values():
            env.update(section.env)
        return env


@dataclass(frozen=True)
class Subject:
    """One host and what it told. Its clock was read when ours was at `asked_at`, give or take `within_s`."""

    host: Host
    facts: HostFacts
    wanted: Wanted
    asked_at: float = 0.0
    within_s: float = 0.0

    @cached_property
    def node(self) -> PlannedNode | None:
        """Its part of the plan; None = nothing runs there, or there is no plan."""
        plan = self.wanted.plan
        return next((node for node in plan.nodes if node.name == self.host.name), None) if plan else None

    @cached_property
    def processes(self) -> tuple[PlannedProcess, ...]:
        """What the plan starts there."""
        plan = self.wanted.plan
        return tuple(p for p in plan.processes if p.node == self.host.name) if plan else ()

    @property
    def home(self) -> str:
        """Where runs are kept there."""
        return self.host.directory or self.wanted.home

    @property
    def on(self) -> str:
        """Where it is, as part of a sentence."""
        return "on this machine" if self.wanted.here else f"on {self.host.name}"

    @property
    def has_engine(self) -> bool:
        """Whether an engine is to run there; without a plan on every host, if the recipe starts any."""
        engine = self.wanted.engine
        if engine is None or not engine.features.launches:
            return False
        return self.wanted.plan is None or any(p.kind == "engine" for p in self.processes)

    @property
    def wants_gpus(self) -> bool:
        """Whether its engine is to run on GPUs."""
        engine, recipe = self.wanted.engine, self.wanted.recipe
        on_gpus = engine is not None and engine.features.gpus and recipe is not None
        return on_gpus and recipe is not None and recipe.engine.device == "gpu" and self.has_engine

    def environment(self) -> dict[str, str]:
        """The variables of an engine there, of those that matter: the host's, the recipe's over them."""
        return {**self.facts.env, **self.wanted.engine_env()}
