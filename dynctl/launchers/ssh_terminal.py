"""A verb that runs on a host as if it ran here: our input and output, Ctrl-C, window size, exit code."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import termios
import tty
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from dynctl.errors import HostLost
from dynctl.launchers.ssh_host import Pty, SshHost, SshStream

_BLOCK = 65536
_INTERRUPTED = 130


async def forward(host: SshHost, argv: Sequence[str], *, pty: bool | None = None) -> int:
    """Run `argv` on the host, joined to this process, and give its exit code: 128 + n for signal n.

    `pty` None: with a terminal there when standard input and output are one here; then keys go there as they
    are. Without, SIGINT and SIGTERM are passed on, and a second Ctrl-C ends the waiting (130).
    Raises SshError, and BrokenPipeError when nobody reads our output any more.
    """
    both = os.isatty(sys.stdin.fileno()) and os.isatty(sys.stdout.fileno())
    wanted = _terminal() if (both if pty is None else pty) else None
    out, err = sys.stdout.buffer, sys.stderr.buffer

    unread = asyncio.Event()

    def to_stdout(data: bytes) -> None:
        try:
            out.write(data)
            out.flush()
        except BrokenPipeError:
            unread.set()
            raise

    def to_stderr(data: bytes) -> None:
        err.write(data)
        err.flush()

    try:
        async with host.open(argv, on_stdout=to_stdout, on_stderr=to_stderr, pty=wanted) as stream:
            code = await _joined(stream, pty=wanted is not None)
    except HostLost:
        if unread.is_set():  # ours is the pipe that broke, not the connection
            raise BrokenPipeError from None
        raise
    return 128 - code if code < 0 else code


async def _joined(stream: SshStream, *, pty: bool) -> int:
    """Our input and signals are the command's until it ends, or somebody has enough of waiting; its code."""
    given_up = asyncio.get_running_loop().create_future()
    with _signals(stream, given_up, pty=pty), _raw(pty), _input(stream):
        ended = asyncio.ensure_future(stream.wait())
        try:
            await asyncio.wait({ended, given_up}, return_when=asyncio.FIRST_COMPLETED)
            return ended.result() if ended.done() else _INTERRUPTED
        finally:
            ended.cancel()


def _terminal() -> Pty:
    columns, rows = _size()
    return Pty(os.environ.get("TERM", "dumb"), columns, rows)


def _size() -> tuple[int, int]:
    for file in (sys.stdout, sys.stdin):
        with suppress(OSError):
            size = os.get_terminal_size(file.fileno())
            return size.columns, size.lines
    return 80, 24


@contextmanager
def _signals(stream: SshStream, given_up: asyncio.Future[None], *, pty: bool) -> Iterator[None]:
    """Pass signals on while the block runs. With a terminal, Ctrl-C is a key and comes as one."""
    loop = asyncio.get_running_loop()
    asked = False

    def interrupt() -> None:
        nonlocal asked
        if asked and not given_up.done():
            given_up.set_result(None)
        asked = True
        stream.signal(signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, interrupt)
    loop.add_signal_handler(signal.SIGTERM, lambda: stream.signal(signal.SIGTERM))
    if pty:
        loop.add_signal_handler(signal.SIGWINCH, lambda: stream.resize(*_size()))
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, *([signal.SIGWINCH] if pty else [])):
            loop.remove_signal_handler(number)


@contextmanager
def _raw(wanted: bool) -> Iterator[None]:
    """The terminal hands on each key as it is while the block runs."""
    if not wanted or not os.isatty(sys.stdin.fileno()):
        yield
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    tty.setraw(fd, termios.TCSANOW)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


@contextmanager
def _input(stream: SshStream) -> Iterator[None]:
    """Standard input goes to the command as it comes."""
    loop, fd = asyncio.get_running_loop(), sys.stdin.fileno()

    def ready() -> None:
        try:
            data = os.read(fd, _BLOCK)
        except OSError:
            data = b""
        if data:
            stream.write(data)
            return
        loop.remove_reader(fd)
        stream.write_eof()

    try:
        loop.add_reader(fd, ready)
    except OSError:  # a file, or /dev/null: always ready, so not to be waited for
        while data := os.read(fd, _BLOCK):
            stream.write(data)
        stream.write_eof()
        yield
        return
    try:
        yield
    finally:
        loop.remove_reader(fd)
