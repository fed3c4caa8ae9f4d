"""The recipe: what a user writes, field by field. `dynctl schema` prints this file as JSON Schema.

Shapes only; what fields mean to each other is judged in `recipe.check`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from dynctl.engines import catalog
from dynctl.protocol.instances import Role
from dynctl.recipe.hosts import Host as Host
from dynctl.recipe.planner import Planner as Planner
from dynctl.recipe.section import Section as Section
from dynctl.recipe.slurm import Slurm as Slurm
from dynctl.recipe.units import Duration, Size

ROLES: tuple[Role, ...] = ("prefill", "decode", "aggregated", "encode")
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,46}[a-z0-9])?")
_ORIGIN = re.compile(r"https?://([\w.-]+|\[[0-9a-fA-F:.]+\])(:\d{1,5})?/?", re.ASCII)
_KEY_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PERCENTILE = re.compile(r"p\d{1,2}(\.\d+)?")


def _backend(value: str) -> str:
    if value not in catalog.names():
        raise ValueError(f"must be one of {', '.join(catalog.names())}, not {value!r}")
    return value


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError(f"must be lower-case letters, digits and dashes, at most 48, not {value!r}")
    return value


def _percentile(value: str) -> str:
    if not _PERCENTILE.fullmatch(value):
        raise ValueError(f"must be a percentile such as p50, p95 or p99.9, not {value!r}")
    return value


def _origin(value: str) -> str:
    if not _ORIGIN.fullmatch(value):
        raise ValueError(f"must be http://HOST:PORT or https://HOST:PORT, not {value!r}")
    return value


def _env_value(value: object) -> object:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        return value
    raise ValueError('must be a string; quote it ("1", "true")')


def _off(value: object) -> object:
    """`off` without quotes is the boolean false in YAML."""
    return "off" if value is False else value


def _api_keys(value: object) -> object:
    """One key or a list of them; a text alone is a key without a name."""
    given = value if isinstance(value, list) else [value]
    if any(isinstance(one, bool | int | float) for one in given):
        raise ValueError("must be a string, or a mapping with name and key; quote a key of digits")
    return [
        {"name": f"key-{number}", "key": one} if isinstance(one, str) else one
        for number, one in enumerate(given, 1)
    ]


def _key_name(value: str) -> str:
    if not _KEY_NAME.fullmatch(value):
        raise ValueError(f"must be letters, digits, dots, dashes and underscores, at most 64, not {value!r}")
    return value


Count = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=0, le=65535)]
Env = dict[str, Annotated[str, BeforeValidator(_env_value)]]
Args = dict[str, Any]
Weight = Annotated[float, Field(ge=0)]
Span = Annotated[Duration, Field(gt=0)]


class Model(Section):
    """The model to serve."""

    path: Annotated[str, Field(min_length=1)]
    """Hugging Face id (org/name), model directory, or builtin:NAME for one that comes with dynctl."""
    served_name: str = ""
    """Name in the API; default: the last part of the path."""
    revision: str = ""
    """Hugging Face revision (branch, tag or commit)."""
    tokenizer: str = ""
    """Directory or Hugging Face id of another tokenizer than the model's own."""
    chat_template: str = ""
    """File of another chat template than the model's own."""

    @property
    def name(self) -> str:
        """The name clients use."""
        return self.served_name or self.path.rstrip("/").rsplit("/", 1)[-1].removeprefix("builtin:")


class Canary(Section):
    """A generation of one token, for engines that have nothing to do: those that fail get no requests."""

    enabled: bool = True
    """Ask idle engines whether they still generate."""
    interval: Span = 30.0
    """Idle for so long, an engine is asked."""
    timeout: Span = 10.0
    """How long the token may take; the second in a row that is late takes the worker out of routing."""


class EngineSection(Section):
    """Where the engine's code is and what all its processes are given."""

    venv: str | None = None
    """Virtual environment that holds the engine."""
    python: str | None = None
    """Python interpreter that can import the engine, instead of a venv."""
    container: str | None = None
    """Container image that holds the engine."""
    runtime: Literal["apptainer", "pyxis"] = "apptainer"
    """What opens the container; pyxis is a part of Slurm."""
    mounts: list[Annotated[str, Field(pattern="^[^:,]+:[^:,]+(:(ro|rw))?$")]] = Field(default_factory=list)
    """What is seen of the host in the container, as SRC:DST or SRC:DST:ro."""
    device: Literal["gpu", "cpu"] = "gpu"
    """`cpu`: the engine is a CPU build; no GPU is looked for or given."""
    env: Env = Field(default_factory=dict)
    """Environment variables of every engine process."""
    kv_transfer: Annotated[str, Field(pattern="^[a-z_]*$")] = ""
    """How the KV cache moves from prefill to decode: nixl (the default), mooncake, mooncake_tcp, ucx, or
    nixl_both, with which a worker may change between the two while its engine runs."""
    args: Args = Field(default_factory=dict)
    """Arguments passed through to the engine, by their own names: true is a bare flag, a mapping is JSON."""
    canary: Canary = Field(default_factory=Canary)
    """Whether idle engines still generate."""
    start_timeout: Duration = 900.0
    """How long an engine may take until it is ready."""
    drain_timeout: Duration = 30.0
    """How long running requests may take to end when a worker or frontend is stopped."""
    stop_timeout: Duration = 10.0
    """How long an engine may take to exit after SIGTERM before it is killed."""


