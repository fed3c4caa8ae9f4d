"""What the SSH layer decides without a host: words, ways, errors, what is shared."""

from __future__ import annotations

import shlex
import subprocess
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynctl import errors
from dynctl.cli.exits import EXIT_CODES
from dynctl.launchers.shared import same_directory
from dynctl.launchers.ssh import hop_of
from dynctl.launchers.ssh_errors import command_error, first_line, python_error
from dynctl.launchers.ssh_host import SshHost, _line
from dynctl.topology.inventory import Ssh

WORDS = st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), max_size=5)


@given(WORDS, WORDS)
def test_no_word_gets_out_of_its_quotes(words: list[str], values: list[str]) -> None:
    env = {f"V{i}": value for i, value in enumerate(values)}
    line = _line(["program", *words], env)
    told = ["env", *(f"{name}={value}" for name, value in env.items())] if env else []
    assert shlex.split(line) == [*told, "program", *words]


def test_shells_take_the_line_apart_as_it_was_put_together() -> None:
    words = ["a b", "$(id)", "`id`", "'", '"', "\\", "*", "", "-n", "new\nline", "!x"]
    for shell in ("sh", "bash"):
        line = _line(["printf", "%s\\0", *words], None)
        said = subprocess.run([shell, "-c", line], capture_output=True, check=True, timeout=20).stdout
        assert said.decode().split("\0")[:-1] == words


@pytest.mark.parametrize(
    ("text", "hop"),
    [
        ("jump", Ssh("jump")),
        ("me@jump", Ssh("jump", "me")),
        ("me@jump:2222", Ssh("jump", "me", 2222)),
        ("ssh://me@jump:22", Ssh("jump", "me", 22)),
        ("[fe80::1]:22", Ssh("fe80::1", port=22)),
        ("[fe80::1]", Ssh("fe80::1")),
        ("a@b@jump", Ssh("jump", "a@b")),
    ],
)
def test_hosts_on_the_way_are_read_as_ssh_reads_them(text: str, hop: Ssh) -> None:
    assert hop_of(text) == hop


@pytest.mark.parametrize(
    ("seen", "groups"),
    [
        ({}, []),
        ({"a": ["a"]}, [["a"]]),
        ({"a": ["a", "b"], "b": ["a", "b"], "c": ["c"]}, [["a", "b"], ["c"]]),
        ({"a": ["a"], "b": ["a", "b"]}, [["a"], ["b"]]),
        ({"a": ["a", "c"], "b": ["b", "d"], "c": ["a", "c"], "d": ["b", "d"]}, [["a", "c"], ["b", "d"]]),
    ],
)
def test_only_who_sees_each_other_shares(seen: dict[str, list[str]], groups: list[list[str]]) -> None:
    assert same_directory(seen) == groups


@pytest.mark.parametrize(
    ("code", "stderr", "kind", "told"),
    [
        (
            1,
            b"\n  \ncat: x: No space left on device\n",
            "host_disk_full",
            "its disk is full: cat: x: No space",
        ),
        (1, b"sh: write error: Disk quota exceeded", "host_disk_full", "its disk is full"),
        (2, b"first\nsecond", "ssh", "it failed there with exit code 2: first"),
        (-9, b"", "ssh", "it was ended by signal 9"),
        (127, b"", "ssh", "it failed there with exit code 127"),
    ],
)
def test_failed_command_tells_host_and_first_line(code: int, stderr: bytes, kind: str, told: str) -> None:
    error = command_error("n1", "it", code, stderr)
    assert (error.kind, error.where) == (kind, "n1")
    assert error.message.startswith(told)


def test_python_that_is_not_there_is_not_any_failure() -> None:
    assert python_error("n1", "python3", 127, b"sh: python3: not found").kind == "host_python"
    assert python_error("n1", "python3", 1, b"Traceback").kind == "ssh"
    assert first_line(b"\n \n") == ""


def test_every_failure_of_a_host_has_an_exit_code() -> None:
    found = [errors.SshError]
    for error in found:
        found.extend(error.__subclasses__())
    assert len(found) > 8
    assert {error.kind for error in found} <= set(EXIT_CODES)


class _Deaf:
    """The process and the connection of a command that ends without reading its input."""

    exit_status, exit_signal = 1, None

    def __init__(self, closed: bool) -> None:
        self.closed = closed

    def is_closed(self) -> bool:
        return self.closed

    async def create_process(self, line: str, **options: Any) -> _Deaf:
        return self

    async def communicate(self, data: bytes | None = None) -> tuple[bytes, bytes]:
        if data:
            raise BrokenPipeError("Channel not open for sending")
        return b"", b"broken"

    def close(self) -> None:
        pass


async def test_a_command_that_does_not_read_its_input_is_no_lost_connection() -> None:
    connection: Any = _Deaf(closed=False)
    done = await SshHost("n1", connection).run(["it"], stdin=b"input", timeout_s=5.0)
    assert (done.code, done.stderr) == (1, b"broken")


async def test_input_that_a_closed_connection_does_not_take_is_a_lost_one() -> None:
    connection: Any = _Deaf(closed=True)
    with pytest.raises(errors.HostLost):
        await SshHost("n1", connection).run(["it"], stdin=b"input", timeout_s=5.0)
