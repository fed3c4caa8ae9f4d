"""Slurm's programs, each call with a deadline: sbatch, squeue, scancel, scontrol.

What a program writes to standard error never gets into what is read of it. A controller that does not answer
is not a job that is gone: the first raises SlurmUnreachable, the second is left out of the answer.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dynctl.errors import SlurmError, SlurmRejected, SlurmUnreachable

logger = logging.getLogger(__name__)

DEADLINE_S = 30.0
"""A client gives up by itself after up to 20 s when the controller's host is silent."""
_JOB_FIELDS = "%i|%T|%r|%S|%V|%e|%N|%B|%P|%l|%Q|%j"
"""The name comes last: it alone may hold a bar. Slurm writes control characters as underscores."""
_STEP_FIELDS = "%i|%N|%j"
_UNREACHABLE = re.compile(
    r"unable to contact|connection (timed out|refused|reset)|connect failure"
    r"|communication (connection|failure)|socket timed out|zero bytes|unexpected missing socket"
    r"|no route to host|address already in use",
    re.IGNORECASE,
)
_UNKNOWN_JOB = re.compile(r"invalid job id|already completing or completed", re.IGNORECASE)
_NOISE = re.compile(r"^\w+: (error|fatal): ", re.MULTILINE)
_REMEDIES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), remedy)
    for pattern, remedy in (
        (r"invalid partition", "sinfo -s lists the partitions; --set slurm.partition=NAME"),
        (
            r"account",
            "sacctmgr show assoc user=$USER lists account, partition and qos; --set slurm.account=NAME",
        ),
        (r"qos", "sacctmgr show qos lists them; --set slurm.qos=NAME"),
        (r"time limit", "sinfo -o '%P %l' lists the limits; --set slurm.time=TIME"),
        (r"reservation", "scontrol show reservation lists them; --set slurm.reservation=NAME"),
        (r"feature", "sinfo -o '%P %f' lists node features; --set slurm.constraint=FEATURE"),
        (r"generic resource|gres", "sinfo -o '%P %G' lists GPUs by node; --set slurm.gpus_per_node=N"),
        (
            r"node configuration|node count|more processors|nodes? .*not available",
            "sinfo -o '%P %D %c %m %G' lists what nodes have; fewer nodes, GPUs, CPUs or less memory",
        ),
        (r"invalid node name", "sinfo -N lists the nodes; correct slurm.nodelist or slurm.exclude"),
        (r"unrecognized option|invalid option|unknown option", "sbatch --help lists its options"),
        (r"job violates|limit", "a limit of the account or qos: ask for less, or wait for other jobs to end"),
    )
)


@dataclass(frozen=True, slots=True)
class JobRow:
    """A job as squeue tells it. Times are local ISO times, "" when Slurm does not know.

    `state` is Slurm's long word (PENDING, RUNNING, COMPLETED ...), `reason` why it is pending or ended,
    `start` the estimated start of a pending one, `host` where the batch script runs.
    """

    id: str
    state: str
    reason: str = ""
    start: str = ""
    submitted: str = ""
    end: str = ""
    nodes: str = ""
    host: str = ""
    partition: str = ""
    limit: str = ""
    priority: int = 0
    name: str = ""

    @property
    def pending(self) -> bool:
        """It has not started, or is to start again."""
        return self.state in _PENDING

    @property
    def active(self) -> bool:
        """Its processes run, or are being started or ended."""
        return self.state in _ACTIVE


_PENDING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"})
_ACTIVE = frozenset(
    {"RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT"}
)


@dataclass(frozen=True, slots=True)
class StepRow:
    """A step of a running job: its id ("12.3"), its nodes and its name."""

    id: str
    nodes: str
    name: str


@dataclass(frozen=True, slots=True)
class NodeRow:
    """A node's name, address and state, as `scontrol show node` tells them."""

    name: str
    address: str
    state: str