class RoleSection(Section):
    """One kind of worker: how many, how large, and what only these are given."""

    replicas: Count = 1
    """How many independent engines."""
    tensor_parallel: Count = 1
    """GPUs that share each layer."""
    pipeline_parallel: Count = 1
    """Stages of layers."""
    data_parallel: Count = 1
    """Data-parallel ranks inside one replica."""
    expert_parallel: Count = 1
    """More than 1 spreads the experts of a mixture-of-experts model."""
    args: Args = Field(default_factory=dict)
    """Engine arguments of this role, over `engine.args`."""
    env: Env = Field(default_factory=dict)
    """Environment variables of this role, over `engine.env`."""
    hosts: list[str] = Field(default_factory=list)
    """Hosts, groups or labels of the inventory that it may run on; default: all."""
    urls: list[str] = Field(default_factory=list)
    """Backend external only: base URLs of engines that already run, one for each replica."""
    kv_events: list[str] = Field(default_factory=list)
    """Backend external only: their KV event publishers (tcp://host:port), in the order of `urls`."""
    kv_replay: list[str] = Field(default_factory=list)
    """Backend external only: their replay sockets (tcp://host:port), in the order of `urls`."""


class Roles(Section):
    """Either `aggregated`, or `prefill` and `decode`."""

    prefill: RoleSection | None = None
    """Workers that only compute prompts."""
    decode: RoleSection | None = None
    """Workers that only generate, from the KV blocks of a prefill worker."""
    aggregated: RoleSection | None = None
    """Workers that do both."""
    encode: RoleSection | None = None
    """Workers that encode images; not supported yet."""

    def present(self) -> dict[Role, RoleSection]:
        """The roles given, in a fixed order."""
        found = {role: getattr(self, role) for role in ROLES}
        return {role: section for role, section in found.items() if section is not None}


class Tls(Section):
    """Certificate and key of the frontend, PEM files."""

    cert: str
    """Certificate chain file."""
    key: str
    """Private key file."""


class Limits(Section):
    """Limits at the HTTP edge."""

    body: Annotated[Size, Field(gt=0)] = 64 * 1024 * 1024
    """Largest request body."""
    headers: Annotated[Size, Field(gt=0)] = 32 * 1024
    """Largest request head."""
    header_timeout: Span = 10.0
    """For the head of a request to arrive."""
    body_timeout: Span = 60.0
    """For the body of a request to arrive."""
    idle_timeout: Span = 75.0
    """For the next request on an open connection."""
    request_timeout: Span = 3600.0
    """For a whole answer."""
    first_byte_timeout: Span = 600.0
    """For the first byte of an engine's answer."""
    stall_timeout: Span = 300.0
    """Between two parts of an engine's answer."""
    max_connections: Count = 8192
    """Open client connections."""


class Migration(Section):
    """Streams whose worker is lost go on from where they were on another worker."""

    limit: Annotated[int, Field(ge=0, le=100)] = 3
    """How often one stream may; 0 turns it off."""
    max_tokens: Count = 131_072
    """Tokens of prompt and answer together; a longer stream ends with an error instead."""


class Tracing(Section):
    """OpenTelemetry spans of the frontend: request, preprocess, route, prefill, decode."""

    otlp_endpoint: Annotated[str, AfterValidator(_origin)]
    """Base URL of a collector that takes OTLP over HTTP (JSON), such as http://localhost:4318."""
    sample_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the traces begun here that are recorded; where a client began it, it decides."""


class ApiKey(Section):
    """A key that opens the API. Only its digest is kept."""

    name: Annotated[str, AfterValidator(_key_name)]
    """What it is called in logs and metrics."""
    key: Annotated[str, Field(min_length=1)]
    """The key itself, env:NAME, file:PATH, or sha256:HEX."""
    max_concurrent: Annotated[int, Field(ge=0)] = 0
    """Most requests at once, in each frontend; more are refused (429). 0: no limit."""
    admin: bool = False
    """Whether it may change settings while running (/busy_threshold, LoRA adapters)."""


class Admission(Section):
    """From where on a worker is busy: it is passed over, and when all are, requests wait or are refused."""

    decode_blocks_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of a worker's KV blocks in use."""
    prefill_tokens_threshold: Annotated[int, Field(ge=0)] | None = None
    """Prompt tokens that a worker has still to compute."""
    prefill_share_threshold: Weight | None = None
    """The same as a multiple of what its engine computes per step."""


