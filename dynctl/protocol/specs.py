"""What the orchestration hands to a process it starts, as one JSON file named on its command line.

Written by `deploy.plan` as `Command.files`, read by the process. Paths are absolute, or relative to the run
directory (the process's working directory). No secret is in here but by the path of the file that holds it.
"""

from __future__ import annotations

import msgspec

from dynctl.protocol.instances import ModelCard, Role


class EngineProcess(msgspec.Struct, frozen=True, kw_only=True):
    """The engine's own command: argument list, what is added to the environment, its working directory."""

    argv: list[str]
    env: dict[str, str] = {}
    cwd: str = ""


class KvPollSpec(msgspec.Struct, frozen=True, kw_only=True):
    """KV events that are fetched from the engine (see `engines.base.KvPoll`); `path` is below its URL."""

    path: str
    method: str
    interval_s: float
    timeout_s: float
    block_size: int


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One sidecar. `engine` None = the engine runs elsewhere already (`url` reaches it).

    `follower`: the sidecar of a further node of a multi-node replica: it supervises its engine process and
    registers nothing. The incarnation comes by environment DYNCTL_INCARNATION, since it differs per start.
    `kv_endpoints`/`kv_replay_endpoints`: engine publishers by data-parallel rank; empty = none.
    `kv_poll`: where KV events are fetched instead. Neither = the engine tells none.
    `engine_key_file` holds the API key that the engine is given as `engine_key_variable` and asks for; "" =
    none. `canary_interval_s`: idle for so long it is asked to generate a token; 0 = never.
    """

    id: str
    role: Role
    index: int
    node: str
    backend: str
    model: ModelCard
    url: str
    registry: str
    keys_file: str
    bind_host: str
    events_port: int
    control_port: int
    engine: EngineProcess | None = None
    engine_log: str = ""
    follower: bool = False
    dp_size: int = 1
    bootstrap_port: int = 0
    kv_transfer: str = ""
    kv_endpoints: list[str] = []
    kv_replay_endpoints: list[str] = []
    kv_topic: str = ""
    kv_poll: KvPollSpec | None = None
    engine_key_file: str = ""
    engine_key_variable: str = ""
    canary_interval_s: float = 30.0
    canary_timeout_s: float = 10.0
    start_timeout_s: float = 900.0
    drain_timeout_s: float = 30.0
    stop_timeout_s: float = 10.0


class GuardSpec(msgspec.Struct, frozen=True, kw_only=True):
    """When a worker gets nothing more while others are better off. Rules as in `router.guard`."""

    enabled: bool = True
    requests_ratio: float = 1.5
    requests_slack: int = 8
    kv_usage: float = 0.95


class AffinitySpec(msgspec.Struct, frozen=True, kw_only=True):
    """Whether requests of one session go to one worker: `off`, `soft` or `hard` (see `router.affinity`)."""

    mode: str = "off"
    ttl_s: float = 600.0
    sessions: int = 100_000


class ConditionalDisaggSpec(msgspec.Struct, frozen=True, kw_only=True):
    """When decode reads a prompt itself: `off`, `isl`, `load` or `either` (see `router.conditional`).

    `prefill_busy_tokens`: tokens waiting on the least busy prefill worker from which on prefill is busy.
    """

    mode: str = "off"
    max_tokens: int = 2048
    max_ratio: float = 0.7
    prefill_busy_tokens: int = 65_536


class QueueSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that wait while all workers are busy (see `frontend.queue`); `limit` 0 = none do.

    `threshold`: prompt tokens waiting at a worker from which on it has enough, in batches of its engine; 0 =
    it never has. `limit_tokens` 0 = no limit.
    """

    policy: str = "fcfs"
    threshold: float = 4.0
    limit: int = 4096
    limit_tokens: int = 0
    deadline_s: float = 600.0


