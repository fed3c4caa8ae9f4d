"""The simulated engine that comes with dynctl: `python -m dynctl.mocker`, with vLLM's API and contracts."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dynctl.command import Command
from dynctl.engines import kv_dialect, log_lines, vllm_metrics
from dynctl.engines.arguments import (
    both_spellings,
    container,
    flag_names,
    flags,
    normal_name,
    normalised,
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
from dynctl.engines.checks import Setting, argument, check_names, check_pair, error, number
from dynctl.engines.inquiry import version_of
from dynctl.engines.requests import one_token
from dynctl.engines.vllm_disagg import NixlPull
from dynctl.hub import ASSETS
from dynctl.protocol.instances import Role

TOPIC = "kv-events"
DRAIN_S = 5
"""`--shutdown-timeout` unless the recipe gives one: the sidecar has drained before, this is the rest."""

_PLACED = "hosts and the parallel sizes (dynctl places ranks)"
OWNED = both_spellings(
    {
        "model": "model.path",
        "served-model-name": "model.served_name",
        "tokenizer": "model.tokenizer",
        "chat-template": "model.chat_template",
        "host": "hosts (the engine's address)",
        "port": "nothing: dynctl allocates it",
        "side-channel-host": "hosts (the engine's address)",
        "tensor-parallel-size": "roles.<role>.tensor_parallel",
        "pipeline-parallel-size": "roles.<role>.pipeline_parallel",
        "data-parallel-size": "roles.<role>.data_parallel",
        "kv-transfer-config": "roles (prefill and decode)",
        "kv-events-config": "router.mode",
    }
)
ARGUMENTS = frozenset(
    {
        "max-model-len",
        "block-size",
        "num-gpu-blocks-override",
        "max-num-seqs",
        "max-num-batched-tokens",
        "enable-chunked-prefill",
        "enable-prefix-caching",
        "shutdown-timeout",
        "default-max-tokens",
        "mean-output-tokens",
        "profile",
        "speedup",
        "fault-slow-start",
        "fault-die-at-start",
        "fault-crash-after-tokens",
        "fault-hang",
        "fault-refuse",
        "fault-event-loss",
    }
)
"""What a recipe may set. A switch also has its `no-` form."""
_SWITCHES = frozenset({"enable-chunked-prefill", "enable-prefix-caching", "fault-hang", "fault-refuse"})

_PAIR = (Setting(("block-size",), 16, "prefill's blocks do not fit decode's: the transfer is refused"),)
_BLOCKS, _SIZE, _CONTEXT = ("num-gpu-blocks-override",), ("block-size",), ("max-model-len",)


def assets_dir(name: str = "tiny") -> Path:
    """The model directory that comes with dynctl under that name (tokenizer, chat template, config)."""
    return ASSETS / name


class Mocker:
    """One process per replica, on one node, without GPUs."""

    name = "mocker"
    features = Features(
        launches=True,
        disaggregation=True,
        kv_events="zmq",
        gpus=False,
        multi_node=False,
    )
    owned_args = OWNED
    readiness = Readiness(health="/health", models="/v1/models")
    load_path = "/metrics"
    lora = LoraPaths("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
    client_fields = frozenset({"kv_transfer_params"})
    step_tokens = ("max-num-batched-tokens", 8192)
    sequences_argument = "max-num-seqs"
    cached_argument = ""
    media_name = "uuid"
    file_arguments = frozenset({"profile"})
    key_variable = "VLLM_API_KEY"
    continuation = CONTINUES_AND_HOLDS_BACK
    transfers: Mapping[str, PrefillDecode] = {"nixl": NixlPull()}
    either_role = frozenset({"nixl"})
    naming: Naming | None = None

    def port_needs(
        self, launch_role: Role, parallel: Parallel, *, disaggregated: bool, transfer: str = ""
    ) -> dict[str, int]:
        """One per data-parallel rank for events and their replay. Transfers go over the HTTP port."""
        return {"http": 1, "kv_events": parallel.data, "kv_replay": parallel.data}

    def commands(self, launch: EngineLaunch) -> tuple[Command, ...]:
        """The one process of a replica."""
        sizes, head, model = launch.parallel, launch.ranks[0], launch.model
        argv = [*_python(launch.environment), "-m", "dynctl.mocker", "--model", model.path]
        argv += ["--served-model-name", model.served_name]
        for flag, value in (("--tokenizer", model.tokenizer), ("--chat-template", model.chat_template)):
            argv += [flag, value] if value else []
        argv += ["--host", head.address, "--port", str(launch.ports["http"])]
        for flag, size in (
            ("--tensor-parallel-size", sizes.tensor),
            ("--pipeline-parallel-size", sizes.pipeline),
            ("--data-parallel-size", sizes.data),
        ):
            argv += [flag, str(size)] if size > 1 else []
        argv += [*_kv_flags(launch), *_user_flags(launch)]
        return (Command(argv=tuple(argv), env=dict(launch.env)),)

    def check(self, roles: Sequence[RoleSettings], facts: ModelFacts | None) -> list[Finding]:
        """What the mocker refuses to start with, and what prefill and decode must agree on."""
        found = [finding for role in roles for finding in (*check_names(role, OWNED), *_room(role))]
        return found + check_pair(roles, _PAIR)

    def known_args(self, name: str) -> bool:
        """Exactly the mocker's own flags."""
        plain = normal_name(name)
        return plain in ARGUMENTS or (plain.startswith("no-") and plain[3:] in _SWITCHES)

    def inquiry(self, environment: EngineEnvironment) -> Inquiry:
        """The Python that has dynctl."""
        python = _python(environment)
        named = environment if environment.container else EngineEnvironment(python=python[0])
        return Inquiry(python[0], version_of(named, ("dynctl",)), (*python, "-m", "dynctl.mocker", "--help"))

    def command_flags(self, args: Mapping[str, ArgValue]) -> tuple[str, ...]:
        """All of them."""
        return flag_names(_switched(args))

    def kv_source(self, launch: EngineLaunch) -> KvSource | None:
        """One publisher per data-parallel rank, on the loopback address."""
        if not launch.kv_events:
            return None
        events, replay = launch.ports["kv_events"], launch.ports["kv_replay"]
        ranks = range(launch.parallel.data)
        return KvSource(
            endpoints=tuple(f"tcp://127.0.0.1:{events + rank}" for rank in ranks),
            replay_endpoints=tuple(f"tcp://127.0.0.1:{replay + rank}" for rank in ranks),
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


def _python(environment: EngineEnvironment) -> tuple[str, ...]:
    """The Python that has dynctl: that of its node, unless the recipe names another."""
    if environment.python:
        inner: tuple[str, ...] = (environment.python,)
    elif environment.venv:
        inner = (f"{environment.venv.rstrip('/')}/bin/python",)
    else:
        inner = ("python3",) if environment.container else (environment.own or sys.executable,)
    return (*container(environment), *inner)


def _kv_flags(launch: EngineLaunch) -> list[str]:
    argv: list[str] = []
    if launch.disaggregated:
        argv += ["--kv-transfer-config", to_json({"kv_connector": "NixlConnector", "kv_role": "kv_both"})]
    if launch.kv_events:
        events = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": f"tcp://127.0.0.1:{launch.ports['kv_events']}",
            "replay_endpoint": f"tcp://127.0.0.1:{launch.ports['kv_replay']}",
            "topic": TOPIC,
        }
        argv += ["--kv-events-config", to_json(events)]
    return argv


def _user_flags(launch: EngineLaunch) -> list[str]:
    return flags({"shutdown-timeout": DRAIN_S, **_switched(launch.args)})


def _switched(args: Mapping[str, ArgValue]) -> dict[str, ArgValue]:
    """The recipe's arguments; false turns a switch off, where for other arguments it means "left out"."""
    return {
        f"no-{name}" if name in _SWITCHES and value is False else name: (
            True if name in _SWITCHES and value is False else value
        )
        for name, value in normalised(args).items()
    }


def _room(role: RoleSettings) -> list[Finding]:
    """The cache must hold one request of full length, when all three numbers are given."""
    values = [argument(role, names) for names in (_BLOCKS, _SIZE, _CONTEXT)]
    blocks, size, context = (number(found[1]) if found else None for found in values)
    if not (values[0] and blocks and context) or blocks * (size or 16) >= context:
        return []
    text = f"{blocks} blocks of {size or 16} tokens hold less than one request of max-model-len {context}"
    return [error(role, f"args.{values[0][0]}", text)]
