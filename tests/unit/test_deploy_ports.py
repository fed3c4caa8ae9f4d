"""Which ports are taken and by whom."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from dynctl.deploy.ports import holder, listen_error, listening


def test_a_listener_is_found_with_its_holder() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        assert port in listening()
        assert holder(port).endswith(f"(pid {os.getpid()})")
        error = listen_error("127.0.0.1", port)
        assert error is not None
        assert error.errno == errno.EADDRINUSE
    assert listen_error("127.0.0.1", port) is None
    assert holder(port) == ""


def test_a_foreign_address_cannot_be_listened_on() -> None:
    error = listen_error("192.0.2.1", 0)
    assert error is not None
    assert error.errno == errno.EADDRNOTAVAIL


def test_without_the_kernels_tables_nothing_is_known(tmp_path: Path) -> None:
    assert listening(tmp_path) == set()


def test_a_holder_of_somebody_else_is_not_named(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    row = "0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 4711 1"
    (tmp_path / "net" / "tcp").write_text(f"head\n{row}\n")
    (tmp_path / "12").mkdir()
    assert listening(tmp_path) == {8080}
    assert holder(8080, tmp_path) == ""
    fds = tmp_path / "12" / "fd"
    fds.mkdir()
    (fds / "3").symlink_to("socket:[4711]")
    assert holder(8080, tmp_path) == "a process (pid 12)"
