"""Commands and files that get to a host otherwise than they were given, or die or live when they must not."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from dynctl import errors
from dynctl.launchers.ssh import SshHosts
from dynctl.launchers.ssh_host import SshHost
from tests.cluster.cluster import Cluster
from tests.cluster.ssh_hosts import (
    DEADLINE_S,
    content_of,
    host,
    hosts,
    mode_of,
    names_in,
    ssh_of,
    until,
)

HOSTILE = [
    "$(touch /tmp/dynctl-pwned)",
    "`id`",
    "a b",
    "'",
    '"',
    "; reboot",
    "*",
    "~",
    "\\",
    "\\n",
    "new\nline",
    "",
    "-n",
    "ü€\U0001f600",
    "!!",
    "#",
    "&& false",
    "$HOME",
    "${x:-y}",
    "\t",
]


@asynccontextmanager
async def one(cluster: Cluster, name: str = "n2") -> AsyncIterator[tuple[SshHosts, SshHost]]:
    """One host, connected."""
    async with ssh_of(cluster) as ssh:
        yield ssh, await ssh.connect(host(name))


async def test_words_arrive_as_they_were_given(cluster: Cluster) -> None:
    async with one(cluster) as (_, n2):
        script = 'for word in "$@"; do printf "%s\\0" "$word"; done'
        said = await n2.check(["sh", "-c", script, "sh", *HOSTILE], timeout_s=DEADLINE_S)
        assert said.decode().split("\0")[:-1] == HOSTILE
        env = {f"V{i}": word for i, word in enumerate(HOSTILE)}
        done = await n2.run(["sh", "-c", 'printf "%s\\0" "$V0" "$V10"'], env=env, timeout_s=DEADLINE_S)
        assert done.stdout.decode().split("\0")[:2] == [HOSTILE[0], HOSTILE[10]]
    assert "dynctl-pwned" not in os.listdir("/tmp")


async def test_what_cannot_be_passed_on_is_refused_before_it_is_run(cluster: Cluster) -> None:
    async with one(cluster) as (_, n2):
        for argv, env in ((["a\0b"], {}), (["A=b"], {"X": "y"}), (["true"], {"X;reboot": "y"})):
            with pytest.raises(ValueError, match=r"variable|NUL"):
                await n2.run(argv, env=env, timeout_s=DEADLINE_S)


async def test_how_a_command_ended_is_told_as_it_was(cluster: Cluster) -> None:
    async with one(cluster) as (_, n2):
        done = await n2.run(["sh", "-c", "cat; echo oops >&2; exit 3"], stdin=b"\0\xff" * 99999, timeout_s=30)
        assert (done.code, done.stdout, done.first_line) == (3, b"\0\xff" * 99999, "oops")
        assert (await n2.run(["sh", "-c", "kill -9 $$"], timeout_s=DEADLINE_S)).code == -signal.SIGKILL
        with pytest.raises(errors.SshError, match="sh failed there with exit code 3: oops") as caught:
            await n2.check(["sh", "-c", "echo; echo oops >&2; exit 3"], timeout_s=DEADLINE_S)
        assert caught.value.where == "n2"


async def test_more_commands_at_once_than_sessions_all_end(cluster: Cluster) -> None:
    async with one(cluster) as (_, n2):
        done = await asyncio.gather(*(n2.run(["echo", str(i)], timeout_s=DEADLINE_S) for i in range(40)))
        assert [int(d.stdout) for d in done] == list(range(40))


async def test_late_command_is_ended_there(cluster: Cluster) -> None:
    async with one(cluster) as (_, n2):
        with pytest.raises(errors.HostTimeout, match="sleep did not end within"):
            await n2.run(["sleep", "987"], timeout_s=0.5)
        await until(lambda: not _runs(cluster, "sleep 987"), "it is gone")
        assert n2.alive


async def test_session_that_dies_half_way_is_lost_and_another_is_made(cluster: Cluster) -> None:
    async with one(cluster) as (ssh, n2):
        pending = asyncio.ensure_future(n2.run(["sleep", "5"], timeout_s=DEADLINE_S))
        await until(lambda: _runs(cluster, "sleep 5"), "it runs")
        cluster.kill_sshd_sessions("n2")
        with pytest.raises(errors.HostLost, match="the connection was lost during sleep"):
            await pending
        assert not n2.alive
        with pytest.raises(errors.HostLost):
            await n2.run(["true"], timeout_s=DEADLINE_S)
        again = await ssh.connect(host("n2"))
        assert again is not n2
        assert (await again.run(["true"], timeout_s=DEADLINE_S)).code == 0
        await again.run(["pkill", "-x", "sleep"], timeout_s=DEADLINE_S)


async def test_silent_cut_is_noticed_and_other_hosts_go_on(cluster: Cluster) -> None:
    async with ssh_of(cluster) as ssh:
        found = await ssh.connect_all(hosts("n3", "n4", "priv"))
        n3, n4 = found["n3"], found["n4"]
        assert isinstance(n3, SshHost)
        assert isinstance(n4, SshHost)
        with cluster.cut("n3"):
            pending = asyncio.ensure_future(n3.run(["sleep", "3"], timeout_s=120.0))
            for _ in range(10):
                assert (await n4.run(["true"], timeout_s=DEADLINE_S)).code == 0
            with pytest.raises(errors.HostLost):
                await asyncio.wait_for(pending, 60)
            await asyncio.wait_for(n3.wait_lost(), 10)
        assert (await (await ssh.connect(host("n3"))).run(["true"], timeout_s=DEADLINE_S)).code == 0


async def test_full_output_of_a_command_that_says_much_and_reads_nothing(cluster: Cluster) -> None:
    async with one(cluster) as (_, n2):
        done = await n2.run(["head", "-c", "9000000", "/dev/zero"], stdin=b"x" * 5_000_000, timeout_s=60)
        assert (done.code, len(done.stdout)) == (0, 9_000_000)


async def test_files_are_put_whole_for_this_user_alone(cluster: Cluster, home: Path) -> None:
    path = f"{home}/new dir/it's; $(id)\n.json"
    async with one(cluster) as (_, n2):
        await n2.put({path: b"first", f"{home}/new dir/big": bytes(3_000_000)})
        await n2.put({path: b"second \0"}, mode=0o640)
    file = Path(path)
    assert content_of(file) == b"second \0"
    assert (mode_of(file), mode_of(file.parent)) == (0o640, 0o700)
    assert names_in(file.parent) == sorted([file.name, "big"])
    assert os.stat(file).st_uid == cluster.user_id


@pytest.mark.parametrize(("mode", "owner"), [(0o755, ""), (0o770, ""), (0o700, "root")])
async def test_files_are_not_put_where_others_may_come_in(
    cluster: Cluster, home: Path, mode: int, owner: str
) -> None:
    os.makedirs(home)
    os.chmod(home, mode)
    shutil.chown(home, owner or cluster.user_id)
    async with one(cluster) as (_, n2):
        with pytest.raises(errors.SshError, match=r"has mode|belongs to user 0") as caught:
            await n2.put({f"{home}/key": b"secret"})
    assert caught.value.where == "n2"
    assert f"chmod 700 {home}" in caught.value.hint
    assert names_in(home) == []


async def test_connection_lost_while_a_file_is_put_leaves_the_old_one(cluster: Cluster, home: Path) -> None:
    path = home / "file"
    async with one(cluster) as (_, n2):
        await n2.put({str(path): b"old"})
        with cluster.slow("n2", "8mbit"):
            pending = asyncio.ensure_future(n2.put({str(path): bytes(40_000_000)}, timeout_s=120))
            await until(lambda: len(names_in(home)) == 2, "it is being put")
            cluster.kill_sshd_sessions("n2")
            with pytest.raises(errors.HostLost):
                await pending
    await until(lambda: names_in(home) == ["file"], "the draft is gone")
    assert content_of(path) == b"old"


async def test_full_disk_of_the_host_is_called_so_and_leaves_the_old_file(
    cluster: Cluster, home: Path, token: str
) -> None:
    async with one(cluster) as (_, n2):
        await n2.put({f"/run/local/{token}/file": b"old"})
        with cluster.full_disk("n2") as full:
            cluster.exec("n2", "chmod", "700", full)
            with pytest.raises(errors.HostDiskFull, match="No space left on device") as caught:
                await n2.put({f"{full}/file": bytes(2_000_000)})
            assert caught.value.where == "n2"
            left = cluster.exec("n2", "ls", "-A", full).stdout.split()
            assert left == ["filler"]
        await n2.run(["rm", "-rf", f"/run/local/{token}"], timeout_s=DEADLINE_S)


async def test_detached_process_outlives_connection_and_session(cluster: Cluster, home: Path) -> None:
    log = home / "log"
    async with one(cluster) as (_, n2):
        await n2.put({f"{home}/there": b""})
        script = 'printf "%s|" "$SECRET" "$PWD" "$1"; umask; sleep 60'
        argv = ["sh", "-c", script, "sh", "a b"]
        env = {"SECRET": "it's; $(id)\n`x`"}
        started = await n2.start_detached(argv, cwd=str(home), env=env, log=str(log))
        await until(lambda: content_of(log).endswith(b"\n"), "it has said something")
        assert content_of(log).decode() == f"it's; $(id)\n`x`|{home}|a b|0022\n"
        assert mode_of(log) == 0o600
        stat = await n2.check(["cat", f"/proc/{started.pid}/stat"], timeout_s=DEADLINE_S)
        fields = stat.decode().rpartition(") ")[2].split()
        assert int(fields[19]) == started.start_ticks
        assert fields[2] == fields[3] == str(started.pid), "group and session of its own"
        said = await n2.check(["ps", "-eo", "args"], timeout_s=DEADLINE_S)
        assert b"$(id)" not in said
    cluster.kill_sshd_sessions("n2")
    async with one(cluster) as (_, n2):
        assert (await n2.run(["kill", "-0", str(started.pid)], timeout_s=DEADLINE_S)).code == 0
        await n2.run(["pkill", "-s", str(started.pid)], timeout_s=DEADLINE_S)


async def test_what_cannot_be_started_says_so_at_once(cluster: Cluster, home: Path) -> None:
    async with one(cluster) as (_, n2):
        await n2.put({f"{home}/there": b""})
        for argv, cwd, told in (
            (["/no/such/program"], "/tmp", "starting program failed there .* no such program"),
            (["sleep", "60"], f"{home}/nowhere", "starting sleep failed there .* can't cd"),
        ):
            with pytest.raises(errors.SshError, match=told):
                await n2.start_detached(argv, cwd=cwd, env={}, log=f"{home}/log")
    assert not cluster.processes()


def _runs(cluster: Cluster, args: str) -> bool:
    return any(args in process.args for process in cluster.processes())
