"""Who may share a frontend's port."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

import pytest

from dynctl.errors import PortInUse
from dynctl.frontend.shared_port import require_own, strangers
from dynctl.listeners import Listener, listeners

_SERVE = """
import socket, sys
with socket.socket() as server:
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    server.bind(("127.0.0.1", int(sys.argv[1])))
    server.listen()
    print(server.getsockname()[1], flush=True)
    sys.stdin.read()
"""


@contextmanager
def sharer(run: str, port: int = 0) -> Iterator[tuple[int, int]]:
    """A process of `run` that listens on a shared port: the port and its pid."""
    env = {**os.environ, "DYNCTL_RUN": run}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", _SERVE, str(port)], env=env, text=True, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout is not None
        yield int(process.stdout.readline()), process.pid
        process.communicate()


def test_frontends_of_one_run_share_and_another_runs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNCTL_RUN", "ours")
    with sharer("ours") as (port, _), sharer("ours", port):
        require_own("127.0.0.1", port)
        require_own("127.0.0.2", port)
        with sharer("theirs", port) as (_, pid), pytest.raises(PortInUse, match=f"{pid}") as refused:
            require_own("127.0.0.1", port)
        assert "not of this deployment" in str(refused.value)
        require_own("127.0.0.1", port)


def test_without_a_run_of_its_own_everybody_else_is_a_stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DYNCTL_RUN", raising=False)
    with sharer("") as (port, _):
        assert strangers("0.0.0.0", port)
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        own.listen()
        require_own("127.0.0.1", own.getsockname()[1])


def test_a_socket_whose_holder_cannot_be_seen_is_a_strangers(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    row = "0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 4711 1"
    (tmp_path / "net" / "tcp").write_text(f"head\n{row}\n")
    assert strangers("127.0.0.1", 8080, tmp_path) == {"4711": "a process of somebody else"}
    with pytest.raises(PortInUse, match="somebody else"):
        require_own("127.0.0.1", 8080, tmp_path)
    assert not strangers("127.0.0.1", 8081, tmp_path)


@pytest.mark.parametrize(
    ("address", "host", "meets"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.2", "127.0.0.1", False),
        ("0.0.0.0", "127.0.0.1", True),
        ("::", "127.0.0.1", True),
        ("127.0.0.1", "0.0.0.0", True),
        ("127.0.0.1", "localhost", True),
        ("::1", "::1", True),
        ("::1", "127.0.0.1", False),
    ],
)
def test_listeners_that_would_share_connections(address: str, host: str, meets: bool) -> None:
    assert Listener(ip_address(address), 1, "1").meets(host) is meets


def test_ipv6_listeners_are_read(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    rows = ["00000000000000000000000001000000", "0000000000000000FFFF00000100007F"]
    lines = [f"{i}: {row}:1F90 0:0 0A 0:0 00:0 0 0 0 {i}" for i, row in enumerate(rows)]
    (tmp_path / "net" / "tcp6").write_text("\n".join(["head", *lines]))
    assert [str(one.address) for one in listeners(tmp_path)] == ["::1", "127.0.0.1"]
