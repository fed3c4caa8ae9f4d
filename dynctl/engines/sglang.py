"""SGLang: command lines, environment, ports, checks, metrics. Written against 0.5.23."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from dynctl.command import Command
from dynctl.engines import kv_dialect, log_lines, vllm_metrics
from dynctl.engines.arguments import devices, flag_names, flags, normalised, program, to_json
from dynctl.engines.base import (
    CONTINUES_MESSAGE,
    ArgValue,
    Canary,
    EngineEnvironment,
    EngineInfo,
    EngineLaunch,
    EngineLoad,
    Features,
    Finding,
    Inquiry,
    KvReader,
    KvSource,
    LoraPaths,
    ModelFacts,
    Naming,
    Parallel,
    PrefillDecode,
    Readiness,
    RoleSettings,
)
from dynctl.engines.inquiry import version_of
from dynctl.engines.kv_sockets import unix_endpoints
from dynctl.engines.prometheus import samples, whole
from dynctl.engines.requests import one_token
from dynctl.engines.sglang_checks import OWNED, PAGE_SIZE, check_role, check_transfer
from dynctl.engines.sglang_disagg import LINK_FIELDS, NAMING, BootstrapRoom
from dynctl.errors import PlacementError
from dynctl.protocol.instances import Role

TOPIC = "kv-events"
BACKENDS = ("nixl", "mooncake", "mooncake_tcp")
"""How the KV cache can move, in the engine's own words."""
TRANSFER_TIMEOUT_S = 120
"""How long either leg waits for the other; the engine's 300 s keep KV blocks too long when a leg is lost."""
HEARTBEAT_S = 2
"""How often decode looks after prefill's bootstrap server, at the least: gone twice, it is forgotten.

One that is back on its port before that is taken for the old one, and requests fail after the time-out above.
"""
_DIST_PORTS = 7
"""The engine uses its dist-init port and the six above it, and one more per data-parallel rank."""

_COUNTS = {"sglang:num_running_reqs": "running", "sglang:num_queue_reqs": "waiting"}
_USAGE = "sglang:token_usage"
_NAME = re.compile(r"^-{0,2}[a-z0-9][a-z0-9_-]*$")

_NO_TRANSFER = "2.2.2.2"
"""As `bootstrap_host`: the other leg is played by the engine itself."""


