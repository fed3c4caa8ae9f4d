"""One connected host: run commands, put files, start what outlives the connection.

A command is a list of words, quoted here and nowhere else. Scripts are constants that get their values as
words; they are one line each, so that any login shell passes them on to sh as they are.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shlex
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncssh

from dynctl.errors import HostLost, SshError
from dynctl.launchers.ssh_errors import command_error, first_line, lost, too_late

_SESSIONS = 8
"""Commands at once on one connection; sshd's MaxSessions is 10 unless set otherwise."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_BAD_DIRECTORY, _TORN = 81, 82
_TORN_ERRORS = (asyncssh.DisconnectError, ConnectionError, BrokenPipeError)

_PUT = (
    "set -eu; umask 077; trap '' PIPE; trap 'exit 1' HUP INT TERM; "  # else its draft would stay
    'd=$1 t=$2 f=$3 m=$4 n=$5; mkdir -p -- "$d"; '
    'set -- $(stat -L -c "%u %a" -- "$d"); '
    'if [ "$1" != "$(id -u)" ]; then echo "$d belongs to user $1" >&2; exit 81; fi; '
    'case $2 in *00) ;; *) echo "$d has mode $2" >&2; exit 81;; esac; '
    'trap \'rm -f -- "$t"\' EXIT; cat > "$t"; '
    'if [ "$(stat -c %s -- "$t")" != "$n" ]; then echo torn >&2; exit 82; fi; '
    'chmod -- "$m" "$t"; sync "$t"; mv -f -T -- "$t" "$f"; trap - EXIT'
)
_DETACH = (
    "set -eu; d=$1 l=$2; shift 2; "
    'eval "$(cat)"; cd -- "$d"; '
    'command -v -- "$1" >/dev/null || { echo "no such program: $1" >&2; exit 83; }; '
    'u=$(umask); umask 077; : >> "$l"; umask "$u"; '
    'setsid nohup "$@" </dev/null >>"$l" 2>&1 & p=$!; '
    's=$(cat "/proc/$p/stat"); set -- ${s##*) }; echo "$p ${20}"'
)


@dataclass(frozen=True, slots=True)
class Finished:
    """A command that has ended. `code` is negative for a signal."""

    code: int
    stdout: bytes
    stderr: bytes

    @property
    def first_line(self) -> str:
        """The first line of its standard error that says something."""
        return first_line(self.stderr)


@dataclass(frozen=True, slots=True)
class Started:
    """A process that outlives the connection: pid on the host, and start in clock ticks since boot."""

    pid: int
    start_ticks: int


@dataclass(frozen=True, slots=True)
class Pty:
    """A terminal for a command: its kind ("xterm") and size in characters."""

    term: str
    columns: int
    rows: int


