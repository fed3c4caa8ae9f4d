"""Who of a role may get a request: not those that failed it, and only whom the client asks for. Pure."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

from dynctl.errors import Rejected, RequestError
from dynctl.protocol.registry import Member
from dynctl.router.request import Candidate, RouteRequest


def eligible(
    request: RouteRequest,
    candidates: Sequence[Candidate],
    there: Sequence[Member],
    gone: Container[tuple[str, str]] = (),
) -> Sequence[Candidate]:
    """Those of `candidates` (ready, of the request's role) that may get it; at least one.

    `there`: all members of the role, ready or not; `gone`: (role, id) of those there were, which may be back.
    Raises Rejected when there is none now, RequestError when the client asks for a worker or rank that does
    not exist.
    """
    name, rank = request.pinned, request.pinned_rank
    if name and (request.role, name) in gone and all(member.instance.id != name for member in there):
        raise Rejected(f"the worker asked for, {name}, is gone", hint="try again later, or ask for no worker")
    if there and (name or rank is not None):
        candidates = _asked_for(request, candidates, there)
    if request.exclude:
        candidates = [one for one in candidates if one.instance.id not in request.exclude]
    if not candidates:
        raise _nobody(request, there)
    return candidates


def _asked_for(
    request: RouteRequest, candidates: Sequence[Candidate], there: Sequence[Member]
) -> Sequence[Candidate]:
    """Those the client names. A name that is no worker of the role is its mistake; one not ready is not."""
    name, rank = request.pinned, request.pinned_rank
    found = [one for one in candidates if name in ("", one.instance.id) and rank in (None, one.key[1])]
    if found:
        return found
    named = [member for member in there if name in ("", member.instance.id)]
    if not named:
        known = ", ".join(sorted(member.instance.id for member in there)) or "none"
        raise RequestError(f"there is no worker {name!r} of role {request.role}", hint=f"there are: {known}")
    ranks = max(member.instance.dp_size for member in named)
    if rank is not None and not 0 <= rank < ranks:
        whose = f"worker {name!r}" if name else f"any worker of role {request.role}"
        raise RequestError(f"there is no rank {rank} at {whose}", hint=f"there are: 0 to {ranks - 1}")
    told = f"the worker asked for, {name}, is {states(named)}" if name else f"no worker has rank {rank} ready"
    raise Rejected(told, hint="try again later, or ask for no worker")


def _nobody(request: RouteRequest, there: Sequence[Member]) -> Rejected:
    ready = [member for member in there if member.state == "ready"]
    if ready and request.pinned:
        message = f"the worker asked for, {request.pinned}, failed this request"
    elif ready:
        message = f"no further worker of role {request.role} to try: all {len(ready)} failed this request"
    elif there:
        message = f"no worker of role {request.role} is ready: all {len(there)} are {states(there)}"
    else:
        message = f"no worker of role {request.role} is registered"
    return Rejected(message, hint="try again later")


def states(members: Iterable[Member]) -> str:
    """The states there are among `members`, in words."""
    return " or ".join(sorted({member.state for member in members}))
