"""Machines in a recipe or an inventory file: who they are, how SSH reaches them, what they have."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PlainValidator

from dynctl.recipe.section import Section

_MOST_GPUS = 64
_HOST_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,252}")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=/-]{0,63}")
_SSH_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@\\$-]{0,63}")
_SSH_HOST = re.compile(r"[A-Za-z0-9_:\[][A-Za-z0-9_.:%\]-]{0,252}")
_SSH_JUMP = re.compile(
    r"([A-Za-z0-9_][A-Za-z0-9_.-]{0,63}@)?([A-Za-z0-9_][\w.-]*|\[[0-9a-fA-F:.]+\])(:\d{1,5})?", re.ASCII
)


def _gpus(value: object) -> object:
    if value == "auto" or (
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_GPUS
    ):
        return value
    shown = repr(value) if isinstance(value, str | int | float) else f"a {type(value).__name__}"
    raise ValueError(f"must be a whole number from 0 to {_MOST_GPUS}, or auto, not {shown}")


def _ssh_user(value: str) -> str:
    if value and not _SSH_USER.fullmatch(value):
        raise ValueError(f"must be a user's name, not {value!r}")
    return value


def _host_name(value: str) -> str:
    if not _HOST_NAME.fullmatch(value):
        raise ValueError(
            f"must be letters, digits, dots, dashes and underscores, the first no dash, not {value!r}"
        )
    return value


def _ssh_host(value: str) -> str:
    if value and not _SSH_HOST.fullmatch(value):
        raise ValueError(f"must be a host name or an address, not {value!r}")
    return value


def _ssh_jump(value: str) -> str:
    if value not in ("", "none") and not all(_SSH_JUMP.fullmatch(hop) for hop in value.split(",")):
        raise ValueError(f"must be [USER@]HOST[:PORT], several with commas between, or none, not {value!r}")
    return value


def _label(value: str) -> str:
    if not _LABEL.fullmatch(value):
        raise ValueError(
            f"must be letters, digits, dots, dashes, underscores, = and /, at most 64, not {value!r}"
        )
    return value


def _directory(value: str) -> str:
    if value and not value.startswith(("/", "~/")):
        raise ValueError(f"must be an absolute path, or begin with ~/, not {value!r}")
    return value.rstrip("/")


Gpus = Annotated[
    int | Literal["auto"],
    PlainValidator(
        _gpus, json_schema_input_type=Annotated[int, Field(ge=0, le=_MOST_GPUS)] | Literal["auto"]
    ),
]


class HostDefaults(Section):
    """What hosts have in common: user, key and the like."""

    user: Annotated[str, AfterValidator(_ssh_user)] = ""
    """SSH user; default: what the SSH configuration says, else yours."""
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """SSH port; default: what the SSH configuration says, else 22."""
    key: str = ""
    """File of the private key; default: what the SSH configuration says, the agent, or the usual files."""
    proxy_jump: Annotated[str, AfterValidator(_ssh_jump)] = ""
    """Hosts to go through, as ssh -J takes them: [USER@]HOST[:PORT],...; "none" for a direct connection."""
    gpus: Gpus = 0
    """How many GPUs it has; auto: as many as are found there."""
    labels: list[Annotated[str, AfterValidator(_label)]] = Field(default_factory=list)
    """Words by which roles and frontends can ask for such hosts."""
    python: str = ""
    """Interpreter there that has dynctl, or that makes dynctl's environment with --bootstrap."""
    directory: Annotated[str, AfterValidator(_directory)] = ""
    """Where dynctl keeps its runs there; default: ~/.dynctl."""


class Host(HostDefaults):
    """One machine."""

    name: Annotated[str, AfterValidator(_host_name)]
    """Short unique name."""
    address: Annotated[str, AfterValidator(_ssh_host)] = ""
    """IP address or host name on the data network; default: the name."""
    host: Annotated[str, AfterValidator(_ssh_host)] = ""
    """What SSH connects to, a host of the SSH configuration too; default: the name."""
