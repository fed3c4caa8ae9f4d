"""The contract between dynctl and an inference engine. Pure: no sockets, no clock, no processes.

Each engine is one module beside this one with one class that implements `Engine`; `engines.catalog` maps the
recipe's `backend` name to it. Nothing outside this package names an engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from dynctl.command import Command
from dynctl.protocol.instances import Role
from dynctl.protocol.kv_events import EngineKvBatch

ArgValue = str | int | float | bool | None | dict[str, Any] | list[Any]
"""The value of an engine argument in a recipe: true = a bare flag, false/None = left out, dict = JSON."""


@dataclass(frozen=True, slots=True)
class Parallel:
    """Parallel sizes of one replica. `expert` > 1 turns expert parallelism on."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    expert: int = 1

    @property
    def gpus(self) -> int:
        """GPUs of one replica."""
        return self.tensor * self.pipeline * self.data


@dataclass(frozen=True, slots=True)
class Rank:
    """The part of a replica on one node: its address on the data network and its GPU indices there."""

    node: str
    address: str
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelRef:
    """The model as the recipe names it. Empty string = not given."""

    path: str
    served_name: str
    revision: str = ""
    tokenizer: str = ""
    chat_template: str = ""


@dataclass(frozen=True, slots=True)
class EngineEnvironment:
    """Where the engine's own code is: a venv, a python, a container image, or none (on PATH).

    `runtime`: what opens the container: apptainer in the command itself, or pyxis around the whole of it.
    `mounts` are "SRC:DST[:ro]". `mpi`: what starts ranks on several nodes; `srun` with this value for --mpi.
    `own` is the Python that runs dynctl on its node.
    """

    venv: str = ""
    python: str = ""
    container: str = ""
    runtime: Literal["apptainer", "pyxis"] = "apptainer"
    mounts: tuple[str, ...] = ()
    mpi: str = ""
    own: str = ""


@dataclass(frozen=True, slots=True)
class KvSource:
    """Where the engine publishes KV events, by data-parallel rank, as dialled by the sidecar beside it."""

    endpoints: tuple[str, ...]
    replay_endpoints: tuple[str, ...]
    topic: str = ""


@dataclass(frozen=True, slots=True)
class KvPoll:
    """Where KV events are fetched over the engine's own HTTP, by one reader: an answer empties the queue.

    `block_size` in tokens, of this launch. An answer that takes longer than `timeout_s` counts as lost.
    """

    path: str
    block_size: int
    method: str = "POST"
    interval_s: float = 0.025
    timeout_s: float = 10.0


class KvReader(Protocol):
    """Reads one engine's KV events, from its start on: may remember what earlier ones said."""

    def read(self, payload: bytes, now_s: float) -> list[EngineKvBatch]:
        """A message of the publisher, or an answer to a poll, in dynctl's terms.

        Unknown keys and event types are skipped. Raises CodecError for bytes that are none; what was
        remembered is not to be relied on then.
        """
        ...


@dataclass(frozen=True, slots=True)
class EngineLaunch:
    """All that a command line of one replica depends on.

    `ranks`: one per node, the head first. `ports`: first port of each block that `port_needs` asked for.
    `disaggregated`: prefill and decode are apart, `transfer` how the KV cache moves ("" = the first of
    `Engine.transfers`). `args` and `env` are the recipe's, engine-wide ones and the role's merged (the role
    wins). `external_kv`: what the recipe says of an engine that already runs.
    """

    model: ModelRef
    role: Role
    index: int
    parallel: Parallel
    ranks: tuple[Rank, ...]
    ports: Mapping[str, int]
    environment: EngineEnvironment = EngineEnvironment()
    args: Mapping[str, ArgValue] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    disaggregated: bool = False
    transfer: str = ""
    kv_events: bool = True
    external_kv: KvSource | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found wrong in a recipe. `field` is a dotted path in it ("roles.decode.args.block-size")."""

    level: Literal["error", "warning"]
    field: str
    message: str


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """From the model's config.json, when it is at hand. 0 or "" = not stated."""

    kv_heads: int = 0
    attention_heads: int = 0
    layers: int = 0
    max_position: int = 0
    dtype: str = ""


@dataclass(frozen=True, slots=True)
class RoleSettings:
    """What `Engine.check` sees of a role: merged args and env, sizes, the model string it will load."""

    role: Role
    replicas: int
    parallel: Parallel
    args: Mapping[str, ArgValue]
    env: Mapping[str, str]
    model: str
    urls: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Features:
    """The feature matrix, as `README` prints it. `launches` is false for engines that already run."""

    launches: bool
    disaggregation: bool
    kv_events: Literal["zmq", "http-poll", "none"]
    gpus: bool = True
    data_parallel: bool = True
    multi_node: bool = True


@dataclass(frozen=True, slots=True)
class LoraPaths:
    """HTTP paths. Both take {"lora_name"}, `load` also {"lora_path"}; they answer 200 when it is done."""

    load: str
    unload: str


