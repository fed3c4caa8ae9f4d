"""TensorRT-LLM: command lines, its YAML, ports, checks, statistics. Written against 1.2.

Scalars that `trtllm-serve` has a flag for become flags; everything else in `args` goes into the YAML file
that `--config` names, on top of what dynctl puts there. The file is written as JSON, which is YAML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from dynctl.command import Command
from dynctl.engines import log_lines, vllm_metrics
from dynctl.engines.arguments import devices, flag_names, flags, normalised, program
from dynctl.engines.base import (
    ArgValue,
    Canary,
    Continuation,
    EngineEnvironment,
    EngineInfo,
    EngineLaunch,
    EngineLoad,
    Features,
    Finding,
    Inquiry,
    KvPoll,
    KvReader,
    ModelFacts,
    Naming,
    Parallel,
    PrefillDecode,
    Readiness,
    RoleSettings,
)
from dynctl.engines.checks import number
from dynctl.engines.inquiry import version_of
from dynctl.engines.requests import one_token
from dynctl.engines.trtllm_checks import FLAGS, OWNED, check_role, check_transfer, longest_input
from dynctl.engines.trtllm_disagg import PARAMS, TRANSFER_TIMEOUT_S, ContextFirst
from dynctl.engines.trtllm_kv import PollReader
from dynctl.errors import PlacementError
from dynctl.protocol.instances import Role

BACKENDS: Mapping[str, str] = {"nixl": "NIXL", "ucx": "UCX", "mooncake": "MOONCAKE"}
"""How the KV cache can move, and the engine's word for it; MOONCAKE came after 1.2."""
EVENT_BUFFER = 16384
"""Events the engine keeps between two polls."""
EVENTS_PATH = "/kv_cache_events"
POLL_TIMEOUT_S = 60.0
"""Newer releases answer at once, older ones when 2 s have passed without an event."""
BLOCK_SIZE = 32
"""The engine's own default of `tokens_per_block`."""
_OF_EVERY_RANK = ("CUDA_VISIBLE_DEVICES", "DYNCTL_INCARNATION", "DYNCTL_PROCESS", "DYNCTL_RUN")
"""What MPI has to take along to the other nodes beside the recipe's: their GPUs, and whose they are."""
_MODULE = ("tensorrt_llm.commands.serve",)
_NAME = re.compile(r"^-{0,2}[a-z][a-z0-9_-]*$")


