"""A verb that runs on a host and does not feel as if it ran here."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.cluster.cluster import Cluster
from tests.cluster.commands import CommandFailed, eventually
from tests.cluster.ssh_hosts import DEADLINE_S

COUNT = "trap 'echo asked; exit 7' INT; echo ready; i=0; while :; do sleep 0.1; done"


def argv(cluster: Cluster, *words: str) -> list[str]:
    """The verb's command line."""
    module = [sys.executable, "-m", "tests.cluster.forward_verb"]
    return [*module, str(cluster.ssh_config), "n2", *words]


@contextmanager
def piped(cluster: Cluster, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """Its input and output are pipes."""
    process = subprocess.Popen(
        argv(cluster, *words), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE_S)


class Screen:
    """A terminal with the verb in it."""

    def __init__(self, master: int, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.seen = b""
        self._master = master

    def until(self, text: bytes) -> None:
        """Read on until it has been seen."""
        ends = time.monotonic() + DEADLINE_S
        os.set_blocking(self._master, False)
        while text not in self.seen:
            if time.monotonic() > ends:
                raise CommandFailed(f"not seen: {text!r} in {self.seen!r}")
            try:
                self.seen += os.read(self._master, 4096)
            except (BlockingIOError, OSError):
                time.sleep(0.02)

    def type(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self._master, keys)

    def resize(self, columns: int, rows: int) -> None:
        """Pull at the corner of the window."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.process.send_signal(signal.SIGWINCH)


@contextmanager
def in_terminal(cluster: Cluster, *words: str) -> Iterator[Screen]:
    """Its input and output are a terminal of 100 x 30."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    process = subprocess.Popen(
        argv(cluster, *words), stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    try:
        yield Screen(master, process)
    finally:
        process.kill()
        process.wait(DEADLINE_S)
        os.close(slave)
        os.close(master)


def test_input_output_and_exit_code_pass_through_pipes(cluster: Cluster) -> None:
    done = subprocess.run(
        argv(cluster, "sh", "-c", "cat; echo err >&2; [ -t 0 ] || exit 5"),
        input=b"in\0" * 50_000,
        capture_output=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (5, b"in\0" * 50_000, b"err\n")


def test_input_that_is_a_file_or_nothing_passes_too(cluster: Cluster) -> None:
    for path in ("/etc/hostname", "/dev/null"):
        with open(path, "rb") as file:
            done = subprocess.run(
                argv(cluster, "cat"), stdin=file, capture_output=True, timeout=DEADLINE_S, check=False
            )
            file.seek(0)
            assert (done.returncode, done.stdout) == (0, file.read())


def test_first_interrupt_is_the_commands_own(cluster: Cluster) -> None:
    with piped(cluster, "sh", "-c", COUNT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"asked\n"
        assert process.wait(DEADLINE_S) == 7


def test_second_interrupt_ends_what_does_not_listen_here_and_there(cluster: Cluster) -> None:
    with piped(cluster, "sh", "-c", "trap '' INT; echo ready; exec sleep 876") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)  # two signals of a kind that come together are one
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 130
    eventually(lambda: not any("876" in p.args for p in cluster.processes()), "it is gone", DEADLINE_S)


def test_signal_that_ended_it_is_told_as_a_shell_would(cluster: Cluster) -> None:
    with piped(cluster, "sh", "-c", "echo ready; exec sleep 765") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.terminate()
        assert process.wait(DEADLINE_S) == 128 + signal.SIGTERM


def test_connection_lost_while_it_runs_is_an_error_and_no_exit_code(cluster: Cluster) -> None:
    with piped(cluster, "sh", "-c", "echo ready; exec sleep 7") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"ready\n"
        cluster.kill_sshd_sessions("n2")
        assert process.wait(DEADLINE_S) == 8
        assert process.stderr.read().startswith(b"host_lost: n2: the connection was lost during sh")
    for left in cluster.processes():
        os.kill(left.pid, signal.SIGKILL)


def test_reader_that_goes_away_ends_it(cluster: Cluster) -> None:
    with piped(cluster, "yes") as process:
        assert process.stdout is not None
        process.stdout.read(10)
        process.stdout.close()
        process.stdout = None
        assert process.wait(DEADLINE_S) == 141, "not taken for a connection that was lost"
    eventually(lambda: not cluster.processes(), "it is gone", DEADLINE_S)


def test_terminal_has_its_size_its_keys_and_its_interrupt(cluster: Cluster) -> None:
    script = (
        "trap 'stty size; echo resized' WINCH; stty size; tty -s && echo yes; while :; do sleep 0.1; done"
    )
    with in_terminal(cluster, "bash", "-c", script) as screen:
        screen.until(b"30 100\r\nyes")
        screen.resize(120, 40)
        screen.until(b"40 120\r\nresized")
        screen.type(b"\x03")
        assert screen.process.wait(DEADLINE_S) == 128 + signal.SIGINT


def test_command_in_a_terminal_dies_with_the_one_who_called_it(cluster: Cluster) -> None:
    with in_terminal(cluster, "sh", "-c", "echo ready; sleep 654") as screen:
        screen.until(b"ready")
    eventually(lambda: not any("654" in p.args for p in cluster.processes()), "it is gone", DEADLINE_S)
