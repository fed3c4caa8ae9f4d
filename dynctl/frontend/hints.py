"""What a client says of where its request should go: by headers, or in `nvext` as for NVIDIA Dynamo.

| dynctl's header | Dynamo's header | `nvext` |
|---|---|---|
| x-dynctl-worker | x-dynamo-worker-instance-id | backend_instance_id, decode_worker_id |
| x-dynctl-prefill-worker | x-dynamo-prefill-instance-id | prefill_worker_id |
| x-dynctl-rank | x-dynamo-dp-rank | dp_rank |
| x-dynctl-prefill-rank | x-dynamo-prefill-dp-rank | prefill_dp_rank |
| x-dynctl-session-id | x-dynamo-session-id | |
| x-dynctl-session-final | x-dynamo-session-final | |
| x-dynctl-priority | x-dynamo-request-priority | agent_hints.priority |
| | | agent_hints.osl |
| x-dynctl-dry-run | | annotations: query_instance_id |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from dynctl.errors import RequestError
from dynctl.frontend.body import Body, excerpt
from dynctl.protocol.instances import Role

MAX_SESSION_CHARS = 256
MAX_PRIORITY = 1_000_000
MAX_OUTPUT_TOKENS = 1_000_000
QUERY_ANNOTATION = "query_instance_id"


@dataclass(frozen=True, slots=True)
class Hints:
    """`worker` and `rank` are for the leg that answers, `prefill_*` for the prefill leg; "" and None = free.

    `session_final`: no further request of `session` comes. `dry_run`: only say where it would go.
    `expected_output` in tokens, None = not said.
    """

    session: str = ""
    session_final: bool = False
    worker: str = ""
    prefill_worker: str = ""
    rank: int | None = None
    prefill_rank: int | None = None
    priority: int = 0
    expected_output: int | None = None
    dry_run: bool = False

    def pin(self, role: Role) -> tuple[str, int | None]:
        """The worker and rank asked for in `role`."""
        if role == "prefill":
            return self.prefill_worker, self.prefill_rank
        return self.worker, self.rank


NO_HINTS = Hints()


class _AgentHints(msgspec.Struct):
    priority: float | None = None
    osl: int | None = None


class _Nvext(msgspec.Struct):
    annotations: list[str] | None = None
    backend_instance_id: str | int | None = None
    decode_worker_id: str | int | None = None
    prefill_worker_id: str | int | None = None
    dp_rank: int | None = None
    prefill_dp_rank: int | None = None
    agent_hints: _AgentHints | None = None


_TEXT = {
    b"x-dynctl-worker": "worker",
    b"x-dynamo-worker-instance-id": "worker",
    b"x-dynctl-prefill-worker": "prefill_worker",
    b"x-dynamo-prefill-instance-id": "prefill_worker",
    b"x-dynctl-session-id": "session",
    b"x-dynamo-session-id": "session",
}
_NUMBERS = {
    b"x-dynctl-rank": "rank",
    b"x-dynamo-dp-rank": "rank",
    b"x-dynctl-prefill-rank": "prefill_rank",
    b"x-dynamo-prefill-dp-rank": "prefill_rank",
    b"x-dynctl-priority": "priority",
    b"x-dynamo-request-priority": "priority",
}
_FLAGS = {
    b"x-dynctl-session-final": "session_final",
    b"x-dynamo-session-final": "session_final",
    b"x-dynctl-dry-run": "dry_run",
}
_YES = (b"1", b"true", b"yes")
_NO = (b"0", b"false", b"no", b"")


def read_hints(headers: Iterable[tuple[bytes, bytes]], body: Body) -> Hints:
    """The hints of a request; headers go before `nvext`. Raises RequestError naming the header or field."""
    found: dict[str, Any] = {}
    for name, value in headers:
        if name.startswith(b"x-dyn"):
            _header(found, name, value)
    if "nvext" in body.fields:
        found = {**_from_nvext(body), **found}
    return replace(NO_HINTS, **found) if found else NO_HINTS


def _header(found: dict[str, Any], name: bytes, value: bytes) -> None:
    where = name.decode()
    if name in _TEXT:
        text = value.decode("utf-8", "replace")
        if len(text) > MAX_SESSION_CHARS:
            raise RequestError(f"{where} is longer than {MAX_SESSION_CHARS} characters", where=where)
        found[_TEXT[name]] = text
    elif name in _NUMBERS:
        found[_NUMBERS[name]] = _whole(value, where, negative=_NUMBERS[name] == "priority")
    elif name in _FLAGS:
        lowered = value.lower()
        if lowered not in _YES and lowered not in _NO:
            raise RequestError(f"{where} must be true or false", where=where)
        found[_FLAGS[name]] = lowered in _YES


def _whole(value: bytes, where: str, *, negative: bool) -> int:
    try:
        number = int(value)
    except ValueError:
        number = MAX_PRIORITY + 1
    if not (-MAX_PRIORITY if negative else 0) <= number <= MAX_PRIORITY:
        told = excerpt(value.decode("utf-8", "replace"))
        raise RequestError(f"{where} must be a whole number up to {MAX_PRIORITY}, not {told!r}", where=where)
    return number


def _from_nvext(body: Body) -> Mapping[str, Any]:
    """What `nvext` says, without what it leaves open; fields that dynctl has no use for are passed over."""
    try:
        given = msgspec.json.decode(body.fields["nvext"], type=_Nvext | None) or _Nvext()
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"`nvext` is not as it should be: {error}", where="nvext") from error
    hints = given.agent_hints or _AgentHints()
    worker = given.backend_instance_id if given.decode_worker_id is None else given.decode_worker_id
    found = {
        "worker": _name(worker),
        "prefill_worker": _name(given.prefill_worker_id),
        "rank": given.dp_rank,
        "prefill_rank": given.prefill_dp_rank,
        "priority": None if hints.priority is None else _clamped(hints.priority),
        "expected_output": None if hints.osl is None else max(0, min(MAX_OUTPUT_TOKENS, hints.osl)),
        "dry_run": True if QUERY_ANNOTATION in (given.annotations or ()) else None,
    }
    return {name: value for name, value in found.items() if value is not None}


def _name(given: str | int | None) -> str | None:
    name = None if given is None else str(given)
    if name is not None and len(name) > MAX_SESSION_CHARS:
        raise RequestError(f"`nvext` names a worker by over {MAX_SESSION_CHARS} characters", where="nvext")
    return name


def _clamped(priority: float) -> int:
    return int(max(-MAX_PRIORITY, min(MAX_PRIORITY, priority)))
