"""Changes to a deployment that runs: what the verbs of day 2 ask its controller for."""

from __future__ import annotations

import msgspec


class Actor(msgspec.Struct, frozen=True, kw_only=True):
    """Who wants what: for the audit. `args` holds no secret. `force`: also when the deployment is locked."""

    user: str
    host: str
    verb: str
    args: list[str] = []
    force: bool = False


class ApplyCall(msgspec.Struct, frozen=True, kw_only=True):
    """Become what `plan` (its stored form) and `lock` (the resolved recipe) say, while serving.

    `base` is the digest of the plan they were made from: when that is no longer the plan, nothing is done.
    `restart` are seats to be replaced in any case. Answer: `Done`, before it is done; see `changing` of the
    deployment's view. `declined`: what was wanted and is given up by this, and why; it is shown until the
    next change.
    """

    actor: Actor
    base: str
    plan: str
    lock: str
    restart: list[str] = []
    declined: str = ""


class DrainCall(msgspec.Struct, frozen=True, kw_only=True):
    """Let these seats end and stay so, or (`back`) have them back. `limit_s`: for requests to end; 0: the
    recipe's. Answer: `Done`.
    """

    actor: Actor
    seats: list[str]
    back: bool = False
    limit_s: float = 0.0


class LockCall(msgspec.Struct, frozen=True, kw_only=True):
    """Refuse changes from now on, with this message; "" = allow them again. Answer: `Done`."""

    actor: Actor
    message: str = ""


class ExecCall(msgspec.Struct, frozen=True, kw_only=True):
    """Run a command where this seat is, with what its engine is started with. Answer: `ExecReply`."""

    actor: Actor
    seat: str
    argv: list[str]
    timeout_s: float = 60.0


class NodeRoom(msgspec.Struct, frozen=True, kw_only=True):
    """What is not to be had on a node: ports in use there, GPUs of other deployments with their names.

    `lost`: why it cannot be asked; "" = it was.
    """

    ports: list[int] = []
    gpus: dict[int, str] = {}
    lost: str = ""


class RoomReply(msgspec.Struct, frozen=True, kw_only=True):
    """What is not to be had, by node; nodes that the controller cannot ask about are missing."""

    nodes: dict[str, NodeRoom]


class ExecReply(msgspec.Struct, frozen=True, kw_only=True):
    """`code` is negative for a signal; of long outputs the end is kept."""

    code: int
    stdout: bytes
    stderr: bytes


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """It has been taken on; `changing` is what that means, "" = nothing was to be done."""

    changing: str
