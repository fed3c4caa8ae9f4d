"""What is kept of follow-up jobs: those that give a deployment more nodes, or some in place of lost ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from dynctl.errors import CodecError, LaunchError
from dynctl.launchers.files import write_atomic
from dynctl.launchers.slurm_job import JobRecord

RECORD = "followups.json"


class FollowUp(msgspec.Struct, frozen=True, kw_only=True):
    """One job: for so many nodes of a part of the deployment's own job, none of `avoid`.

    `nodes` once they are used, `started` when it then had started, in Slurm's words. `grows`: it is for more
    replicas, not in the place of lost nodes.
    """

    job: JobRecord
    wanted: int
    part: int = 0
    avoid: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    started: str = ""
    grows: bool = False


def load_follow_ups(run_dir: Path) -> list[FollowUp]:
    """The follow-up jobs of a run that are not known to have ended. Raises CodecError."""
    path = run_dir / RECORD
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[FollowUp])
    except FileNotFoundError:
        return []
    except (OSError, msgspec.MsgspecError) as error:
        raise CodecError(f"the record of follow-up jobs cannot be read: {error}", where=str(path)) from error


def save_follow_ups(run_dir: Path, follow_ups: Sequence[FollowUp]) -> None:
    """Write them into the run directory. Raises LaunchError."""
    try:
        write_atomic(run_dir / RECORD, msgspec.json.encode(list(follow_ups)))
    except OSError as error:
        raise LaunchError(
            f"the run directory cannot be written: {error.strerror}", where=str(run_dir)
        ) from error