class Sglang:
    """`sglang serve`: one process group per node, OpenAI HTTP on the head node."""

    name = "sglang"
    # On SIGTERM it waits for all requests without limit and still takes new ones: not a drain to rely on.
    features = Features(launches=True, disaggregation=True, kv_events="zmq")
    owned_args: Mapping[str, str] = OWNED
    readiness = Readiness(health="/ready", models="/v1/models")
    load_path = "/metrics"
    lora = LoraPaths("/load_lora_adapter", "/unload_lora_adapter")
    client_fields = LINK_FIELDS | {"routed_dp_rank", "data_parallel_rank"}
    step_tokens = ("chunked-prefill-size", 0)
    sequences_argument = "max-running-requests"
    cached_argument = "enable-cache-report"
    media_name = ""
    file_arguments: frozenset[str] = frozenset()
    key_variable = ""
    """Its key can be kept from the command line by --config, but it prints all its arguments in its log."""
    continuation = CONTINUES_MESSAGE
    transfers: Mapping[str, PrefillDecode] = dict.fromkeys(BACKENDS, BootstrapRoom())
    either_role: frozenset[str] = frozenset()
    naming: Naming | None = NAMING

    def port_needs(
        self, launch_role: Role, parallel: Parallel, *, disaggregated: bool, transfer: str = ""
    ) -> dict[str, int]:
        """Events and replay per data-parallel rank, prefill's bootstrap server, torch's start-up range."""
        needs = {"http": 1, "kv_events": parallel.data, "kv_replay": parallel.data}
        if disaggregated and launch_role == "prefill":
            needs["bootstrap"] = 1
        if parallel.gpus > 1:
            needs["dist_init"] = _DIST_PORTS + parallel.data
        return needs

    def commands(self, launch: EngineLaunch) -> tuple[Command, ...]:
        """The same command on each node, told apart by `--node-rank`."""
        nodes = len(launch.ranks)
        if nodes > 1:
            _check_spread(launch, nodes)
        _, start = _start(launch.environment)
        tail = [*_size_flags(launch), *_kv_flags(launch), *_user_flags(launch)]
        return tuple(
            Command(
                argv=(*start, *_model_flags(launch, number), *_node_flags(launch, number), *tail),
                env=_environment(launch, number),
            )
            for number in range(nodes)
        )

    def check(self, roles: Sequence[RoleSettings], facts: ModelFacts | None) -> list[Finding]:
        """Refusals of the engine and of its bootstrap handshake, and what that does not notice."""
        found = [finding for role in roles for finding in check_role(role, facts)]
        return found + check_transfer(roles)

    def known_args(self, name: str) -> bool:
        """Lower-case letters, digits, dashes, underscores."""
        return _NAME.match(name) is not None

    def inquiry(self, environment: EngineEnvironment) -> Inquiry:
        """The same program as it is started with."""
        base, start = _start(environment)
        version = version_of(environment, ("sglang",), ("sglang", "version"))
        return Inquiry(base[0], version, (*start, "--help"), abbreviates=True)

    def command_flags(self, args: Mapping[str, ArgValue]) -> tuple[str, ...]:
        """All of them."""
        return flag_names(args)

    def kv_source(self, launch: EngineLaunch) -> KvSource | None:
        """One publisher per data-parallel rank, all on the head: only a replica of one rank spans nodes.

        Decode workers have none: they keep no prefix cache.
        """
        if not _publishes(launch):
            return None
        if unix := unix_endpoints(launch):
            return KvSource(endpoints=unix[:1], replay_endpoints=unix[1:], topic=TOPIC)
        first, replay, ranks = launch.ports["kv_events"], launch.ports["kv_replay"], launch.parallel.data
        return KvSource(
            endpoints=tuple(f"tcp://127.0.0.1:{first + rank}" for rank in range(ranks)),
            replay_endpoints=tuple(f"tcp://127.0.0.1:{replay + rank}" for rank in range(ranks)),
            topic=TOPIC,
        )

    def kv_reader(self, block_size: int) -> KvReader:
        """See `kv_dialect.PayloadReader`."""
        return kv_dialect.PayloadReader()

    def canary(self, model: str, role: Role) -> Canary:
        """Prefill and decode generate alone only with a transfer to the address that stands for none."""
        if role in ("prefill", "decode"):
            return one_token(model, bootstrap_host=_NO_TRANSFER, bootstrap_room=0)
        return one_token(model)

    def load(self, metrics: bytes) -> list[EngineLoad]:
        """Load by data-parallel rank (label `dp_rank`); its tensor-parallel ranks repeat values."""
        return load(metrics)

    def info(self, models: bytes, metrics: bytes) -> EngineInfo:
        """Context length from the model list; the page size is in no metric, events tell it."""
        return EngineInfo(max_model_len=vllm_metrics.max_model_len(models))

    def error_lines(self, log: Sequence[str], limit: int) -> list[str]:
        """See `log_lines.error_lines`."""
        return log_lines.error_lines(log, limit)


def load(metrics: bytes) -> list[EngineLoad]:
    """Load by data-parallel rank, ranks rising; [] when there is no SGLang metric."""
    counts: dict[int, dict[str, int]] = defaultdict(dict)
    usage: dict[int, float] = {}
    for sample in samples(metrics, (*_COUNTS, _USAGE)):
        rank = whole(sample.labels.get("dp_rank", "0"))
        if sample.name == _USAGE:
            usage[rank] = max(usage.get(rank, 0.0), sample.value)
        else:
            field = _COUNTS[sample.name]
            counts[rank][field] = max(counts[rank].get(field, 0), int(sample.value))
    return [
        EngineLoad(
            rank=rank,
            running=found["running"],
            waiting=found.get("waiting", 0),
            kv_usage=usage.get(rank, 0.0),
        )
        for rank, found in sorted(counts.items())
        if "running" in found
    ]


