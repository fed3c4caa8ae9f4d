"""Which GPUs of this host the living runs have: two deployments share one only if they are told to.

Each run writes down its GPUs in its directory on the host (`gpus.json`); it counts while a process of the run
lives here. Directories of other hosts that share the file system are told apart by the host's name.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from dynctl.deploy.home import Home
from dynctl.errors import PlacementError
from dynctl.launchers.base import Launcher

FILE = "gpus.json"
SHARE_HINT = "end it, name other hosts or fewer GPUs, or share them by --share-gpus"


class GpuClaim(msgspec.Struct, frozen=True, kw_only=True):
    """A run's GPUs on one host."""

    name: str
    run_id: str
    host: str
    gpus: list[int]


def claim_of(name: str, run_id: str, gpus: Iterable[int]) -> str:
    """The content of `gpus.json` for this host."""
    made = GpuClaim(name=name, run_id=run_id, host=socket.gethostname(), gpus=sorted(gpus))
    return msgspec.json.encode(made).decode()


def require_free(home: Home, launcher: Launcher, gpus: Sequence[int], run_id: str = "") -> None:
    """See that no living run but `run_id` has any of these GPUs here. Raises PlacementError that names it."""
    wanted = set(gpus)
    if not wanted:
        return
    for claim in _claims(home):
        common = wanted.intersection(claim.gpus)
        if common and claim.run_id != run_id and launcher.owned(claim.run_id):
            shown = ", ".join(map(str, sorted(common)))
            raise PlacementError(f"'{claim.name}' has GPU {shown} already", where=claim.host, hint=SHARE_HINT)


def _claims(home: Home) -> Iterator[GpuClaim]:
    here = socket.gethostname()
    for path in [*home.runs.glob(f"*/{FILE}"), *(home.root / "nodes").glob(f"*/*/{FILE}")]:
        claim = _read(path)
        if claim is not None and claim.host == here:
            yield claim


def _read(path: Path) -> GpuClaim | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=GpuClaim)
    except (OSError, msgspec.MsgspecError):
        return None  # of a run that is being removed, or of another version of dynctl