class SshHost:
    """A host with a living connection. All methods raise SshError (HostLost, HostTimeout and the like)."""

    def __init__(self, name: str, connection: asyncssh.SSHClientConnection, dialled: str = "") -> None:
        self.name = name
        self.dialled = dialled
        """The address it was reached at from here; "" when that was by way of another host."""
        self._connection = connection
        self._sessions = asyncio.Semaphore(_SESSIONS)
        self._home = ""

    @property
    def alive(self) -> bool:
        """Whether the connection stands, as far as is known: a cut is seen within 5 s."""
        return not self._connection.is_closed()

    async def wait_lost(self) -> None:
        """Return when the connection has ended."""
        await self._connection.wait_closed()

    async def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes | Awaitable[bytes] = b"",
        timeout_s: float,
        env: Mapping[str, str] | None = None,
    ) -> Finished:
        """Run to the end, whatever its exit code. `env` is seen by all users of the host while it runs.

        Input that is still to come is waited for when the command has been started.
        A command that is late is sent SIGKILL, as far as the host can be reached.
        """
        what = _shown(argv)
        try:
            async with asyncio.timeout(timeout_s), self._sessions:
                return await self._run(_line(argv, env), stdin, what)
        except TimeoutError:
            raise too_late(self.name, what, timeout_s) from None

    async def _run(self, line: str, stdin: bytes | Awaitable[bytes], what: str) -> Finished:
        async with self._process(line, what, stdin=asyncssh.PIPE if stdin else asyncssh.DEVNULL) as process:
            data = stdin if isinstance(stdin, bytes) else await stdin
            try:
                stdout, stderr = await process.communicate(data or None)
            except BrokenPipeError:
                if not self.alive:
                    raise
                # It ended without reading: how, and what it said, is the answer.
                stdout, stderr = await process.communicate()
            return Finished(_code(process, self.name, what), stdout, stderr)

    @asynccontextmanager
    async def _process(
        self, line: str, what: str, **options: Any
    ) -> AsyncIterator[asyncssh.SSHClientProcess[bytes]]:
        """A command's channel; killed when left early. Raises HostLost, SshError."""
        options = {"request_pty": False, **options}
        try:
            process = await self._connection.create_process(line, encoding=None, **options)
        except asyncssh.ChannelOpenError as error:
            if not self.alive:
                raise lost(self.name, what) from error
            hint = "sshd's MaxSessions is the most commands at once"
            raise SshError(f"no session for {what}: {error.reason}", where=self.name, hint=hint) from error
        except _TORN_ERRORS as error:
            raise lost(self.name, what) from error
        try:
            yield process
        except _TORN_ERRORS as error:
            raise lost(self.name, what) from error
        finally:
            if process.exit_status is None and process.exit_signal is None and self.alive:
                _try(process.kill)
            process.close()

    async def check(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float) -> bytes:
        """Run, and give the standard output of what ended well. Raises SshError with its first line."""
        done = await self.run(argv, stdin=stdin, timeout_s=timeout_s)
        if done.code != 0:
            raise command_error(self.name, argv[0], done.code, done.stderr)
        return done.stdout

    async def home(self, *, timeout_s: float = 15.0) -> str:
        """The user's home directory there, asked for once."""
        if not self._home:
            said = await self.check(["sh", "-c", 'printf "\\n%s\\n" "$HOME"'], timeout_s=timeout_s)
            # What start-up files of the login shell print comes before.
            self._home = said.decode("utf-8", "surrogateescape").rstrip("\n").rpartition("\n")[2]
        if not self._home.startswith("/"):
            raise SshError("the user has no home directory there", where=self.name)
        return self._home

    async def put(self, files: Mapping[str, bytes], *, mode: int = 0o600, timeout_s: float = 60.0) -> None:
        """Write files by absolute path, each whole or not at all, in directories of this user alone.

        A directory that is not there is made (0700). Raises SshError for one that others may enter or that is
        somebody else's, HostDiskFull.
        """
        for path, content in files.items():
            await self._put(path, content, mode, timeout_s)

    async def _put(self, path: str, content: bytes, mode: int, timeout_s: float) -> None:
        folder, _, name = path.rpartition("/")
        if not path.startswith("/") or name in ("", ".", "..") or "\0" in path:
            raise ValueError(f"not an absolute path of a file: {path!r}")
        draft = f"{folder}/.{name[:100]}.{secrets.token_hex(6)}"
        words = [folder or "/", draft, path, f"{mode:04o}", str(len(content))]
        argv = ["env", "LC_ALL=C", "sh", "-c", _PUT, "sh", *words]
        done = await self.run(argv, stdin=content, timeout_s=timeout_s)
        if done.code == _BAD_DIRECTORY:
            hint = f"it must be yours alone: chmod 700 {shlex.quote(folder)}, or another place"
            raise SshError(f"{done.first_line}, not safe for {name}", where=self.name, hint=hint)
        if done.code == _TORN:
            raise HostLost(f"{path} came only in part", where=self.name, hint="try again")
        if done.code != 0:
            raise command_error(self.name, f"writing {path}", done.code, done.stderr)

    async def start_detached(
        self,
        argv: Sequence[str],
        *,
        cwd: str,
        env: Mapping[str, str],
        log: str,
        timeout_s: float = 20.0,
    ) -> Started:
        """Start what outlives the connection: in a session of its own, output appended to `log` (0600).

        `env` is added to the login environment and seen by nobody else. Raises SshError when there is no such
        program or directory; what it says after its start is in the log alone.
        """
        script = "".join(f"export {_variable(name)}={shlex.quote(value)}; " for name, value in env.items())
        words = ["env", "LC_ALL=C", "sh", "-c", _DETACH, "sh", cwd, log, *argv]
        done = await self.run(words, stdin=(script or ":").encode(), timeout_s=timeout_s)
        numbers = done.stdout.split()[-2:]
        if done.code != 0 or len(numbers) != 2 or not all(n.isdigit() for n in numbers):
            raise command_error(self.name, f"starting {_shown(argv)}", done.code, done.stderr)
        return Started(int(numbers[0]), int(numbers[1]))

    @asynccontextmanager
    async def open(
        self,
        argv: Sequence[str],
        *,
        on_stdout: Callable[[bytes], None],
        on_stderr: Callable[[bytes], None],
        pty: Pty | None = None,
    ) -> AsyncIterator[SshStream]:
        """Start a command whose output is handed on as it comes; what has not ended is killed on leaving."""
        options: dict[str, Any] = {}
        if pty is not None:
            options = {
                "request_pty": "force",
                "term_type": pty.term,
                "term_size": (pty.columns, pty.rows),
            }
        what = _shown(argv)
        async with self._process(_line(argv, None), what, **options) as process:
            stream = SshStream(self.name, what, process, (on_stdout, on_stderr))
            try:
                yield stream
            finally:
                await stream.aclose()

    def close(self) -> None:
        """Close the connection. What was started there and has no terminal lives on."""
        self._connection.close()


