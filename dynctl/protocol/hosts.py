"""What is asked about a host and what it answers: both sides of `hostfacts`, which prints this as JSON."""

from __future__ import annotations

from typing import Any

import msgspec

from dynctl.errors import CodecError

FACTS_VERSION = 1


class EngineQuestion(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An engine's program, and what makes it print its version and its flags (() = not asked).

    The word `hostfacts.OWN` in them stands for the Python that has dynctl there.
    `env` is for these two commands; it is seen in the host's process list, so it holds no secrets.
    """

    argv0: str
    version_argv: tuple[str, ...] = ()
    help_argv: tuple[str, ...] = ()
    flag_lines: str = ""
    env: dict[str, str] = {}


class HostQuestion(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What to look at beside what is always told. Paths may begin with ~.

    `model` is a directory, or an id on the Hugging Face hub (ID or ID@REVISION). For `ports` it is told who
    listens there. `scratch` is a directory whose disk matters, `dynctl` the Pythons that may have dynctl.
    """

    paths: tuple[str, ...] = ()
    model: str = ""
    ports: tuple[int, ...] = ()
    engine: EngineQuestion | None = None
    scratch: str = ""
    dynctl: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The argument of `hostfacts`."""
        return msgspec.json.encode(self).decode()


class PythonFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The Python that answered."""

    path: str = ""
    version: str = ""


class DynctlFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Which dynctl a Python would run; `version` "" = none."""

    python: str
    version: str = ""


class GpuProcess(msgspec.Struct, frozen=True, kw_only=True):
    """Somebody on a GPU."""

    pid: int
    name: str = ""
    used_mib: int = 0


class GpuFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU; 0 and "" = not told."""

    index: int
    name: str = ""
    memory_mib: int = 0
    used_mib: int = 0
    driver: str = ""
    uuid: str = ""
    processes: list[GpuProcess] = []


class DiskFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes; `fstype` "" = not known."""

    free: int
    total: int
    fstype: str = ""


class Leftover(msgspec.Struct, frozen=True, kw_only=True):
    """A file in /dev/shm that no process that can be seen has open."""

    name: str
    bytes: int = 0
    age_s: float = 0.0
    owner: str = ""


class ShmFacts(msgspec.Struct, frozen=True, kw_only=True):
    """/dev/shm, and the largest of what was left there."""

    free: int
    total: int
    leftovers: list[Leftover] = []


class PathFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A path as the host's user finds it. `fingerprint` is the same for the same content, "" = not made.

    `unread`: what it was that could not be read, be it the path or a file of a model below it; "" = nothing.
    """

    exists: bool = False
    readable: bool = False
    is_dir: bool = False
    dev: int = 0
    fstype: str = ""
    fingerprint: str = ""
    unread: str = ""


class IbFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One port of an RDMA device. `state` is "ACTIVE" when it works, `link_layer` InfiniBand or Ethernet."""

    device: str
    port: int = 0
    state: str = ""
    rate: str = ""
    link_layer: str = ""


class ContainerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Versions, "" = not there; `pyxis` None = there is no Slurm to ask."""

    apptainer: str = ""
    enroot: str = ""
    pyxis: bool | None = None


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The engine's program: `found` is its path, "" = not there; `flags` None = not known, see `note`."""

    found: str = ""
    version: str = ""
    flags: list[str] | None = None
    note: str = ""


class HostFacts(msgspec.Struct, frozen=True, kw_only=True):
    """All of a host, as its user sees it. What a note speaks of has not been found out.

    `now` is the host's Unix time at the start and `took_s` how long it then took. `listening` are ports at
    any address. `ephemeral` is [first, last], `limits` name → [soft, hard] with -1 for none. `model_at` is
    where the model is, "" = not found; what is there is in `paths`, too.
    """

    v: int
    host: str
    user: str = ""
    uid: int = 0
    home: str = ""
    now: float = 0.0
    took_s: float = 0.0
    python: PythonFacts = PythonFacts()
    dynctl: list[DynctlFacts] = []
    path_dynctl: str = ""
    gpus: list[GpuFacts] = []
    gpu_note: str = ""
    gpu_devices: int = 0
    listening: list[int] = []
    holders: dict[str, str] = {}
    ephemeral: list[int] = []
    limits: dict[str, list[int]] = {}
    disk: dict[str, DiskFacts] = {}
    shm: ShmFacts | None = None
    paths: dict[str, PathFacts] = {}
    model_at: str = ""
    ib: list[IbFacts] = []
    modules: dict[str, bool | None] = {}
    env: dict[str, str] = {}
    interfaces: dict[str, list[str]] = {}
    containers: ContainerFacts = ContainerFacts()
    engine: EngineFacts | None = None
    slurm: dict[str, Any] | None = None
    notes: list[str] = []

    def note(self, probe: str) -> str:
        """Why a probe ("shm", "disk /data") has no answer; "" when it has one."""
        return next((note.partition(": ")[2] for note in self.notes if note.startswith(f"{probe}: ")), "")


def read_facts(output: bytes) -> HostFacts:
    """What `hostfacts` printed: its last line, after whatever a login shell says. Raises CodecError."""
    lines = [line for line in output.splitlines() if line.startswith(b"{")]
    if not lines:
        raise CodecError("the host printed no facts")
    try:
        facts = msgspec.json.decode(lines[-1], type=HostFacts)
    except msgspec.MsgspecError as error:
        raise CodecError(f"what the host printed is not its facts: {error}") from error
    if facts.v != FACTS_VERSION:
        raise CodecError(f"facts of version {facts.v} instead of {FACTS_VERSION}")
    return facts