class Frontend(Section):
    """The OpenAI-compatible HTTP server."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all."""
    port: Port = 8000
    """Port to listen on; 0 takes a free one."""
    replicas: Count = 1
    """How many frontends. Those on one host share its port."""
    hosts: list[str] = Field(default_factory=list)
    """Hosts, groups or labels of the inventory to spread them over, in turn; default: the first host."""
    sync_timeout: Duration = 10.0
    """How long a starting frontend waits for the workers' KV indexes before it serves without them."""
    api_key: Annotated[
        list[ApiKey],
        BeforeValidator(_api_keys, json_schema_input_type=str | ApiKey | list[str | ApiKey]),
    ] = Field(default_factory=list)
    """Keys that clients must send, one or a list: the key, env:NAME, file:PATH, sha256:HEX, or a mapping."""
    admission: Admission = Field(default_factory=Admission)
    """When workers count as busy; changed while running at /busy_threshold."""
    tls: Tls | None = None
    """Serve HTTPS."""
    metrics_prefix: Literal["dynctl", "dynamo"] = "dynctl"
    """What the names in /metrics begin with; `dynamo`: the names NVIDIA Dynamo documents."""
    coalesce: Duration = 0.002
    """How long tokens may wait to be sent on together, while more than 20 come in that time; 0: never."""
    tokenizer_cache: Size = 128 * 1024 * 1024
    """Memory for the tokens of what prompts begin with; 0: every prompt is tokenised anew."""
    tracing: Tracing | None = None
    """Send OpenTelemetry spans to a collector."""
    limits: Limits = Field(default_factory=Limits)
    """Sizes, times and connections allowed."""
    migration: Migration = Field(default_factory=Migration)
    """Going on with a stream whose worker is lost."""


class Guard(Section):
    """When a worker gets nothing more, however much of the prompt it holds (mode kv)."""

    enabled: bool = True
    """Keep cached prefixes from piling up requests at few workers."""
    requests_ratio: Annotated[float, Field(ge=1)] = 1.5
    """A worker is crowded with more requests than this times the mean of all ..."""
    requests_slack: Annotated[int, Field(ge=0)] = 8
    """... and so many more."""
    kv_usage: Annotated[float, Field(gt=0, le=1)] = 0.95
    """With this share of its KV blocks in use, and requests waiting, a worker has no slack."""


class SessionAffinity(Section):
    """Whether the requests of one session (header x-dynctl-session-id) go to the same worker."""

    mode: Annotated[Literal["off", "soft", "hard"], BeforeValidator(_off)] = "off"
    """soft: while that worker is not overloaded; hard: as long as it can be chosen at all."""
    ttl: Span = 600.0
    """How long a session is remembered after its last request."""
    sessions: Count = 100_000
    """Most sessions remembered; the longest unused go first."""


class ConditionalDisagg(Section):
    """When a decode worker reads a prompt itself instead of getting it from a prefill worker."""

    mode: Annotated[Literal["off", "isl", "load", "either"], BeforeValidator(_off)] = "off"
    """isl: when little of the prompt is left to compute; load: when all prefill workers are busy."""
    max_tokens: Count = 2048
    """isl: fewer tokens than this are left to compute on the decode worker ..."""
    max_ratio: Annotated[float, Field(gt=0, le=1)] = 0.7
    """... and they are less than this share of the prompt."""
    prefill_busy_tokens: Count = 65_536
    """load: the least busy prefill worker has at least so many tokens to compute, or requests would have to
    wait for it (`router.queue`, `frontend.admission`).
    """


class Queue(Section):
    """Requests wait in the frontend while all workers have enough to do, and go to the first that has not."""

    policy: Literal["fcfs", "shortest"] = "fcfs"
    """Whose turn it is: who came first, or who has least to compute; both weighed with priority."""
    threshold: Weight = 4.0
    """A worker has enough when so many batches of prompt tokens wait there; 0: it never has."""
    limit: Annotated[int, Field(ge=0)] = 4096
    """Most requests that wait; more are refused (429). 0: nobody waits, who finds all busy is refused."""
    limit_tokens: Annotated[int, Field(ge=0)] = 0
    """Most prompt tokens that wait, of all requests together; 0: no limit."""
    deadline: Span = 600.0
    """Longest wait; then the request is refused (429)."""