class SshStream:
    """A command that runs on a host, with its input and output joined to ours."""

    def __init__(
        self,
        host: str,
        what: str,
        process: asyncssh.SSHClientProcess[bytes],
        sinks: tuple[Callable[[bytes], None], Callable[[bytes], None]],
    ) -> None:
        self._host = host
        self._what = what
        self._process = process
        pairs = zip((process.stdout, process.stderr), sinks, strict=True)
        self._readers = [asyncio.ensure_future(_pump(source, sink)) for source, sink in pairs]

    def write(self, data: bytes) -> None:
        """Give it input; nothing happens when it has ended."""
        _try(lambda: self._process.stdin.write(data))

    def write_eof(self) -> None:
        """There is no more input."""
        _try(self._process.stdin.write_eof)

    def signal(self, number: int) -> None:
        """Send its process group a signal; nothing happens when it has ended."""
        name = signal.Signals(number).name.removeprefix("SIG")
        _try(lambda: self._process.send_signal(name))

    def resize(self, columns: int, rows: int) -> None:
        """Its terminal has another size now."""
        _try(lambda: self._process.change_terminal_size(columns, rows))

    async def wait(self) -> int:
        """Its exit code, negative for a signal, when all its output has been handed on. Raises HostLost."""
        ended = asyncio.ensure_future(self._process.wait_closed())
        try:
            done, _ = await asyncio.wait({ended, *self._readers}, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()  # what a sink raised
        except _TORN_ERRORS as error:
            raise lost(self._host, self._what) from error
        finally:
            ended.cancel()
        return _code(self._process, self._host, self._what)

    async def aclose(self) -> None:
        """Stop reading."""
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)


async def _pump(source: asyncssh.SSHReader[bytes], sink: Callable[[bytes], None]) -> None:
    while data := await source.read(65536):
        sink(data)


def _try(act: Callable[[], object]) -> None:
    """Do it if the channel still stands."""
    try:
        act()
    except (OSError, asyncssh.Error):
        return


def _code(process: asyncssh.SSHClientProcess[bytes], host: str, what: str) -> int:
    """The exit code as subprocess has it. Raises HostLost when there is none: nobody knows how it ended."""
    if process.exit_signal is not None:
        name = f"SIG{process.exit_signal[0]}"
        return -signal.Signals[name].value if name in signal.Signals.__members__ else -signal.SIGKILL
    if process.exit_status is None:
        raise lost(host, what)
    return process.exit_status


def _line(argv: Sequence[str], env: Mapping[str, str] | None) -> str:
    """The words as one line that every shell takes apart into the same words."""
    if any("\0" in word for word in argv):
        raise ValueError("a word with a NUL byte cannot be passed on")
    if not env:
        return shlex.join(argv)
    if "=" in argv[0]:
        raise ValueError(f"a program's name with '=' cannot be run with variables: {argv[0]!r}")
    return shlex.join(["env", *(f"{_variable(name)}={value}" for name, value in env.items()), *argv])


def _variable(name: str) -> str:
    if not _VARIABLE.fullmatch(name):
        raise ValueError(f"not the name of a variable: {name!r}")
    return name


def _shown(argv: Sequence[str]) -> str:
    """What is run, in a word: scripts and their values are not for people."""
    words = [word for word in argv if not (word == "env" or "=" in word)]
    if words[1:2] == ["-m"]:
        return f"python -m {words[2]}"
    return os.path.basename(words[0]) if words else "a command"
