"""The hosts of a deployment on other machines: what is kept of them here, what they are asked, their sweep.

Without recipes and plans, which verbs on what runs do not need.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from dynctl.deploy.receive import Answer, Call, Sweep
from dynctl.errors import (
    CodecError,
    DynctlError,
    LaunchError,
    NotReady,
    PlacementError,
    PortInUse,
    UsageError,
)
from dynctl.topology.inventory import Ssh

ANSWER_S = 30.0


_KINDS: dict[str, type[DynctlError]] = {
    kind.kind: kind for kind in (UsageError, PlacementError, LaunchError, PortInUse, NotReady, CodecError)
}


class Done(Protocol):
    """How a command on a host ended."""

    @property
    def code(self) -> int: ...
    @property
    def stdout(self) -> bytes: ...
    @property
    def stderr(self) -> bytes: ...


class Shell(Protocol):
    """A host that commands can be run on. Raises LaunchError with the host when it cannot be reached."""

    async def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes | Awaitable[bytes] = b"",
        timeout_s: float,
        env: Mapping[str, str] | None = None,
    ) -> Done: ...


@dataclass(frozen=True, slots=True)
class HostSite:
    """What `up` needs of one host: `python` runs dynctl, `home` is its directory, `taken` are ports in use,
    `ssh` how it is reached, `busy` who uses which GPU, `dialled` the address SSH reached it at from here.
    """

    name: str
    shell: Shell
    python: str
    home: str
    taken: frozenset[int] = frozenset()
    ssh: Ssh = field(default_factory=Ssh)
    busy: Mapping[int, str] = field(default_factory=dict)
    dialled: str = ""

    async def ask(self, call: Call | Awaitable[Call], timeout_s: float = ANSWER_S) -> Answer:
        """Have dynctl on the host do something. Raises what it raised there, with the host's name.

        For a call that is still to come, dynctl is started there and waits for it.
        """
        argv = (self.python, "-m", "dynctl.deploy.receive")
        env = {"DYNCTL_HOME": self.home}
        stdin = _coming(call) if isinstance(call, Awaitable) else msgspec.json.encode(call)
        try:
            done = await self.shell.run(argv, stdin=stdin, timeout_s=timeout_s, env=env)
        finally:
            if inspect.iscoroutine(stdin) and inspect.getcoroutinestate(stdin) == inspect.CORO_CREATED:
                stdin.close()  # the host was lost before it was asked for
        lines = done.stdout.splitlines()
        try:
            told = msgspec.json.decode(lines[-1] if lines else b"", type=Answer)
        except msgspec.MsgspecError:
            said = done.stderr.decode("utf-8", "replace").strip().splitlines()
            why = said[-1] if said else f"exit code {done.code}"
            raise LaunchError(f"dynctl there did not answer: {why}", where=self.name) from None
        if told.error:
            where = f"{self.name}:{told.where}" if told.where else self.name
            raise _KINDS.get(told.error, LaunchError)(told.message, where=where, hint=told.hint)
        return told


async def _coming(call: Awaitable[Call]) -> bytes:
    return msgspec.json.encode(await call)


def raise_first(answers: Iterable[object]) -> None:
    """Raise what several hosts raised as one error, in which what is the same on many is said once."""
    errors = [one for one in answers if isinstance(one, BaseException)]
    if not errors:
        return
    known = [one for one in errors if isinstance(one, DynctlError)]
    if len(known) < 2 or len(known) < len(errors):
        raise errors[0]
    alike: dict[tuple[str, str], list[str]] = {}
    for error in known:
        alike.setdefault((error.message, error.hint), []).append(error.where)
    hint = known[0].hint if len({hint for _, hint in alike}) == 1 else ""
    told = [
        (", ".join(filter(None, wheres)), f"{message} ({own})" if own and not hint else message)
        for (message, own), wheres in alike.items()
    ]
    (where, message), *others = told
    rest = "".join(f"\n{at}: {text}" if at else f"\n{text}" for at, text in others)
    raise type(known[0])(message + rest, where=where, hint=hint) from known[0]


async def sweep(
    sites: Sequence[HostSite],
    run_id: str,
    drain_s: float,
    *,
    force: bool = True,
    at_once: bool = False,
    forget: str = "",
) -> dict[str, DynctlError]:
    """End what there is of a run: on the head by its controller if it has one, then on all other hosts.
    `at_once`: on all together, when the head has ended it already. With its name in `forget` its directories
    there are removed, too.

    Gives back why it could not be done, by host: these may have processes left. Raises UsageError for a run
    that is locked, unless by `force`.
    """
    limit_s = 3 * drain_s + ANSWER_S
    failed: dict[str, DynctlError] = {}

    async def one(site: HostSite) -> None:
        try:
            await site.ask(Sweep(run_id=run_id, drain_s=drain_s, force=force, forget=forget), limit_s)
        except UsageError:
            raise
        except DynctlError as error:
            failed[site.name] = error

    first = 0 if at_once else 1
    for site in sites[:first]:
        await one(site)
    await asyncio.gather(*(one(site) for site in sites[first:]))
    return failed
