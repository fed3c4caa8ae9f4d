"""The command of each seat of a deployment, with the spec file it reads. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec

from dynctl.command import Command
from dynctl.deploy.slurm_steps import as_step, box_for
from dynctl.engines.arguments import normal_name, step_tokens
from dynctl.engines.base import (
    ArgValue,
    Engine,
    EngineEnvironment,
    EngineLaunch,
    KvPoll,
    KvSource,
    ModelRef,
    Rank,
)
from dynctl.protocol.instances import ModelCard, Role
from dynctl.protocol.specs import (
    ApiKeySpec,
    BusySpec,
    EngineProcess,
    FrontendSpec,
    KvPollSpec,
    LimitsSpec,
    MigrationSpec,
    RouterSpec,
    TracingSpec,
    WorkerSpec,
)
from dynctl.recipe.check import parallel_of
from dynctl.recipe.schema import Recipe, RoleSection
from dynctl.recipe.slurm import Slurm
from dynctl.topology.inventory import Host
from dynctl.topology.ports import FIRST_PORT

KEYS_FILE = "keys.json"
ENGINE_KEY_FILE = "engine.key"


@dataclass(frozen=True, slots=True)
class NodeContext:
    """What differs from node to node: the run's absolute directory there, and the python that runs dynctl."""

    run_dir: str
    python: str


@dataclass(frozen=True, slots=True)
class RunContext:
    """What differs from run to run: its id, absolute directory, the python that runs dynctl, ports.

    `nodes` says it for those where directory and python are others.
    """

    run_id: str
    run_dir: str
    python: str
    first_port: int = FIRST_PORT
    nodes: Mapping[str, NodeContext] = field(default_factory=dict)

    def on(self, node: str) -> NodeContext:
        """What it is on this node."""
        return self.nodes.get(node) or NodeContext(self.run_dir, self.python)


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where the controller listens: `registry` takes calls, `membership` publishes changes."""

    registry: str
    membership: str


@dataclass(frozen=True, slots=True)
class Site:
    """What all seats of one deployment share."""

    recipe: Recipe
    engine: Engine
    run: RunContext
    endpoints: Endpoints


@dataclass(frozen=True, slots=True)
class Seat:
    """One sidecar and the part of the engine it starts: part `number` of replica `launch`."""

    id: str
    launch: EngineLaunch
    number: int
    ports: Mapping[str, int]
    engine: Command | None
    url: str

    @property
    def rank(self) -> Rank:
        """Where this part is."""
        return self.launch.ranks[self.number]


def controller_command(site: Site, node: str) -> Command:
    """The controller, which reads plan.json in its working directory."""
    return _command(site, node, "controller", ("dynctl.controller", "--run-dir", site.run.on(node).run_dir))


def agent_command(site: Site, node: str, endpoint: str) -> Command:
    """The agent of a node, which listens at `endpoint`."""
    options = ("--run-dir", site.run.on(node).run_dir, "--run-id", site.run.run_id, "--node", node)
    return _command(site, node, f"agent-{node}", ("dynctl.agent", *options, "--endpoint", endpoint))


def frontend_command(site: Site, index: int, host: Host, ports: Mapping[str, int]) -> Command:
    """A frontend and its spec. `ports`: "http", and "own" and "events" where there are others."""
    recipe, seat = site.recipe, f"frontend-{index}"
    spec = FrontendSpec(
        id=seat,
        index=index,
        node=host.name,
        host=recipe.frontend.host,
        port=ports["http"],
        address=host.address,
        own_port=ports.get("own", 0),
        events_port=ports.get("events", 0),
        registry=site.endpoints.registry,
        membership=site.endpoints.membership,
        keys_file=KEYS_FILE,
        backend=recipe.backend,
        kv_transfer=recipe.engine.kv_transfer,
        model=model_card(recipe),
        roles={role: section.replicas for role, section in recipe.roles.present().items()},
        router=router_spec(recipe),
        limits=_limits(recipe),
        busy=busy_spec(recipe),
        engine_key_file=_engine_key_file(site),
        migration=msgspec.convert(recipe.frontend.migration.model_dump(), MigrationSpec),
        api_keys=_api_keys(recipe),
        tls_cert=recipe.frontend.tls.cert if recipe.frontend.tls else "",
        tls_key=recipe.frontend.tls.key if recipe.frontend.tls else "",
        metrics_prefix=recipe.frontend.metrics_prefix,
        tokenizer_cache_bytes=recipe.frontend.tokenizer_cache,
        coalesce_s=recipe.frontend.coalesce,
        tracing=_tracing(recipe),
        sync_timeout_s=recipe.frontend.sync_timeout,
        drain_timeout_s=recipe.engine.drain_timeout,
    )
    return _with_spec(site, seat, ("dynctl.frontend", host.name), spec, {})


def worker_command(site: Site, seat: Seat) -> Command:
    """A sidecar, its spec, and the files of its engine."""
    recipe, launch, engine = site.recipe, seat.launch, seat.engine
    follower = seat.number > 0
    source = None if follower else site.engine.kv_source(launch)
    spec = WorkerSpec(
        id=seat.id,
        role=launch.role,
        index=launch.index,
        node=seat.rank.node,
        backend=recipe.backend,
        model=msgspec.structs.replace(
            model_card(recipe), max_batched_tokens=step_tokens(site.engine.step_tokens, launch.args)
        ),
        url=seat.url,
        registry=site.endpoints.registry,
        keys_file=KEYS_FILE,
        bind_host=seat.rank.address,
        events_port=seat.ports["events"],
        control_port=seat.ports["control"],
        engine=EngineProcess(argv=list(engine.argv), env=dict(engine.env), cwd=engine.cwd or "")
        if engine
        else None,
        engine_log=f"logs/{seat.id}.engine.log" if engine else "",
        follower=follower,
        dp_size=launch.parallel.data,
        bootstrap_port=launch.ports.get("bootstrap", 0),
        kv_transfer=launch.transfer,
        **_kv_fields(source),
        engine_key_file=_engine_key_file(site),
        engine_key_variable=site.engine.key_variable,
        canary_interval_s=recipe.engine.canary.interval if recipe.engine.canary.enabled else 0.0,
        canary_timeout_s=recipe.engine.canary.timeout,
        start_timeout_s=recipe.engine.start_timeout,
        drain_timeout_s=recipe.engine.drain_timeout,
        stop_timeout_s=recipe.engine.stop_timeout,
    )
    files = engine.files if engine else {}
    return _with_spec(site, seat.id, ("dynctl.worker", seat.rank.node), spec, files)


def _kv_fields(source: KvSource | KvPoll | None) -> dict[str, Any]:
    """Where a sidecar gets its engine's KV events from, as fields of its spec."""
    if isinstance(source, KvPoll):
        return {"kv_poll": KvPollSpec(**asdict(source))}
    if source is None:
        return {}
    return {
        "kv_endpoints": list(source.endpoints),
        "kv_replay_endpoints": list(source.replay_endpoints),
        "kv_topic": source.topic,
    }


