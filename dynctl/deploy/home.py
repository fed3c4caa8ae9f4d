"""Where runs are kept: $DYNCTL_HOME/runs/<run id>/; deployments/<name> is a link to the latest of a name."""

from __future__ import annotations

import calendar
import fcntl
import logging
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dynctl.deploy.disk import disk
from dynctl.errors import LaunchError, UsageError
from dynctl.launchers.files import write_atomic

logger = logging.getLogger(__name__)

_TRIAL = re.compile(r"profile-[0-9a-f]{8}-.+")
_NEXT = re.compile(r"recipe\.next\.[0-9a-f]+\.yaml")
_MADE = re.compile(r"-(\d{8}-\d{6})-[0-9a-f]{4}$")
_MADE_FORMAT = "%Y%m%d-%H%M%S"
_ENDED = "ended"
_ENDED_KEPT_S = 86_400.0
"""No call that was on its way when a run was ended comes later."""
LOCK_S = 10.0
"""For another command on the same name to get out of the way."""
LEAST_FREE_BYTES = 8 * 1024 * 1024
"""For plan, state and the first logs: less is a disk that is full."""
_LOCK_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class RunDir:
    """The directory of one run (mode 0700) and the names of what is in it.

    `named` is the run's id where the directory has another name: that of a node other than the head.
    """

    path: Path
    named: str = ""

    @property
    def run_id(self) -> str:
        """The id of the run, which is the directory's name."""
        return self.named or self.path.name

    @property
    def remote(self) -> Path:
        """Where the run is, when it is looked after by another machine."""
        return self.path / "remote.json"

    def next(self, name: str) -> Path:
        """A recipe put there to be applied, under a `next_name`. Raises UsageError for any other name."""
        if not _NEXT.fullmatch(name):
            raise UsageError(f"'{name}' is no recipe that was put there to be applied", where=str(self.path))
        return self.path / name

    @property
    def plan(self) -> Path:
        """The plan, whole and unmasked."""
        return self.path / "plan.json"

    @property
    def lock(self) -> Path:
        """The recipe with everything resolved."""
        return self.path / "recipe.lock.yaml"

    @property
    def keys(self) -> Path:
        """The key pair of the deployment's sockets."""
        return self.path / "keys.json"

    @property
    def engine_key(self) -> Path:
        """The API key of the deployment's engines."""
        return self.path / "engine.key"

    @property
    def state(self) -> Path:
        """What runs and how it is."""
        return self.path / "state.json"

    @property
    def adapters(self) -> Path:
        """The LoRA adapters loaded at run time."""
        return self.path / "adapters.json"

    @property
    def events(self) -> Path:
        """What happened, one JSON object a line."""
        return self.path / "events.jsonl"

    @property
    def audit(self) -> Path:
        """Who changed it, one JSON object a line."""
        return self.path / "audit.jsonl"

    @property
    def planner(self) -> Path:
        """What the planner decided and why, one JSON object a line."""
        return self.path / "planner.jsonl"

    @property
    def logs(self) -> Path:
        """One file for each process."""
        return self.path / "logs"