def _start(environment: EngineEnvironment) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Its program, and what starts a server with it: as a module it is the server itself."""
    base = program(environment, "sglang", ("sglang.launch_server",))
    return base, base if environment.python else (*base, "serve")


def _check_spread(launch: EngineLaunch, nodes: int) -> None:
    """What the engine asserts of several nodes (arg_groups/validation_hook.py). Raises PlacementError."""
    sizes, where = launch.parallel, f"{launch.role}-{launch.index}"
    if sizes.data > 1:
        raise PlacementError(
            f"sglang refuses data-parallel ranks over {nodes} nodes",
            where=where,
            hint="give the role more replicas, or sizes of which all ranks fit one node",
        )
    if sizes.gpus % nodes:
        raise PlacementError(
            f"sglang cannot spread {sizes.gpus} ranks evenly over {nodes} nodes",
            where=where,
            hint="choose sizes whose product is a multiple of the nodes a replica needs",
        )


def _model_flags(launch: EngineLaunch, number: int) -> list[str]:
    model = launch.model
    argv = ["--model-path", model.path, "--served-model-name", model.served_name]
    argv += ["--host", launch.ranks[number].address, "--port", str(launch.ports["http"])]
    for flag, value in (
        ("--revision", model.revision),
        ("--tokenizer-path", model.tokenizer),
        ("--chat-template", model.chat_template),
    ):
        argv += [flag, value] if value else []
    return argv


def _node_flags(launch: EngineLaunch, number: int) -> list[str]:
    nodes = len(launch.ranks)
    if nodes == 1:
        return []
    meeting = f"{launch.ranks[0].address}:{launch.ports['dist_init']}"
    return ["--nnodes", str(nodes), "--node-rank", str(number), "--dist-init-addr", meeting]


def _size_flags(launch: EngineLaunch) -> list[str]:
    sizes = launch.parallel
    argv = ["--tp-size", str(sizes.tensor), "--pp-size", str(sizes.pipeline)]
    argv += ["--dp-size", str(sizes.data)] if sizes.data > 1 else []
    argv += ["--ep-size", str(sizes.expert)] if sizes.expert > 1 else []
    return argv


def _publishes(launch: EngineLaunch) -> bool:
    keeps_prefixes = normalised(launch.args).get("disaggregation-decode-enable-radix-cache")
    return launch.kv_events and (launch.role != "decode" or bool(keeps_prefixes))


def _kv_flags(launch: EngineLaunch) -> list[str]:
    argv: list[str] = []
    if launch.disaggregated:
        argv += ["--disaggregation-mode", launch.role]
        argv += ["--disaggregation-transfer-backend", launch.transfer or BACKENDS[0]]
        if launch.role == "prefill":
            argv += ["--disaggregation-bootstrap-port", str(launch.ports["bootstrap"])]
    if _publishes(launch):
        # For the sidecar alone: events hold the tokens of all prompts.
        live, replay = unix_endpoints(launch) or (
            f"tcp://127.0.0.1:{launch.ports['kv_events']}",
            f"tcp://127.0.0.1:{launch.ports['kv_replay']}",
        )
        events = {
            "publisher": "zmq",
            "bind": True,
            "endpoint": live,
            "replay_endpoint": replay,
            "topic": TOPIC,
        }
        argv += ["--kv-events-config", to_json(events)]
    return argv


def _user_flags(launch: EngineLaunch) -> list[str]:
    return flags({"enable-metrics": True, "page-size": PAGE_SIZE, **normalised(launch.args)})


def _environment(launch: EngineLaunch, number: int) -> dict[str, str]:
    rank = launch.ranks[number]
    env: dict[str, str] = {}
    if launch.disaggregated:
        env["SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT"] = str(TRANSFER_TIMEOUT_S)
        env["SGLANG_DISAGGREGATION_WAITING_TIMEOUT"] = str(TRANSFER_TIMEOUT_S)
        env["SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL"] = str(HEARTBEAT_S)
    return {**env, **launch.env, **devices(rank.gpus), "SGLANG_HOST_IP": rank.address}