class Trtllm:
    """`trtllm-serve`: one MPI world per replica, OpenAI HTTP on its first rank."""

    name = "trtllm"
    features = Features(
        launches=True,
        disaggregation=True,
        kv_events="http-poll",
        data_parallel=False,
    )
    owned_args: Mapping[str, str] = OWNED
    # It lists the model's path or the last part of it; a flag for the served name came with 1.3.
    readiness = Readiness(health="/health", models="/v1/models", version="/version", lists_served_name=False)
    load_path = "/metrics"
    lora = None
    client_fields = frozenset({PARAMS})
    step_tokens = ("max_num_tokens", 8192)
    sequences_argument = "max_batch_size"
    cached_argument = ""
    media_name = ""
    file_arguments: frozenset[str] = frozenset()
    key_variable = ""
    continuation = Continuation(chat=None, completion_tokens=None)
    transfers: Mapping[str, PrefillDecode] = dict.fromkeys(BACKENDS, ContextFirst())
    either_role: frozenset[str] = frozenset()
    naming: Naming | None = None

    def port_needs(
        self, launch_role: Role, parallel: Parallel, *, disaggregated: bool, transfer: str = ""
    ) -> dict[str, int]:
        """HTTP alone: MPI and the KV transceiver find their own."""
        return {"http": 1}

    def commands(self, launch: EngineLaunch) -> tuple[Command, ...]:
        """One command, on the head: over several nodes it is the MPI launcher that starts the other ranks."""
        path = f"specs/trtllm-{launch.role}-{launch.index}.yaml"
        serve = program(launch.environment, "trtllm-serve", _MODULE)
        argv = (*_mpi(launch), *serve, launch.model.path, *_flags(launch, path))
        head = launch.ranks[0]
        env = {**launch.env, **devices(head.gpus)}
        return (Command(argv=argv, env=env, files={path: _yaml(launch)}),)

    def check(self, roles: Sequence[RoleSettings], facts: ModelFacts | None) -> list[Finding]:
        """Refusals of the engine and of its KV transceiver."""
        found = [finding for role in roles for finding in check_role(role, facts)]
        return found + check_transfer(roles, facts)

    def known_args(self, name: str) -> bool:
        """Lower-case letters, digits, underscores (dashes are read as such)."""
        return _NAME.match(name) is not None

    def inquiry(self, environment: EngineEnvironment) -> Inquiry:
        """Its subcommand by name: the help of the program itself lists only subcommands."""
        base = program(environment, "trtllm-serve", _MODULE)
        version = version_of(environment, ("tensorrt_llm", "tensorrt-llm"))
        return Inquiry(base[0], version, (*base, "serve", "--help"))

    def command_flags(self, args: Mapping[str, ArgValue]) -> tuple[str, ...]:
        """Those that are flags: all others go into its YAML file, of which its help says nothing."""
        return flag_names(_split(args)[0], "_")

    def kv_source(self, launch: EngineLaunch) -> KvPoll | None:
        """Its HTTP, as it has no publisher; None when the arguments leave it nothing to tell."""
        given = _settings(launch)["kv_cache_config"]
        cache = given if isinstance(given, dict) else {}
        if not (launch.kv_events and cache.get("event_buffer_max_size") and cache.get("enable_block_reuse")):
            return None
        size = number(cache.get("tokens_per_block")) or BLOCK_SIZE
        return KvPoll(path=EVENTS_PATH, block_size=size, timeout_s=POLL_TIMEOUT_S)

    def kv_reader(self, block_size: int) -> KvReader:
        """See `trtllm_kv.PollReader`."""
        return PollReader(block_size)

    def canary(self, model: str, role: Role) -> Canary:
        """A plain completion, whatever the role."""
        return one_token(model)

    def load(self, metrics: bytes) -> list[EngineLoad]:
        """See `load`."""
        return load(metrics)

    def info(self, models: bytes, metrics: bytes) -> EngineInfo:
        """Context length when the model list states it, blocks when the statistics do."""
        kv = _latest(metrics).get("kvCacheStats")
        stats = kv if isinstance(kv, dict) else {}
        return EngineInfo(
            block_size=_count(stats, "tokensPerBlock"),
            max_model_len=vllm_metrics.max_model_len(models),
            kv_blocks=_count(stats, "maxNumBlocks"),
        )

    def error_lines(self, log: Sequence[str], limit: int) -> list[str]:
        """See `log_lines.error_lines`."""
        return log_lines.error_lines(log, limit)


def load(metrics: bytes) -> list[EngineLoad]:
    """Load from the latest iteration's statistics; [] when the answer holds none.

    `/metrics` is JSON and empties when read, so no news ([]) does not mean no load. Key names differ between
    releases: what is absent counts as 0.
    """
    latest = _latest(metrics)
    if "numActiveRequests" not in latest:
        return []
    kv = latest.get("kvCacheStats")
    stats = kv if isinstance(kv, dict) else {}
    used, most = _count(stats, "usedNumBlocks"), _count(stats, "maxNumBlocks")
    return [
        EngineLoad(
            rank=0,
            running=_count(latest, "numActiveRequests"),
            waiting=_count(latest, "numQueuedRequests"),
            kv_usage=min(1.0, used / most) if most else 0.0,
            kv_blocks=most,
        )
    ]


def _latest(metrics: bytes) -> dict[str, Any]:
    try:
        raw = msgspec.json.decode(metrics)
    except msgspec.DecodeError:
        return {}
    last = raw[-1] if isinstance(raw, list) and raw else raw
    return last if isinstance(last, dict) else {}


def _count(stats: Mapping[str, Any], name: str) -> int:
    value = stats.get(name)
    return int(value) if isinstance(value, int | float) and value > 0 else 0