@dataclass(frozen=True, slots=True)
class Readiness:
    """How to know that the engine really serves: `health` answers 200, and `models` lists the served name.

    `lists_served_name` false: the engine goes by the model's path whatever is asked for: any list will do.
    `version`: HTTP path of `{"version": ...}`, asked once; "" = nothing depends on it.
    """

    health: str = "/health"
    models: str = "/v1/models"
    version: str = ""
    lists_served_name: bool = True


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """An engine's load per data-parallel rank, read from its metrics.

    `work` is what it has done so far, in a unit of its own: whatever of its counters rise while it works.
    """

    rank: int
    running: int
    waiting: int
    kv_usage: float
    kv_blocks: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    work: int = 0


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the engine says of itself once ready; 0 = not said."""

    block_size: int = 0
    max_model_len: int = 0
    kv_blocks: int = 0


Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Handoff:
    """What decode needs from prefill. Used once, for the same prompt, and not after `expires_at_s`.

    `params` is opaque but for the checks made when it was built. `expires_at_s` is on the caller's monotonic
    clock. `finished` is set when prefill's answer is already the whole answer.
    """

    params: Json
    expires_at_s: float
    finished: bool = False


@dataclass(frozen=True, slots=True)
class Abort:
    """A POST that ends a request at its engine."""

    path: str
    body: Json


@dataclass(frozen=True, slots=True)
class Naming:
    """A request's `field` takes a name of the caller's, by which a POST to `abort_path` ends it.

    A name also ends requests whose names begin with it: names are to be of one length.
    """

    field: str
    abort_path: str

    def abort(self, name: str) -> Abort:
        """What ends the request of that name."""
        return Abort(self.abort_path, {self.field: name})


@dataclass(frozen=True, slots=True)
class Meeting:
    """What one try of a request knows of the prefill worker it goes to: where both legs meet.

    `room` is random, 1 to 2**63 - 1, and new for every try; `room` modulo `ranks` is the data-parallel rank
    that prefills, so steps of `ranks` stay on it. `peers` are what `PrefillDecode.peers` told, by rank;
    `version` the engine's own; () and "" = not known.
    """

    url: str
    bootstrap_port: int
    room: int
    ranks: int = 1
    peers: tuple[str, ...] = ()
    version: str = ""


@dataclass(frozen=True, slots=True)
class Continuation:
    """How an engine is asked to go on with an answer that another one had begun.

    `chat`: the fields by which the last message, the assistant's, is continued; None = it cannot.
    `completion_tokens`: the limit of a completion that names none; None = only the context's.
    `holds_back`: with stop strings, a stream always lacks the last characters that were generated, as many as
    the longest of them has less one.
    """

    chat: Mapping[str, Any] | None = None
    completion_tokens: int | None = 16
    holds_back: bool = False


_GOES_ON = {"continue_final_message": True, "add_generation_prompt": False}
CONTINUES_MESSAGE = Continuation(chat=_GOES_ON)
CONTINUES_AND_HOLDS_BACK = Continuation(chat=_GOES_ON, holds_back=True)


class PrefillDecode(Protocol):
    """The request contract of an engine with prefill and decode apart.

    `order` "prefill_first": `prefill_body` is sent, its answer read whole, `handoff` made of it, then
    `decode_body` sent. "concurrent": both bodies carry `link()` and are sent at once; decode's answer is the
    client's, `handoff` only judges prefill's. Bodies are copies: the request given is never changed.
    """

    @property
    def order(self) -> Literal["prefill_first", "concurrent"]:
        """Whether prefill's answer is needed before decode is asked."""
        ...

    @property
    def peers_path(self) -> str:
        """What a prefill worker's bootstrap server answers 200 once decode can find it; "" = it has none."""
        ...

    def peers(self, answer: bytes) -> tuple[str, ...]:
        """The names decode knows prefill's ranks by, by rank, from the answer at `peers_path`; () = none.

        Raises EngineFailed for an answer that is none.
        """
        ...

    def splits(self, request: Json) -> bool:
        """Whether this request can be prefilled elsewhere; else it goes to decode alone, as a plain one.

        False for requests of more than one sequence, which would use one hand-off several times, and for
        those that ask what only computing the prompt tells. Raises RequestError for what the engine can
        serve neither way.
        """
        ...

    def link(self, request: Json, meeting: Meeting) -> Json:
        """What ties both legs together; {} when the engine needs nothing. Asked for once per try.

        Given to both bodies whatever `order` is. Raises EngineFailed when the meeting lacks what it needs.
        """
        ...

    def abort(self, link: Json) -> tuple[Abort, ...]:
        """How to end a leg of `link` that nobody waits for; () = closing its connection does it at once."""
        ...

    def prefill_body(self, request: Json, link: Json) -> Json:
        """The prefill leg's body."""
        ...

    def handoff(self, answer: Json, now_s: float) -> Handoff:
        """Read prefill's answer. Raises EngineFailed when what decode needs is missing or incomplete.

        The request may then go to decode plain (`decode_body` without a hand-off), never with that answer.
        """
        ...

    def decode_body(self, request: Json, handoff: Handoff | None, link: Json) -> Json:
        """The decode leg's body; `handoff` None sends it with `link` alone or, prefill_first, plain."""
        ...


