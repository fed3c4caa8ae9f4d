"""One error tree. Each error says what failed, where, and what would be right.

Library errors are mapped to these at the edge where the library is called. `kind` is the stable name that
`--json` output and HTTP bodies carry; `where` is "file:line", "host" or "process", or "" when there is none.
"""

from __future__ import annotations

from typing import ClassVar


class DynctlError(Exception):
    """The root: catch this to show one message instead of a traceback."""

    kind: ClassVar[str] = "error"

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text} ({self.hint})" if self.hint else text


class UsageError(DynctlError):
    """The command was called in a way it cannot be: an unknown deployment, a name that is taken."""

    kind = "usage"


class RecipeError(DynctlError):
    """A recipe or inventory file is wrong; `where` is file:line."""

    kind = "recipe"


class PlacementError(DynctlError):
    """The recipe is sound but does not fit the nodes, GPUs or ports there are."""

    kind = "placement"


class LaunchError(DynctlError):
    """A process could not be started or did not live."""

    kind = "launch"


class ProcessExited(LaunchError):
    """A process ended that should have gone on. The message carries its exit code and last error lines."""

    kind = "process_exited"


class NotReady(LaunchError):
    """A process or deployment was not ready when its deadline passed."""

    kind = "not_ready"


class NodeSilent(LaunchError):
    """A node does not answer: what is on it may live on, and nothing can be started or changed there."""

    kind = "node_silent"


class SlurmError(LaunchError):
    """Slurm's programs could not do what was asked."""

    kind = "slurm"


class SlurmRejected(SlurmError):
    """Slurm refuses the job, for what it asks for."""

    kind = "slurm_rejected"


class SlurmUnreachable(SlurmError):
    """Slurm's controller does not answer: what has become of a job is not known."""

    kind = "slurm_unreachable"


class SshError(LaunchError):
    """A host could not be used over SSH, or refused what was asked of it; `where` is the host."""

    kind = "ssh"


class HostUnreachable(SshError):
    """No connection to the host, or to one on the way: unknown name, no route, refused."""

    kind = "host_unreachable"


class HostTimeout(SshError):
    """The host, or a command on it, did not answer in time."""

    kind = "host_timeout"


class HostLost(SshError):
    """The connection broke half-way: what was asked for may or may not have been done."""

    kind = "host_lost"


class HostKeyUnknown(SshError):
    """The host's key is in no known_hosts file."""

    kind = "host_key_unknown"


class HostKeyChanged(SshError):
    """The host has another key than the known one, or a revoked one."""

    kind = "host_key_changed"


class SshAuthRefused(SshError):
    """The host let nobody in with the keys there are."""

    kind = "ssh_auth"


class HostDiskFull(SshError):
    """There is no space left on the host, or no quota."""

    kind = "host_disk_full"


class HostPythonMissing(SshError):
    """The host has no Python that could be used."""

    kind = "host_python"


class HostDynctlMissing(SshError):
    """The host has no dynctl, or another version than this one."""

    kind = "host_dynctl"


class TransportError(DynctlError):
    """A message could not be exchanged."""

    kind = "transport"


class PeerLost(TransportError):
    """The other side closed or reset the connection before it had finished."""

    kind = "peer_lost"


class ConnectFailed(PeerLost):
    """No connection could be made: the request was not sent, so it may be sent elsewhere."""

    kind = "connect_failed"


class DeadlineExceeded(TransportError):
    """The other side did not answer in time."""

    kind = "deadline_exceeded"


class CodecError(TransportError):
    """Bytes that are not the message they should be."""

    kind = "codec"


class DiscoveryError(DynctlError):
    """The registry refused or could not be reached."""

    kind = "discovery"


class Superseded(DiscoveryError):
    """A newer incarnation holds this seat: the caller must exit."""

    kind = "superseded"


class RequestError(DynctlError):
    """A client's request cannot be served as it is."""

    kind = "request"


class ModelNotFound(RequestError):
    """The request names a model that is not served here."""

    kind = "model_not_found"


class Unauthorized(RequestError):
    """The request carries no API key, or a wrong one."""

    kind = "unauthorized"


class Forbidden(RequestError):
    """Whoever asks may not do this."""

    kind = "forbidden"


class ContextTooLong(RequestError):
    """Prompt plus asked-for tokens exceed the model's context."""

    kind = "context_length_exceeded"


class Rejected(RequestError):
    """The request was refused: no usable worker, or a draining server."""

    kind = "rejected"


class Overloaded(RequestError):
    """There is too much to do, of all clients or of this one: to be sent again after `retry_after_s`."""

    kind = "overloaded"

    def __init__(self, message: str, *, retry_after_s: float = 1.0, where: str = "", hint: str = "") -> None:
        super().__init__(message, where=where, hint=hint)
        self.retry_after_s = retry_after_s


class EngineFailed(RequestError):
    """The engine answered with an error, or broke its contract."""

    kind = "engine_failed"


class PortInUse(LaunchError):
    """A port that a process must listen on is taken."""

    kind = "port_in_use"


class ProfileError(DynctlError):
    """A performance profile is missing, unreadable or has the wrong shape; `where` is the file."""

    kind = "profile"


class PlannerError(DynctlError):
    """What the planner is told to go by does not fit together; `where` is the field or file."""

    kind = "planner"
