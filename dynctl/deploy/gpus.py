"""Which GPUs of this host the living runs have: two deployments share one only if they are told to.

Each run writes down its GPUs in its directory on the host (`gpus.json`); it counts while a process of the run
lives here, so what is killed claims nothing. It is looked at and written under one lock of the host.
Directories of other hosts that share the file system are told apart by the host's name.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec

from dynctl.deploy.home import LOCK_S, Home
from dynctl.errors import LaunchError, PlacementError
from dynctl.launchers.files import write_atomic
from dynctl.launchers.local import living_runs

FILE = "gpus.json"
SHARE_HINT = "end it, name other hosts or fewer GPUs, or share them by --share-gpus"

Living = Callable[[], Collection[str]]
"""The ids of all runs of which a process lives here."""


class GpuClaim(msgspec.Struct, frozen=True, kw_only=True):
    """A run's GPUs on one host. `shared`: it may have those that others have."""

    name: str
    run_id: str
    host: str
    gpus: list[int]
    shared: bool = False


def claim_of(name: str, run_id: str, gpus: Iterable[int], *, shared: bool = False) -> str:
    """The content of `gpus.json` for this host."""
    made = GpuClaim(
        name=name, run_id=run_id, host=socket.gethostname(), gpus=sorted(set(gpus)), shared=shared
    )
    return msgspec.json.encode(made).decode()


def locked(home: Home) -> AbstractContextManager[None]:
    """Hold this host's GPUs from a look at them until what was taken counts. Raises UsageError."""
    return home.locked(f".gpus-{socket.gethostname()}", deadline_s=LOCK_S)


def others(home: Home, run_id: str = "", living: Living = living_runs) -> dict[int, str]:
    """GPUs here that living runs other than `run_id` have, and the name of such a run."""
    claims = [claim for claim in _claims(home) if claim.gpus and claim.run_id != run_id]
    alive = living() if claims else ()
    return {gpu: claim.name for claim in claims if claim.run_id in alive for gpu in claim.gpus}


def require_free(home: Home, gpus: Iterable[int], run_id: str = "", living: Living = living_runs) -> None:
    """See that no living run but `run_id` has any of these GPUs here. Raises PlacementError that names it."""
    wanted = sorted(set(gpus))
    taken = others(home, run_id, living) if wanted else {}
    common = [gpu for gpu in wanted if gpu in taken]
    if common:
        who = taken[common[0]]
        shown = ", ".join(str(gpu) for gpu in common if taken[gpu] == who)
        raise PlacementError(f"'{who}' has GPU {shown} already", where=socket.gethostname(), hint=SHARE_HINT)


def too_few(taken: Mapping[int, str]) -> PlacementError:
    """What to raise when there is room only on GPUs that are `taken`, by whom."""
    holders: dict[str, list[int]] = {}
    for gpu, name in sorted(taken.items()):
        holders.setdefault(name, []).append(gpu)
    shown = ", ".join(f"'{name}' has {', '.join(map(str, gpus))}" for name, gpus in holders.items())
    return PlacementError(f"too few GPUs are free: {shown}", where=socket.gethostname(), hint=SHARE_HINT)


def hold(home: Home, folder: Path, run_id: str, gpus: Collection[int], living: Living = living_runs) -> None:
    """Have the run, whose directory here is `folder`, claim just these GPUs from now on.

    Raises PlacementError for one that another has, unless the run may share; then its claim stays as it was.
    UsageError when the lock is not to be had, LaunchError when the claim cannot be written.
    """
    with locked(home):
        before = _read(folder / FILE)
        mine = before if before is not None and before.host == socket.gethostname() else None
        name, shared = (before.name, before.shared) if before is not None else (run_id, False)
        more = set(gpus) - set(mine.gpus if mine else ())
        if not shared:
            require_free(home, more, run_id, living)
        try:
            write_atomic(folder / FILE, claim_of(name, run_id, gpus, shared=shared))
        except OSError as error:
            raise LaunchError(
                f"the claim on GPUs cannot be written: {error.strerror}", where=str(folder / FILE)
            ) from error


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