def engine_launch(
    site: Site, role: Role, index: int, ranks: tuple[Rank, ...], ports: Mapping[str, int]
) -> EngineLaunch:
    """What the engine's command line is made from."""
    recipe = site.recipe
    section = recipe.roles.present()[role]
    return EngineLaunch(
        model=ModelRef(
            path=recipe.model.path,
            served_name=recipe.model.name,
            revision=recipe.model.revision,
            tokenizer=recipe.model.tokenizer,
            chat_template=recipe.model.chat_template,
        ),
        role=role,
        index=index,
        parallel=parallel_of(section),
        ranks=ranks,
        ports=ports,
        environment=EngineEnvironment(
            venv=recipe.engine.venv or "",
            python=recipe.engine.python or "",
            container=recipe.engine.container or "",
            runtime=recipe.engine.runtime,
            mounts=tuple(recipe.engine.mounts),
            own=site.run.on(ranks[0].node).python if ranks else "",
            mpi=(recipe.slurm or Slurm()).mpi if recipe.target == "slurm" else "",
        ),
        args=_args(site.engine, {**recipe.engine.args, **section.args}),
        env={**recipe.engine.env, **section.env},
        disaggregated=role in ("prefill", "decode"),
        transfer=recipe.engine.kv_transfer,
        kv_events=recipe.router.mode == "kv",
        external_kv=_external_kv(section, index),
    )