@dataclass(frozen=True, slots=True)
class Home:
    """All runs and deployments of this user."""

    root: Path

    @staticmethod
    def find(environ: Mapping[str, str]) -> Home:
        """The one that DYNCTL_HOME names, else ~/.dynctl."""
        named = environ.get("DYNCTL_HOME")
        return Home(Path(named).expanduser().absolute() if named else Path.home() / ".dynctl")

    @staticmethod
    def holding(folder: Path) -> Home:
        """The one that this directory of a run is in, be it the head's or that of another node."""
        return Home(folder.parents[1] if folder.parent.name == "runs" else folder.parents[2])

    @property
    def runs(self) -> Path:
        """All runs."""
        return self.root / "runs"

    @property
    def notes(self) -> Path:
        """One directory for each deployment that other machines look after."""
        return self.root / "notes"

    @property
    def deployments(self) -> Path:
        """One link for each name."""
        return self.root / "deployments"

    def prepare(self) -> None:
        """Make the directories and see that they can be written to. Raises LaunchError."""
        with disk("the directory of runs cannot be used"):
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            _require_trusted(self.root)
            for folder in (self.runs, self.deployments, self.root / "locks"):
                folder.mkdir(mode=0o700, exist_ok=True)
            kept = (self.runs, self.deployments, self.root / "locks", self.root / "nodes", self.notes)
            for folder in kept:
                if folder.is_dir():
                    make_private(folder)
            # Not named for its pid: hosts that share this home have the same ones.
            probe = self.runs / f".probe.{secrets.token_hex(6)}"
            probe.touch(mode=0o600)
            probe.unlink()
            free = shutil.disk_usage(self.runs).free
        if free < LEAST_FREE_BYTES:
            raise LaunchError(
                f"too little space for a run: {free // 1024} of {LEAST_FREE_BYTES // 1024} KiB are free",
                where=str(self.runs),
                hint="free some, or let DYNCTL_HOME name a directory on another disk",
            )

    def names(self) -> list[str]:
        """All deployments ever started, by name, also those that other machines look after."""
        found: set[str] = set()
        with disk("the deployments cannot be listed"):
            if self.deployments.is_dir():
                found.update(entry.name for entry in self.deployments.iterdir() if entry.is_symlink())
            if self.notes.is_dir():
                found.update(path.parent.name for path in self.notes.glob("*/remote.json"))
        return sorted(found)

    def forget(self, name: str) -> None:
        """Remove what is here of a deployment that has ended: its name, the run it means, a note of it.

        Raises LaunchError.
        """
        with self.locked(name, deadline_s=LOCK_S), disk("the run directory cannot be removed"):
            run, link = self.run_of(name), self.deployments / name
            link.unlink(missing_ok=True)
            for folder in (run.path if run else None, self.notes / name):
                if folder is not None and folder.is_dir():
                    shutil.rmtree(folder)

    def note_of(self, name: str) -> RunDir | None:
        """The note of a deployment that other machines look after: a directory with `remote` alone.

        It is apart from the run's own directory, since the head may have this very home.
        """
        note = RunDir(self.notes / name)
        return note if "/" not in name and name not in ("", ".", "..") and note.remote.exists() else None

    def make_note(self, name: str) -> RunDir:
        """A place for the note of this name. Raises LaunchError."""
        with disk("the note cannot be written"):
            for folder in (self.root, self.notes, self.notes / name):
                folder.mkdir(mode=0o700, exist_ok=True)
        return RunDir(self.notes / name)

    def run_of(self, name: str) -> RunDir | None:
        """The latest run of a name."""
        if "/" in name or name in ("", ".", ".."):
            return None
        link = self.deployments / name
        if not link.is_symlink() or not link.is_dir():
            return None
        return RunDir(self.runs / os.path.basename(os.readlink(link)))

    def create_run(self, run_id: str, files: Mapping[str, str]) -> RunDir:
        """Make a run directory with these files in it, whole or not at all. Raises LaunchError."""
        _create(self.runs / run_id, files)
        return RunDir(self.runs / run_id)

    def create_node(self, run_id: str, node: str, files: Mapping[str, str]) -> RunDir:
        """Make the directory of a node other than the head, unless it is there: nodes may share this home.

        Raises LaunchError.
        """
        there = self.root / "nodes" / run_id / node
        if there.is_dir():
            make_private(there)
        else:
            with disk("the node's directory cannot be written"):
                for folder in (self.root, self.root / "nodes", there.parent):
                    folder.mkdir(mode=0o700, exist_ok=True)
            _create(there, files)
        return RunDir(there, run_id)

    def mark_ended(self, run_id: str) -> None:
        """Nothing of this run is to be started here any more. Raises LaunchError."""
        with disk("the end of the run cannot be noted"):
            folder = self.root / _ENDED
            folder.mkdir(mode=0o700, exist_ok=True)
            old = time.time() - _ENDED_KEPT_S
            for path in folder.iterdir():
                if path.stat().st_mtime < old:
                    path.unlink(missing_ok=True)
            (folder / run_id).touch(mode=0o600)

    def is_marked_ended(self, run_id: str) -> bool:
        """Whether `mark_ended` was called for it."""
        return (self.root / _ENDED / run_id).exists()

    def point(self, name: str, run: RunDir) -> None:
        """Let the name mean this run from now on. Raises LaunchError."""
        with disk("the deployment's link cannot be written"):
            draft = self.deployments / f".{name}.{os.getpid()}"
            draft.unlink(missing_ok=True)
            draft.symlink_to(Path("..") / "runs" / run.run_id)
            draft.replace(self.deployments / name)

    @contextmanager
    def locked(self, what: str, *, deadline_s: float) -> Iterator[None]:
        """Hold the lock of a name against other dynctl commands; it ends with this process at the latest.

        Raises UsageError when another holds it until the deadline.
        """
        with disk("the lock cannot be taken"):
            fd = os.open(self.root / "locks" / f"{what}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            _flock(fd, what, deadline_s)
            yield
        finally:
            os.close(fd)


def make_private(folder: Path) -> None:
    """Close a directory of ours to others. Raises LaunchError for one of another user."""
    with disk("the directory cannot be closed to others"):
        found = folder.stat()
        if found.st_uid != os.geteuid():
            raise LaunchError(
                f"the directory belongs to user {found.st_uid}, not {os.geteuid()}",
                where=str(folder),
                hint="let DYNCTL_HOME name a directory of your own",
            )
        if found.st_mode & 0o077:
            folder.chmod(0o700)
            logger.warning(
                "%s was open to others (mode %04o), and is no more", folder, found.st_mode & 0o7777
            )


def _require_trusted(folder: Path) -> None:
    """See that nobody else can put something in the place of what is in there. Raises LaunchError."""
    found = folder.stat()
    if found.st_uid not in (os.geteuid(), 0):
        raise LaunchError(
            f"the directory belongs to user {found.st_uid}, who could replace what is in it",
            where=str(folder),
            hint="let DYNCTL_HOME name a directory of your own",
        )
    if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
        folder.chmod(stat.S_IMODE(found.st_mode) & ~0o022)
        logger.warning("%s could be written to by others (mode %04o)", folder, stat.S_IMODE(found.st_mode))


def trial_name(run: str, word: str) -> str:
    """Of a deployment that a profile run (eight hexadecimal digits) starts to measure it."""
    return f"profile-{run}-{word}"


def is_trial(name: str) -> bool:
    """Whether a deployment is one that a profile run measures: nobody means it who does not name it."""
    return _TRIAL.fullmatch(name) is not None


def next_name() -> str:
    """A name that nobody else has for a recipe that is to be applied."""
    return f"recipe.next.{secrets.token_hex(8)}.yaml"


def new_run_id(name: str, now: time.struct_time) -> str:
    """An id that sorts by time and is not used twice: name, UTC time, four random digits."""
    return f"{name}-{time.strftime(_MADE_FORMAT, now)}-{secrets.token_hex(2)}"


def made_at(run_id: str) -> float:
    """When an id of `new_run_id` was made, as Unix time; 0 for one that does not tell."""
    found = _MADE.search(run_id)
    return float(calendar.timegm(time.strptime(found[1], _MADE_FORMAT))) if found else 0.0


def _flock(fd: int, what: str, deadline_s: float) -> None:
    ends = time.monotonic() + deadline_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > ends:
                hint = "wait for it to end, then try again"
                raise UsageError(f"another dynctl command is working on '{what}'", hint=hint) from None
            time.sleep(_LOCK_POLL_S)


def _create(final: Path, files: Mapping[str, str]) -> None:
    draft = final.with_name(f".{final.name}.{os.getpid()}")
    with disk("the run directory cannot be written"):
        draft.mkdir(mode=0o700)
        try:
            for folder in ("logs", "specs", "exits", "sockets"):
                (draft / folder).mkdir(mode=0o700)
            for relative, text in files.items():
                write_atomic(draft / relative, text)
            draft.rename(final)
        except OSError:
            _remove_tree(draft)
            raise


def _remove_tree(folder: Path) -> None:
    for entry in sorted(folder.rglob("*"), key=lambda p: len(p.parts), reverse=True):
        if entry.is_dir():
            entry.rmdir()
        else:
            entry.unlink(missing_ok=True)
    folder.rmdir()
