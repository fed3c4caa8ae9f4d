"""A deployment's job as a login node sees it: one thing that is pending, runs or has ended.

A job is known by its id and its name together: after a crash, Slurm may give the id to another job.
"""

from __future__ import annotations

import logging
import signal as signals
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

from dynctl.errors import CodecError, LaunchError, SlurmError
from dynctl.launchers.base import Exit, Launch, Owned, ProcessHandle, RunRef
from dynctl.launchers.files import write_atomic
from dynctl.launchers.slurm_client import JobRow, SlurmClient

logger = logging.getLogger(__name__)

RECORD = "slurm.json"
ABANDONED = "abandoned"
"""A file of the run directory: a job that starts all the same must end at once."""
SUCCESSOR = "successor"
"""A file of the run directory: the id of the run that takes over from this one."""
REFUSED = "successor.refused"
"""A file of the run directory: why there is no such run yet, though there should be."""
CONTROLLER = "controller"
JOB = "job"
"""The seat of a job that has no controller yet."""
LOOK_S = 0.5
"""How old an answer of Slurm's may be."""
_LOOK_MOST_S = 5.0
FRESH_S = 15.0
"""A job submitted so recently may not be listed yet."""


class JobRecord(msgspec.Struct, frozen=True, kw_only=True):
    """slurm.json: which job the run is. `submitted_at` is Unix time; `job_id` "" = it has not got one yet."""

    job_id: str
    name: str
    submitted_at: float
    version: int = 1

    def save(self, run_dir: Path) -> None:
        """Write it into the run directory. Raises OSError."""
        write_atomic(run_dir / RECORD, msgspec.json.encode(self))


def load_record(run_dir: Path) -> JobRecord | None:
    """The run's job, None when it is not a run on Slurm. Raises CodecError for a file that is no record."""
    path = run_dir / RECORD
    try:
        return msgspec.json.decode(path.read_bytes(), type=JobRecord)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise CodecError(f"the job's record cannot be read: {error}", where=str(path)) from error


class JobTable:
    """What Slurm says of many jobs, in one call for all, which is not repeated more often than is useful."""

    def __init__(
        self,
        client: SlurmClient,
        records: Iterable[JobRecord],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.client = client
        self._names = {record.name for record in records}
        self._clock = clock
        self._rows: list[JobRow] = []
        self._asked_at: float | None = None
        self._wait = LOOK_S
        self._failure: SlurmError | None = None

    def row(self, record: JobRecord, *, fresh: bool = False) -> JobRow | None:
        """The job; None when Slurm does not know it (any more). Raises SlurmError."""
        unasked = record.name not in self._names
        self._names.add(record.name)
        if fresh or unasked or self._asked_at is None or self._clock() - self._asked_at >= self._wait:
            self._ask()
        if self._failure is not None:
            raise self._failure
        rows = [row for row in self._rows if row.name == record.name and _same(row, record)]
        return next((row for row in rows if row.active or row.pending), rows[-1] if rows else None)

    def _ask(self) -> None:
        started = self._clock()
        try:
            self._rows, self._failure = self.client.jobs(self._names), None
        except SlurmError as error:
            self._failure = error
        self._asked_at = self._clock()
        # A slow or absent controller is asked less often.
        slow = self._failure is not None or self._asked_at - started > LOOK_S
        self._wait = min(2 * self._wait, _LOOK_MOST_S) if slow else LOOK_S


def _same(row: JobRow, record: JobRecord) -> bool:
    """Whether the row is of this job; a job of several parts is listed part by part ("12+0")."""
    return not record.job_id or row.id.split("+")[0] == record.job_id


class JobLauncher:
    """The job in the place of the processes that a launcher knows on its own machine."""

    def __init__(self, table: JobTable, record: JobRecord, run_dir: Path) -> None:
        self.table = table
        self._record = record
        self._run_dir = run_dir

    @property
    def record(self) -> JobRecord:
        """The job as recorded; read again until it has an id."""
        if not self._record.job_id:
            self._record = load_record(self._run_dir) or self._record
        return self._record

    def job(self, *, fresh: bool = False) -> JobRow | None:
        """What Slurm says of it; None when it does not know it. Raises SlurmError."""
        return self.table.row(self.record, fresh=fresh)

    def over(self) -> bool:
        """Whether it has ended for certain: not while Slurm does not answer, nor before it can know it."""
        try:
            row = self.job()
        except SlurmError as error:
            logger.info("job.unknown name=%s error=%s", self.record.name, error)
            return False
        if row is None:
            return time.time() - self.record.submitted_at > FRESH_S
        return not (row.active or row.pending)

    def start(self, launch: Launch, run: RunRef) -> ProcessHandle:
        """Nothing can be started from here."""
        raise LaunchError("processes of a job are started by its controller", where=launch.process_id)

    def poll(self, handles: Sequence[ProcessHandle]) -> list[Exit]:
        """All have ended when the job has."""
        return [Exit(handle, None) for handle in handles] if self.over() else []

    def signal(self, handle: ProcessHandle, signum: int) -> bool:
        """SIGKILL ends the job, others go to its batch script."""
        row = self.job(fresh=True)
        if row is None or not (row.active or row.pending):
            return False
        if signum == signals.SIGKILL or row.pending:
            self.table.client.cancel(row.id)
        else:
            self.table.client.signal(row.id, signals.Signals(signum).name.removeprefix("SIG"), batch=True)
        return True

    def owned(self, run_id: str) -> list[Owned]:
        """The job, as its controller once it runs, while anything of it may live. Raises SlurmError."""
        row = self.job()
        if row is None or not (row.active or row.pending):
            return []
        seat = JOB if row.pending else CONTROLLER
        return [Owned(self.handle(), 0, seat, 1)]

    def kill(self, victims: Iterable[Owned]) -> None:
        """End the job."""
        if list(victims):
            row = self.job(fresh=True)
            if row is not None:
                self.table.client.cancel(row.id)

    def release(self, handle: ProcessHandle) -> None:
        """It is not our child."""

    def handle(self) -> ProcessHandle:
        """Stands for the job."""
        number = self.record.job_id
        return ProcessHandle(int(number) if number.isdigit() else 0, 0, 0)