@dataclass(frozen=True)
class SlurmClient:
    """Calls Slurm's programs as this user. All methods block, at most for the deadline."""

    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    deadline_s: float = DEADLINE_S

    def submit(self, script: str, cwd: str) -> str:
        """Hand a batch script over; the job's id.

        Raises SlurmRejected with Slurm's words, or SlurmUnreachable: the job may exist all the same then.
        """
        # An outer job's variables would be taken for options of this one.
        environ = {k: v for k, v in self.environ.items() if not k.startswith(("SLURM_JOB", "SBATCH_"))}
        said = self._call(["sbatch", "--parsable"], script, cwd=cwd, environ=environ)
        found = re.fullmatch(r"(\d+)(;\S*)?", said.strip().splitlines()[-1] if said.strip() else "")
        if found is None:
            raise SlurmError(f"sbatch answered without a job id: {said.strip()[:200]!r}", where="sbatch")
        return found[1]

    def jobs(self, names: Iterable[str]) -> list[JobRow]:
        """This user's jobs of these names in whatever state, as long as Slurm remembers them. One call."""
        wanted = sorted(set(names))
        if not wanted:
            return []
        user = str(os.getuid())
        rows = self._call(
            ["squeue", "-h", "-a", "-t", "all", "-u", user, f"--name={','.join(wanted)}", "-o", _JOB_FIELDS]
        )
        return [parse_job(line) for line in rows.splitlines() if line.count("|") >= _JOB_FIELDS.count("|")]

    def place_in_queue(self, job: JobRow) -> tuple[int, int]:
        """(place, of how many) among the jobs that are pending in the job's partition, by priority."""
        rows = self._call(["squeue", "-h", "-a", "-t", "PD", "-p", job.partition, "-o", "%i|%Q"]).splitlines()
        weights = {row.partition("|")[0]: int(row.partition("|")[2] or 0) for row in rows}
        ahead = sum(weight > job.priority for one, weight in weights.items() if one != job.id)
        return ahead + 1, max(len(weights), ahead + 1)

    def steps(self, job_id: str) -> list[StepRow]:
        """The steps that run in a job, or in several ("7,8"); none when it does not run."""
        rows = self._call(["squeue", "-s", "-h", "-a", "-j", job_id, "-o", _STEP_FIELDS], unknown="")
        return [StepRow(*line.split("|", 2)) for line in rows.splitlines() if line.count("|") >= 2]

    def signal(self, target: str, signum: str, *, batch: bool = False) -> None:
        """Send a signal ("TERM") to a step, or to a job's batch script alone, if it lives."""
        flags = ["--batch"] if batch else []
        self._call(["scancel", f"--signal={signum}", *flags, target], unknown="")

    def cancel(self, job_id: str) -> None:
        """End a job, whatever it is doing; one that has ended is no error."""
        self._call(["scancel", job_id], unknown="")

    def hostnames(self, nodelist: str) -> list[str]:
        """The names that "n[1-2,07]" stands for, in order."""
        return self._call(["scontrol", "show", "hostnames", nodelist]).split() if nodelist else []

    def nodes_of(self, job_ids: str) -> list[str]:
        """The nodes that jobs ("7,8") have now: those that Slurm has given up are taken out of them."""
        lists = self._call(["squeue", "-h", "-a", "-t", "R", "-j", job_ids, "-o", "%N"], unknown="").split()
        return [name for one in lists for name in self.hostnames(one)]

    def nodes(self, names: Sequence[str]) -> list[NodeRow]:
        """Address and state of these nodes. One call."""
        text = self._call(["scontrol", "-o", "show", "node", ",".join(names)])
        return [parse_node(line) for line in text.splitlines() if line.startswith("NodeName=")]

    def job_detail(self, job_id: str) -> str:
        """`scontrol -d show job` on one line a job; "" for a job that Slurm does not know."""
        return self._call(["scontrol", "-d", "-o", "show", "job", job_id], unknown="")

    def avoid(self, job_id: str, nodes: Sequence[str]) -> None:
        """Have a pending job avoid just these nodes."""
        self._call(["scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(nodes)}"], unknown="")

    def requeue(self, job_id: str) -> None:
        """End a job and let the same script start again later."""
        self._call(["scontrol", "requeue", job_id])

    def _call(
        self,
        argv: Sequence[str],
        text: str | None = None,
        *,
        cwd: str | None = None,
        environ: Mapping[str, str] | None = None,
        unknown: str | None = None,
    ) -> str:
        """Standard output of one call. `unknown`: the answer for a job that Slurm does not know."""
        # Times, messages and number formats as we read them, whatever the user's own settings are.
        env = {
            **(self.environ if environ is None else environ),
            "LC_ALL": "C",
            "SLURM_TIME_FORMAT": "standard",
        }
        env = {k: v for k, v in env.items() if not k.startswith(("SQUEUE_", "SINFO_", "SCANCEL_"))}
        try:
            done = subprocess.run(
                argv,
                input=text,
                stdin=subprocess.DEVNULL if text is None else None,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self.deadline_s,
                check=False,
                env=env,
                cwd=cwd,
            )
        except FileNotFoundError as error:
            raise SlurmError(
                f"there is no {argv[0]} on PATH", hint="run this on a login node of the cluster"
            ) from error
        except OSError as error:
            raise SlurmError(f"{argv[0]} could not be run: {error.strerror or error}") from error
        except subprocess.TimeoutExpired as error:
            raise SlurmUnreachable(
                f"{argv[0]} did not answer within {self.deadline_s:g} s",
                hint="the Slurm controller is busy or down",
            ) from error
        if done.returncode == 0:
            if done.stderr.strip():
                logger.info("slurm.said program=%s %s", argv[0], done.stderr.strip()[:500])
            return done.stdout
        if unknown is not None and _UNKNOWN_JOB.search(done.stderr):
            return unknown
        raise failure(argv[0], done.stderr, done.returncode)


def failure(program: str, stderr: str, code: int) -> SlurmError:
    """The error for what a program said against it: no answer, or a refusal with what would help."""
    words = "; ".join(line.strip() for line in _NOISE.sub("", stderr).splitlines() if line.strip())
    words = words[:500] or f"exit code {code}"
    if _UNREACHABLE.search(stderr):
        return SlurmUnreachable(
            f"the Slurm controller did not answer {program}: {words}", hint="scontrol ping tells how it is"
        )
    if program != "sbatch":
        return SlurmError(f"{program} failed: {words}")
    remedy = next((text for pattern, text in _REMEDIES if pattern.search(stderr)), "")
    return SlurmRejected(f"Slurm refuses the job: {words}", hint=remedy)


def parse_job(line: str) -> JobRow:
    """One line in `_JOB_FIELDS`."""
    *fields, priority, name = line.split("|", _JOB_FIELDS.count("|"))
    known = [
        "" if field in ("N/A", "(null)", "n/a", "Unknown", "None", "NONE") else field for field in fields
    ]
    one, state, reason, start, submitted, end, nodes, host, partition, limit = known
    return JobRow(
        id=one,
        state=state,
        reason=reason,
        start=start,
        submitted=submitted,
        end=end,
        nodes=nodes,
        host=host,
        partition=partition,
        limit=limit,
        priority=int(priority) if priority.isdigit() else 0,
        name=name,
    )


def parse_node(line: str) -> NodeRow:
    """One line of `scontrol -o show node`."""
    found = dict(word.split("=", 1) for word in line.split() if "=" in word)
    return NodeRow(
        found.get("NodeName", ""), found.get("NodeAddr", ""), found.get("State", "").partition("+")[0]
    )