class BusySpec(msgspec.Struct, frozen=True, kw_only=True):
    """From where on a worker is busy; None = there is no such threshold.

    `decode_blocks`: share of its KV blocks in use. `prefill_tokens`: prompt tokens to be computed, and
    `prefill_share` of what its engine computes per step.
    """

    decode_blocks: float | None = None
    prefill_tokens: int | None = None
    prefill_share: float | None = None


class RouterSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose a worker. Weights as in `router.cost`.

    `index_blocks`: most blocks indexed, over all workers and tiers. `enforce_disagg`: decode workers do not
    stand in for prefill workers of which none is there.
    """

    mode: str = "kv"
    overlap_credit: float = 6.0
    overlap_decay: float = 0.0
    host_tier_credit: float = 0.75
    disk_tier_credit: float = 0.25
    prefill_load_scale: float = 30.0
    decode_request_weight: float = 0.0
    temperature: float = 0.0
    adapter_load_tokens: int = 4096
    events: str = "auto"
    approximate_ttl_s: float = 120.0
    approximate_cache: str = "ttl"
    predicted_ttl_s: float = 2.0
    index_blocks: int = 8_000_000
    guard: GuardSpec = GuardSpec()
    session_affinity: AffinitySpec = AffinitySpec()
    conditional_disagg: ConditionalDisaggSpec = ConditionalDisaggSpec()
    enforce_disagg: bool = False
    queue: QueueSpec = QueueSpec()


class LimitsSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Limits at the HTTP edge, in bytes and seconds."""

    body_bytes: int = 64 * 1024 * 1024
    header_bytes: int = 32 * 1024
    header_timeout_s: float = 10.0
    body_timeout_s: float = 60.0
    idle_timeout_s: float = 75.0
    request_timeout_s: float = 3600.0
    first_byte_timeout_s: float = 600.0
    stall_timeout_s: float = 300.0
    max_connections: int = 8192


class TracingSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Where spans go: base URL of an OTLP/HTTP collector, "" = nowhere; share of new traces recorded."""

    otlp_endpoint: str = ""
    sample_ratio: float = 1.0


class MigrationSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Streams that go on elsewhere when their worker is lost: how often (0 = never), up to which length.

    `max_tokens` counts prompt and answer together.
    """

    limit: int = 3
    max_tokens: int = 131_072


class ApiKeySpec(msgspec.Struct, frozen=True, kw_only=True):
    """An API key by its SHA-256 hex digest. `max_concurrent` requests at once per frontend, 0 = no limit;
    `admin`: it may change settings too.
    """

    name: str
    sha256: str
    max_concurrent: int = 0
    admin: bool = False


class FrontendSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One frontend. `roles` is what the model needs before it is ready: replicas wanted by role.

    `kv_transfer` is how the KV cache moves from prefill to decode ("" = the engine's own default).
    `address` is its node's, as others dial it. Of several frontends each publishes at `events_port` what it
    has in flight; 0 = there are no others. `own_port` 0 = `port` is its alone; else it shares that with the
    other frontends of its node, and answers at this one too.
    `sync_timeout_s`: how long it may wait for the workers' KV indexes before it listens.
    `api_keys` empty = no key asked for. `engine_key_file` holds the key that engines ask for ("" = none).
    """

    id: str
    index: int
    node: str
    host: str
    port: int
    address: str = ""
    own_port: int = 0
    events_port: int = 0
    registry: str
    membership: str
    keys_file: str
    backend: str
    model: ModelCard
    roles: dict[str, int]
    kv_transfer: str = ""
    router: RouterSpec = RouterSpec()
    limits: LimitsSpec = LimitsSpec()
    migration: MigrationSpec = MigrationSpec()
    busy: BusySpec = BusySpec()
    api_keys: list[ApiKeySpec] = []
    engine_key_file: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    metrics_prefix: str = "dynctl"
    tokenizer_cache_bytes: int = 128 * 1024 * 1024
    coalesce_s: float = 0.002
    tracing: TracingSpec = TracingSpec()
    sync_timeout_s: float = 10.0
    drain_timeout_s: float = 30.0