@dataclass(frozen=True, slots=True)
class Canary:
    """A POST that makes an engine generate one token: what is answered below 500 shows that it can."""

    path: str
    body: Json


@dataclass(frozen=True, slots=True)
class Inquiry:
    """How an installed engine is asked what it is, without being started.

    `program` must be there. What `version` prints ends with the version. `help` prints all flags, in lines
    that the regular expression `flag_lines` finds (its group begins with a flag), "" = those of argparse.
    `abbreviates`: its parser takes the beginning of a flag for the flag.
    """

    program: str
    version: tuple[str, ...] = ()
    help: tuple[str, ...] = ()
    flag_lines: str = ""
    abbreviates: bool = False


class Engine(Protocol):
    """All that dynctl knows of one engine."""

    name: str
    features: Features
    owned_args: Mapping[str, str]
    """Argument (without leading dashes) → the recipe field that sets it; refused in `args`."""
    readiness: Readiness
    load_path: str
    """HTTP path of the metrics that `load` reads."""
    lora: LoraPaths | None
    """Where LoRA adapters are loaded and unloaded while it runs; None = it cannot."""
    client_fields: frozenset[str]
    """Top-level request fields that only dynctl may set; removed from what clients send."""
    step_tokens: tuple[str, int]
    """The argument that limits the tokens computed per step, and its value unless given (0 = it depends)."""
    sequences_argument: str
    """The argument that limits the sequences of a data-parallel rank that run at once; "" = there is none."""
    cached_argument: str
    """The switch that has answers tell how much of the prompt was cached; "" = they tell, or never do."""
    media_name: str
    """The field of a chat's media parts that takes a name of the caller's, by which its KV events and block
    hashes know what is in them; "" = it makes names of its own."""
    file_arguments: frozenset[str]
    """Arguments that name a file beside the recipe: their paths are made whole."""
    key_variable: str
    """The environment variable that makes it ask for an API key; "" = there is none."""
    transfers: Mapping[str, PrefillDecode]
    """How the KV cache can move from prefill to decode, and the request contract of each; the first is the
    default, {} = prefill and decode cannot be apart."""
    either_role: frozenset[str]
    """Those of `transfers` with which an engine does prefill's part and decode's, whichever it is asked for:
    it is started alike for both, but for ports and GPUs, and may go from one to the other while it runs."""
    continuation: Continuation

    naming: Naming | None
    """How a request is ended by name; None = closing its connection ends it at once."""

    def port_needs(
        self, launch_role: Role, parallel: Parallel, *, disaggregated: bool, transfer: str = ""
    ) -> dict[str, int]:
        """Port blocks a replica needs on its head node: name → number of consecutive ports. "http" is one."""
        ...

    def commands(self, launch: EngineLaunch) -> tuple[Command, ...]:
        """One command per rank (node) of the replica, in the order of `launch.ranks`.

        Only the head's when the engine starts its other nodes itself (MPI); none for engines that run.
        `files` are relative to the run directory, which is the working directory. Raises PlacementError when
        the sizes cannot be spread over that many nodes.
        """
        ...

    def check(self, roles: Sequence[RoleSettings], facts: ModelFacts | None) -> list[Finding]:
        """What the engine is known to refuse or to do wrongly with these settings."""
        ...

    def known_args(self, name: str) -> bool:
        """Whether `name` is shaped like an argument of this engine (checked names, see each engine)."""
        ...

    def inquiry(self, environment: EngineEnvironment) -> Inquiry | None:
        """How the engine that is installed there is asked for its version and flags; None = it is not there.

        Its help may take a minute: engines import all they have for it.
        """
        ...

    def command_flags(self, args: Mapping[str, ArgValue]) -> tuple[str, ...]:
        """The flags ("--name") that these arguments become on its command line: its help must list them."""
        ...

    def kv_source(self, launch: EngineLaunch) -> KvSource | KvPoll | None:
        """Where KV events come from, or None when this launch has none."""
        ...

    def kv_reader(self, block_size: int) -> KvReader:
        """A new reader of KV events: one per publisher or polled engine, and per start of it.

        `block_size` is `KvPoll.block_size`; publishers tell it in each event.
        """
        ...

    def canary(self, model: str, role: Role) -> Canary:
        """What a sidecar asks of an engine of `role` that has nothing to do; its answer is thrown away."""
        ...

    def load(self, metrics: bytes) -> list[EngineLoad]:
        """Load by rank from the body of `load_path`; [] when it holds none."""
        ...

    def info(self, models: bytes, metrics: bytes) -> EngineInfo:
        """What `/v1/models` and the metrics say about block size and context length."""
        ...

    def error_lines(self, log: Sequence[str], limit: int) -> list[str]:
        """The lines of the engine's log that tell why it died, oldest first, at most `limit`."""
        ...
