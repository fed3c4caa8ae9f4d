"""Engines that already run: dynctl starts nothing, it routes to their URLs and reads what they publish."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from dynctl.command import Command
from dynctl.engines import kv_dialect, log_lines, sglang, trtllm, vllm_metrics
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
from dynctl.engines.requests import one_token
from dynctl.engines.sglang import Sglang
from dynctl.engines.trtllm import Trtllm
from dynctl.engines.vllm import Vllm
from dynctl.protocol.instances import Role


class External:
    """Any server with OpenAI's API. Which engine it is shows only in its metrics and events."""

    name = "external"
    features = Features(
        launches=False,
        disaggregation=False,
        kv_events="zmq",
        gpus=False,
        data_parallel=False,
        multi_node=False,
    )
    owned_args: Mapping[str, str] = {}
    readiness = Readiness(health="/health", models="/v1/models")
    load_path = "/metrics"
    lora = LoraPaths("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
    client_fields = Vllm.client_fields | Sglang.client_fields | Trtllm.client_fields
    step_tokens = ("", 0)
    sequences_argument = ""
    cached_argument = ""
    media_name = ""
    file_arguments: frozenset[str] = frozenset()
    key_variable = ""
    continuation = CONTINUES_AND_HOLDS_BACK
    transfers: Mapping[str, PrefillDecode] = {}
    either_role: frozenset[str] = frozenset()
    naming: Naming | None = None

    def port_needs(
        self, launch_role: Role, parallel: Parallel, *, disaggregated: bool, transfer: str = ""
    ) -> dict[str, int]:
        """None: it has its ports."""
        return {}

    def commands(self, launch: EngineLaunch) -> tuple[Command, ...]:
        """None: it runs."""
        return ()

    def check(self, roles: Sequence[RoleSettings], facts: ModelFacts | None) -> list[Finding]:
        """Each role names URLs of servers, and nothing that only a started engine could take."""
        return [finding for role in roles for finding in _check_role(role)]

    def known_args(self, name: str) -> bool:
        """None is known: nothing is started."""
        return False

    def inquiry(self, environment: EngineEnvironment) -> Inquiry | None:
        """None: it is not started here."""
        return None

    def command_flags(self, args: Mapping[str, ArgValue]) -> tuple[str, ...]:
        """None."""
        return ()

    def kv_source(self, launch: EngineLaunch) -> KvSource | None:
        """What the recipe says."""
        return launch.external_kv

    def kv_reader(self, block_size: int) -> KvReader:
        """The dialect of vLLM and SGLang."""
        return kv_dialect.PayloadReader()

    def canary(self, model: str, role: Role) -> Canary:
        """A plain completion, whatever the role."""
        return one_token(model)

    def load(self, metrics: bytes) -> list[EngineLoad]:
        """Whichever engine's metrics are there; [] when none is recognised."""
        return vllm_metrics.load(metrics) or sglang.load(metrics) or trtllm.load(metrics)

    def info(self, models: bytes, metrics: bytes) -> EngineInfo:
        """What vLLM's metrics say, and the model list of any."""
        return vllm_metrics.info(models, metrics)

    def error_lines(self, log: Sequence[str], limit: int) -> list[str]:
        """See `log_lines.error_lines`; there is seldom a log."""
        return log_lines.error_lines(log, limit)


def _check_role(role: RoleSettings) -> list[Finding]:
    path = f"roles.{role.role}"
    found: list[Finding] = []
    if role.role != "aggregated":
        text = "external engines take whole requests only: use the role aggregated"
        found.append(Finding("error", path, text))
    if not role.urls:
        text = "backend external needs the engines' addresses, as in urls: [http://10.0.0.5:8000]"
        found.append(Finding("error", f"{path}.urls", text))
    for number, url in enumerate(role.urls):
        if not _is_base_url(url):
            text = f"{url!r} is no base address of a server; valid: http://host:port or https://host:port"
            found.append(Finding("error", f"{path}.urls.{number}", text))
    for name in ("args", "env"):
        if getattr(role, name):
            found.append(
                Finding("error", f"{path}.{name}", "has no effect: external engines are not started")
            )
    return found


def _is_base_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    plain = not (parts.query or parts.fragment or parts.username) and parts.path in ("", "/")
    return plain and parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0