class Router(Section):
    """How a worker is chosen for a request."""

    mode: Literal["kv", "least_loaded", "round_robin", "random", "power_of_two", "consistent_hash"] = "kv"
    """kv: the worker with the most of the prompt in its cache, weighed against load."""
    overlap_credit: Weight = 6.0
    """What a cached prompt block takes off the prefill load (mode kv); above 1, cached prefixes are worth
    waiting for: what is computed twice delays all others.
    """
    overlap_decay: Weight = 0.0
    """How fast the credit falls with prefill load above the least loaded worker's; 0: not (mode kv)."""
    host_tier_credit: Weight = 0.75
    """Part of the credit for blocks that are only in host memory (mode kv)."""
    disk_tier_credit: Weight = 0.25
    """Part of the credit for blocks that are only on disk (mode kv)."""
    prefill_load_scale: Weight = 30.0
    """What computing a prompt block weighs beside keeping one for decoding (mode kv)."""
    decode_request_weight: Weight = 0.0
    """Cost in blocks of each running request (mode kv)."""
    temperature: Weight = 0.0
    """0 takes the cheapest worker; more spreads over near ones (mode kv)."""
    adapter_load_tokens: Annotated[int, Field(ge=0)] = 4096
    """What loading a LoRA adapter costs, in prompt tokens: workers that have it are preferred by so much."""
    events: Literal["auto", "exact", "approximate"] = "auto"
    """What tells of cached blocks: the engines' KV events, or the router's own past choices; auto: the events
    of the workers that publish them (mode kv).
    """
    approximate_ttl: Duration = 120.0
    """How long a prompt counts as cached where it was sent, for workers without KV events."""
    approximate_cache: Literal["ttl", "lru"] = "ttl"
    """lru: until newer prompts fill the worker's KV blocks, instead of for approximate_ttl."""
    predicted_ttl: Duration = 2.0
    """How long a prompt counts as cached where it was sent before KV events tell; 0: only while it runs."""
    index_blocks: Annotated[int, Field(ge=1024)] = 8_000_000
    """Most cached blocks remembered, over all workers; the longest unused are forgotten first."""
    guard: Guard = Field(default_factory=Guard)
    """Keeps cached prefixes from overloading a worker."""
    session_affinity: SessionAffinity = Field(default_factory=SessionAffinity)
    """Sessions that stay on one worker."""
    queue: Queue = Field(default_factory=Queue)
    """Requests that wait while all workers are busy."""
    conditional_disagg: ConditionalDisagg = Field(default_factory=ConditionalDisagg)
    """Prompts that skip the prefill workers."""
    enforce_disagg: bool = False
    """While there is no prefill worker at all, refuse prompts (503) instead of having decode workers compute
    them, as engines can whose prefill comes first.
    """


class Sla(Section):
    """What users may expect; kept for profiling and planning."""

    ttft: Duration | None = None
    """Time to first token."""
    itl: Duration | None = None
    """Time between tokens."""
    percentile: Annotated[str, AfterValidator(_percentile)] = "p95"
    """Share of requests that must meet them."""


class Recipe(Section):
    """One LLM service: model, engine, workers, router, frontend."""

    schema_version: Literal["dynctl/v1"] = Field(alias="schema")
    """Format of this file: dynctl/v1."""
    name: Annotated[str, AfterValidator(_name)]
    """Name of the deployment."""
    description: str = ""
    """One line for people."""
    model: Model
    """Which model, under which name."""
    backend: Annotated[
        str, AfterValidator(_backend), Field(json_schema_extra={"enum": list(catalog.names())})
    ] = Field(description=f"The engine: {', '.join(catalog.names())}.")
    engine: EngineSection = Field(default_factory=EngineSection)
    """Where the engine is and what it is given."""
    roles: Roles
    """The workers."""
    frontend: Frontend = Field(default_factory=Frontend)
    """The HTTP server."""
    router: Router = Field(default_factory=Router)
    """How a worker is chosen."""
    sla: Sla | None = None
    """Service level wanted."""
    planner: Planner | None = None
    """Replicas by demand; without it there are as many as `roles` say."""
    target: Literal["local", "ssh", "slurm"] = "local"
    """Where to run."""
    hosts: list[Host] = Field(default_factory=list)
    """Machines to place workers on, when no inventory file is given."""
    slurm: Slurm | None = None
    """Slurm job options."""