def _mpi(launch: EngineLaunch) -> tuple[str, ...]:
    """The launcher of a replica over several nodes: as many ranks per node as it has GPUs there.

    It gives all of them the same environment, so their GPUs must have the same indices on each node.
    """
    if len(launch.ranks) == 1:
        return ()
    per_node = {len(rank.gpus) for rank in launch.ranks}
    if len(per_node) != 1 or launch.parallel.gpus != sum(len(rank.gpus) for rank in launch.ranks):
        raise PlacementError(
            f"trtllm needs the same number of GPUs on each of the {len(launch.ranks)} nodes of a replica",
            where=f"{launch.role}-{launch.index}",
            hint="choose sizes whose product is a multiple of the nodes a replica needs",
        )
    if len({rank.gpus for rank in launch.ranks}) != 1:
        raise PlacementError(
            f"trtllm needs GPUs of the same indices on each of the {len(launch.ranks)} nodes of a replica",
            where=f"{launch.role}-{launch.index}",
            hint="give the replica whole nodes, or list them in the inventory so that they fill up alike",
        )
    if launch.environment.mpi:
        return _srun(launch)
    hosts = ",".join(f"{rank.address}:{len(rank.gpus)}" for rank in launch.ranks)
    environment = [part for name in sorted({*launch.env, *_OF_EVERY_RANK}) for part in ("-x", name)]
    world = str(launch.parallel.gpus)
    return ("mpirun", "-n", world, "--host", hosts, *environment, "trtllm-llmapi-launch")


def _srun(launch: EngineLaunch) -> tuple[str, ...]:
    """The same by Slurm: its step has no list of GPUs of its own, since they are set in each task."""
    head, world = launch.ranks[0], launch.parallel.gpus
    return (
        "srun",
        f"--mpi={launch.environment.mpi}",
        f"--nodes={len(launch.ranks)}",
        f"--ntasks={world}",
        f"--ntasks-per-node={len(head.gpus)}",
        f"--nodelist={','.join(rank.node for rank in launch.ranks)}",
        "trtllm-llmapi-launch",
    )


def _flags(launch: EngineLaunch, config: str) -> list[str]:
    model, sizes, head = launch.model, launch.parallel, launch.ranks[0]
    argv = ["--host", head.address, "--port", str(launch.ports["http"])]
    argv += ["--tp_size", str(sizes.tensor), "--pp_size", str(sizes.pipeline)]
    argv += ["--ep_size", str(sizes.expert)] if sizes.expert > 1 else []
    for flag, value in (
        ("--revision", model.revision),
        ("--tokenizer", model.tokenizer),
        ("--chat_template", model.chat_template),
    ):
        argv += [flag, value] if value else []
    own, _ = _split(launch.args)
    return [*argv, "--config", config, *flags(own, "_")]


def _split(args: Mapping[str, ArgValue]) -> tuple[dict[str, ArgValue], dict[str, ArgValue]]:
    """Arguments that are flags, and those for the YAML file."""
    known = normalised(args, "_")
    own = {name: value for name, value in known.items() if name in FLAGS}
    return own, {name: value for name, value in known.items() if name not in FLAGS and value is not None}


def _yaml(launch: EngineLaunch) -> str:
    return json.dumps(_settings(launch), indent=2, sort_keys=True) + "\n"


def _settings(launch: EngineLaunch) -> dict[str, Any]:
    """What the YAML file holds: dynctl's settings, and the recipe's on top."""
    settings: dict[str, Any] = {"enable_iter_perf_stats": True}
    cache: dict[str, Any] = {"enable_block_reuse": True}
    if launch.kv_events:
        cache["event_buffer_max_size"] = EVENT_BUFFER
    settings["kv_cache_config"] = cache
    if launch.disaggregated:
        transfer: dict[str, Any] = {
            "backend": BACKENDS[launch.transfer or "nixl"],
            "kv_transfer_timeout_ms": int(TRANSFER_TIMEOUT_S * 1000),
        }
        longest = longest_input(launch.args)
        if longest:
            transfer["max_tokens_in_buffer"] = longest
        settings["cache_transceiver_config"] = transfer
        if launch.role == "prefill":
            settings["disable_overlap_scheduler"] = True
    for name, value in _split(launch.args)[1].items():
        ours = settings.get(name)
        settings[name] = {**ours, **value} if isinstance(ours, dict) and isinstance(value, dict) else value
    return settings
