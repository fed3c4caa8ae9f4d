"""Who holds a port, with real sockets and processes of this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynctl.worker.port_holder import Holder, find_holder, is_former_self, listening_inodes

LISTEN = """
import socket, sys
s = socket.socket(); s.bind(("127.0.0.1", 0)); s.listen()
print(s.getsockname()[1], flush=True); sys.stdin.read()
"""


@pytest.fixture
def listener() -> Iterator[tuple[int, int]]:
    """Pid and port of a process in a group of its own that listens."""
    process = subprocess.Popen(
        [sys.executable, "-c", LISTEN],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert process.stdout is not None
    yield process.pid, int(process.stdout.readline())
    process.communicate("")


def test_free_port_has_no_holder() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert find_holder("127.0.0.1", unused.getsockname()[1], 0) is None


def test_stranger_is_named_and_our_own_is_ours(listener: tuple[int, int]) -> None:
    pid, port = listener
    stranger = find_holder("127.0.0.1", port, os.getpid() + 1_000_000)
    assert stranger is not None
    assert (stranger.pid, stranger.ours) == (pid, False)
    assert str(stranger).startswith(f"port {port} is held by pid {pid} (python")
    ours = find_holder("127.0.0.1", port, pid)
    assert ours is not None
    assert ours.ours
    below = find_holder("127.0.0.1", port, os.getpid())
    assert below is not None
    assert below.ours


def test_another_address_with_the_same_port_is_not_in_the_way(listener: tuple[int, int]) -> None:
    _, port = listener
    assert find_holder("127.0.0.2", port, 0) is None
    assert find_holder("::1", port, 0) is None
    assert find_holder("::ffff:127.0.0.1", port, 0) is not None
    assert find_holder("localhost", port, 0) is not None


def test_wildcard_listener_counts_for_every_address() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        assert listening_inodes("127.0.0.1", taken.getsockname()[1])


def test_process_that_cannot_be_looked_into_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "tcp").write_text(
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
        "   0: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1\n"
    )
    (tmp_path / "1").mkdir()
    holder = find_holder("10.0.0.1", 8080, 1, tmp_path)
    assert holder == Holder(8080, 0, "", ours=False)
    assert "another user" in str(holder)


def fake_process(proc: Path, pid: int, environ: bytes) -> None:
    (proc / str(pid) / "fd").mkdir(parents=True)
    (proc / str(pid) / "fd" / "3").symlink_to("socket:[4711]")
    (proc / str(pid) / "stat").write_text(f"{pid} (a) b) S 1 {pid} {pid} " + "0 " * 20)
    (proc / str(pid) / "environ").write_bytes(environ)


@pytest.mark.parametrize(("incarnation", "ours", "former"), [(b"2", True, True), (b"1", False, True)])
def test_container_process_is_known_by_its_marks(
    tmp_path: Path, incarnation: bytes, ours: bool, former: bool
) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "tcp").write_text("head\n 0: 0100007F:1F90 0:0 0A 0 0 0 0 0 4711 1\n")
    marks = b"DYNCTL_RUN=r\0DYNCTL_PROCESS=decode-0\0DYNCTL_INCARNATION="
    (tmp_path / str(os.getpid())).mkdir()
    (tmp_path / str(os.getpid()) / "environ").write_bytes(marks + b"2\0PATH=/bin")
    fake_process(tmp_path, 77, marks + incarnation)
    holder = find_holder("127.0.0.1", 8080, 50, tmp_path)
    assert holder is not None
    assert (holder.pid, holder.ours) == (77, ours)
    assert holder.name == "gone"
    assert is_former_self(77, tmp_path) is former


def test_process_without_marks_is_no_former_self() -> None:
    assert not is_former_self(1)
