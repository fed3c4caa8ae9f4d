"""Registry messages: registration and renewal of leases, and membership as frontends see it.

Calls go to the controller's control socket (see `protocol.control`), membership changes come from its
publisher under topic `MEMBERSHIP`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from dynctl.protocol.instances import Instance

MEMBERSHIP = b"members"

InstanceState = Literal["ready", "draining", "silent"]
"""Only "ready" is given new requests. "silent": the engine has not answered for a while, but lives."""


class Register(msgspec.Struct, frozen=True, kw_only=True, tag="register"):
    """Take or take again the lease of `instance.id`. Answer: `LeaseReply`."""

    instance: Instance
    state: InstanceState = "ready"


class Renew(msgspec.Struct, frozen=True, kw_only=True, tag="renew"):
    """Keep a lease. Answer: `LeaseReply`; `unknown` asks the sender to register again."""

    id: str
    incarnation: int
    state: InstanceState = "ready"


class Leave(msgspec.Struct, frozen=True, kw_only=True, tag="leave"):
    """Give a lease back. Answer: `LeaseReply`."""

    id: str
    incarnation: int
    reason: str = ""


class LeaseReply(msgspec.Struct, frozen=True, kw_only=True):
    """`superseded`: a newer incarnation holds the seat, the sender must exit at once."""

    outcome: Literal["ok", "unknown", "superseded"]
    ttl_s: float = 0.0


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One instance and whether it may be given new requests."""

    instance: Instance
    state: InstanceState


class GetMembers(msgspec.Struct, frozen=True, kw_only=True, tag="members"):
    """Ask for everything. Answer: `Membership`."""


class Membership(msgspec.Struct, frozen=True, kw_only=True):
    """All members as of change `seq` of the registry that started as `epoch`.

    `wanted` is the replicas there should be by role; empty = it does not say.

    `complete` is false while a restarted registry still waits for the living to renew: a reader then adds
    what it is told but drops nothing.
    """

    epoch: int
    seq: int
    complete: bool
    members: list[Member]
    wanted: dict[str, int] = {}


class MembershipChange(msgspec.Struct, frozen=True, kw_only=True):
    """One numbered change. A reader that misses a number, or sees a new epoch, asks for `Membership`.

    `removed` comes first: an id in both was replaced by a newer incarnation. A change with neither is a beat:
    it only repeats the number of the last one, so that a reader notices one it has missed.
    """

    epoch: int
    seq: int
    upserts: list[Member] = []
    removed: list[str] = []