def engine_command(site: Site, node: str, seat_id: str, command: Command) -> Command:
    """The engine's command as its sidecar runs it: marked as part of the run."""
    env = {**command.env, **_marks(site, seat_id)}
    cwd = command.cwd or site.run.on(node).run_dir
    marked = Command(command.argv, env, cwd, command.files)
    engine = site.recipe.engine
    boxed = bool(engine.container) and engine.runtime == "pyxis"
    if site.recipe.target != "slurm" or not (boxed or command.argv[0] == "srun"):
        return marked
    paths = (site.recipe.model.path, site.recipe.model.tokenizer, site.recipe.model.chat_template)
    box = box_for(engine.container or "", engine.mounts, cwd, paths, marked.env) if boxed else None
    return as_step(marked, seat_id, node, box)


def model_card(recipe: Recipe) -> ModelCard:
    """The model as frontends and sidecars know it before its engine has spoken."""
    model = recipe.model
    return ModelCard(
        name=model.name,
        path=model.path,
        revision=model.revision,
        tokenizer=model.tokenizer,
        chat_template=model.chat_template,
    )


def _external_kv(section: RoleSection, index: int) -> KvSource | None:
    """What the recipe says of an external engine's publisher."""
    if not section.kv_events:
        return None
    return KvSource(
        endpoints=(section.kv_events[index],),
        replay_endpoints=(section.kv_replay[index],) if section.kv_replay else (),
    )


def router_spec(recipe: Recipe) -> RouterSpec:
    """The recipe's fields by the same names; those that are durations say so in the spec."""
    given = recipe.router.model_dump()
    for name in ("approximate_ttl", "predicted_ttl"):
        given[f"{name}_s"] = given.pop(name)
    given["session_affinity"]["ttl_s"] = given["session_affinity"].pop("ttl")
    given["queue"]["deadline_s"] = given["queue"].pop("deadline")
    return msgspec.convert(given, RouterSpec)


def _args(engine: Engine, given: dict[str, ArgValue]) -> dict[str, ArgValue]:
    """What the recipe gives, and unless it says otherwise answers tell how much of a prompt was cached."""
    told = engine.cached_argument
    known = {normal_name(name) for name in given}
    return given if not told or normal_name(told) in known else {**given, told: True}


def _engine_key_file(site: Site) -> str:
    """Where the key is that the engines ask for; "" = these ask for none."""
    return ENGINE_KEY_FILE if site.engine.key_variable else ""


def _api_keys(recipe: Recipe) -> list[ApiKeySpec]:
    """The recipe's keys, which are digests by now."""
    return [
        ApiKeySpec(
            name=key.name,
            sha256=key.key.removeprefix("sha256:").lower(),
            max_concurrent=key.max_concurrent,
            admin=key.admin,
        )
        for key in recipe.frontend.api_key
    ]


def busy_spec(recipe: Recipe) -> BusySpec:
    """When workers are busy."""
    admission = recipe.frontend.admission
    return BusySpec(
        decode_blocks=admission.decode_blocks_threshold,
        prefill_tokens=admission.prefill_tokens_threshold,
        prefill_share=admission.prefill_share_threshold,
    )


def _limits(recipe: Recipe) -> LimitsSpec:
    limits = recipe.frontend.limits
    return LimitsSpec(
        body_bytes=limits.body,
        header_bytes=limits.headers,
        header_timeout_s=limits.header_timeout,
        body_timeout_s=limits.body_timeout,
        idle_timeout_s=limits.idle_timeout,
        request_timeout_s=limits.request_timeout,
        first_byte_timeout_s=limits.first_byte_timeout,
        stall_timeout_s=limits.stall_timeout,
        max_connections=limits.max_connections,
    )


def _tracing(recipe: Recipe) -> TracingSpec:
    tracing = recipe.frontend.tracing
    return TracingSpec(**tracing.model_dump()) if tracing is not None else TracingSpec()


def _with_spec(site: Site, seat: str, what: tuple[str, str], spec: Any, files: Mapping[str, str]) -> Command:
    """The command of a seat that reads a spec. `what`: its module, and its node."""
    module, node = what
    name = f"specs/{seat}.json"
    text = msgspec.json.format(msgspec.json.encode(spec), indent=2).decode() + "\n"
    return _command(site, node, seat, (module, "--spec", name), {name: text, **files})


def _command(
    site: Site, node: str, seat: str, module: Sequence[str], files: Mapping[str, str] | None = None
) -> Command:
    there = site.run.on(node)
    argv = (there.python, "-m", *module)
    return Command(argv, _marks(site, seat), there.run_dir, files or {})


def _marks(site: Site, seat: str) -> dict[str, str]:
    return {"DYNCTL_PROCESS": seat, "DYNCTL_RUN": site.run.run_id}
