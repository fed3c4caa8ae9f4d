"""Connections that must not be made, are made in vain, or fail without saying why."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from dynctl import errors
from dynctl.launchers.ssh import SshHosts
from dynctl.launchers.ssh_config import SshOptions
from dynctl.launchers.ssh_host import SshHost
from dynctl.topology.inventory import Host, Ssh
from tests.cluster.cluster import Cluster
from tests.cluster.commands import run
from tests.cluster.ssh_hosts import config_with, host, hosts, key_in, ssh_of

ALL = ("head", "n1", "n2", "n3", "n4", "priv")


async def reached(cluster: Cluster, wanted: Host, config: Path | None = None) -> str:
    """The name that the host gives itself. Raises SshError."""
    async with ssh_of(cluster, config=config) as ssh:
        return (await (await ssh.connect(wanted)).check(["hostname"], timeout_s=30)).decode().strip()


async def refused(cluster: Cluster, wanted: Host, config: Path | None = None) -> errors.SshError:
    """Why it was not reached."""
    with pytest.raises(errors.SshError) as caught:
        await reached(cluster, wanted, config)
    assert caught.value.where == wanted.name
    return caught.value


async def test_each_host_has_one_connection_whatever_is_asked(cluster: Cluster) -> None:
    async with ssh_of(cluster) as ssh:
        first = await ssh.connect_all(hosts(*ALL))
        second = await ssh.connect_all(hosts(*reversed(ALL)))
        assert list(first) == list(ALL)
        for name, one in first.items():
            assert isinstance(one, SshHost)
            assert second[name] is one
            assert (await one.check(["hostname"], timeout_s=30)).decode().strip() == name
    assert not any(one.alive for one in first.values() if isinstance(one, SshHost))


@asynccontextmanager
async def mute() -> AsyncIterator[int]:
    """A port on which somebody listens and says nothing."""
    held: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda _, writer: held.append(writer), "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]
        for writer in held:
            writer.close()


@contextmanager
def closed_port() -> Iterator[int]:
    """A port on which nobody listens."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


async def test_hosts_that_fail_or_hang_leave_the_others_alone_and_say_why(cluster: Cluster) -> None:
    async with mute() as hung, ssh_of(cluster, connect_s=4.0) as ssh:
        with closed_port() as nobody:
            found = await ssh.connect_all(
                [
                    host("hung", Ssh("127.0.0.1", port=hung)),
                    host("closed", Ssh("127.0.0.1", port=nobody)),
                    host("nameless", Ssh("no-such-host.invalid")),
                    host("far", Ssh("priv", proxy_jump="none")),
                    host("behind", Ssh("n4", proxy_jump="no-such-jump.invalid")),
                    *hosts("n1", "n2", "priv"),
                ]
            )
    told = {name: e for name, e in found.items() if isinstance(e, errors.SshError)}
    assert {name: (e.kind, e.where) for name, e in told.items()} == {
        "hung": ("host_timeout", "hung"),
        "closed": ("host_unreachable", "closed"),
        "nameless": ("host_unreachable", "nameless"),
        "far": ("host_unreachable", "far"),
        "behind": ("host_unreachable", "behind"),
    }
    assert f"127.0.0.1 port {hung} within 4 s" in told["hung"].message
    assert told["closed"].message.endswith("Connection refused")
    assert "no-such-host.invalid is not known" in told["nameless"].message
    assert "on the way there, no-such-jump.invalid: the name" in told["behind"].message
    assert set(found) - set(told) == {"n1", "n2", "priv"}


async def test_unknown_host_key_is_refused_and_the_way_told_adds_it(cluster: Cluster, tmp_path: Path) -> None:
    known = tmp_path / "known hosts"
    for lax in ("StrictHostKeyChecking no", "StrictHostKeyChecking accept-new"):
        config = config_with(cluster, tmp_path / "config", lax, f'UserKnownHostsFile "{known}"')
        error = await refused(cluster, host("n2"), config)
        assert error.kind == "host_key_unknown"
        assert "ssh-ed25519 SHA256:" in error.message
    way = error.hint.split(": ", 1)[1].split(";")[0]
    assert way == f"ssh-keyscan {cluster.addresses['n2']} >> '{known}'"
    run(["sh", "-c", way], timeout=30)
    assert await reached(cluster, host("n2"), config) == "n2"
    assert (await refused(cluster, host("n3"), config)).kind == "host_key_unknown"


async def test_no_known_hosts_file_at_all_trusts_nobody(cluster: Cluster, tmp_path: Path) -> None:
    config = config_with(cluster, tmp_path / "config", "UserKnownHostsFile none")
    assert (await refused(cluster, host("n1"), config)).kind == "host_key_unknown"


async def test_address_of_a_known_host_is_no_proof_for_another_name(cluster: Cluster, tmp_path: Path) -> None:
    config = config_with(cluster, tmp_path / "config", "HostKeyAlias elsewhere")
    error = await refused(cluster, host("n1"), config)
    assert error.kind == "host_key_unknown"
    assert "StrictHostKeyChecking=ask" in error.hint


async def test_another_key_than_the_known_one_is_refused_as_changed(cluster: Cluster, tmp_path: Path) -> None:
    known = tmp_path / "known"
    other = (cluster.folder / "hosts/n3/hostkey.pub").read_text().split()[:2]
    known.write_text(f"{cluster.addresses['n2']} {' '.join(other)}\n")
    config = config_with(cluster, tmp_path / "config", f"UserKnownHostsFile {known}")
    error = await refused(cluster, host("n2"), config)
    assert error.kind == "host_key_changed"
    assert f"ssh-keygen -R {cluster.addresses['n2']} -f {known}" in error.hint


async def test_revoked_key_is_refused_though_it_is_known(cluster: Cluster, tmp_path: Path) -> None:
    known = tmp_path / "known"
    key = " ".join((cluster.folder / "hosts/n2/hostkey.pub").read_text().split()[:2])
    known.write_text(f"{cluster.addresses['n2']} {key}\n@revoked * {key}\n")
    config = config_with(cluster, tmp_path / "config", f"UserKnownHostsFile {known}")
    error = await refused(cluster, host("n2"), config)
    assert error.kind == "host_key_changed"
    assert "revoked" in error.message


async def test_known_hosts_hashed_or_with_broken_lines_are_read(cluster: Cluster, tmp_path: Path) -> None:
    known = tmp_path / "known"
    known.write_bytes((cluster.folder / "ssh/known_hosts").read_bytes())
    run(["ssh-keygen", "-q", "-H", "-f", known], timeout=30)
    known.write_text("what is this\n@odd n1 ssh-rsa AAAA\n|1|x|y ssh-rsa A\n" + known.read_text())
    missing = tmp_path / "missing"
    config = config_with(cluster, tmp_path / "config", f"UserKnownHostsFile {missing} {known}")
    assert await reached(cluster, host("n2"), config) == "n2"


async def test_unknown_key_of_a_host_on_the_way_names_that_host(cluster: Cluster, tmp_path: Path) -> None:
    known = tmp_path / "known"
    lines = (cluster.folder / "ssh/known_hosts").read_text().splitlines()
    known.write_text("\n".join(line for line in lines if not line.startswith("n1,")) + "\n")
    config = config_with(cluster, tmp_path / "config", f"UserKnownHostsFile {known}")
    error = await refused(cluster, host("priv"), config)
    assert error.kind == "host_key_unknown"
    assert error.message.startswith("on the way there, n1: the host key of")


async def test_wrong_key_tells_which_keys_were_tried(cluster: Cluster, tmp_path: Path) -> None:
    key = key_in(tmp_path)
    error = await refused(cluster, host("n1", Ssh("n1", key=str(key))))
    assert error.kind == "ssh_auth"
    assert f"dyn@{cluster.addresses['n1']} was not let in; tried: {key}; " in error.message


@pytest.mark.parametrize("kind", ["missing", "open", "encrypted", "no key"])
async def test_key_that_cannot_be_used_says_so(cluster: Cluster, tmp_path: Path, kind: str) -> None:
    key = tmp_path / "key"
    said = {"missing": "no such file", "no key": "by the agent"}.get(kind, f"{key} ({kind}")
    if kind == "open":
        key.write_bytes((cluster.folder / "ssh/id").read_bytes())
        key.chmod(0o644)
        said = f"left out, others may read it: chmod 600 {key}"
    elif kind == "encrypted":
        key_in(tmp_path, passphrase="secret")
        said = f"encrypted: ssh-add {key}"
    elif kind == "no key":
        key.write_text("nothing of the kind")
    error = await refused(cluster, host("n1", Ssh("n1", key=str(key))))
    assert error.kind == "ssh_auth"
    assert said in error.message


@contextmanager
def agent(folder: Path, *keys: Path) -> Iterator[Path]:
    """An ssh-agent with these keys."""
    path = folder / "agent"
    said = run(["ssh-agent", "-a", path], timeout=30).stdout
    pid = said.split("SSH_AGENT_PID=")[1].split(";")[0]
    try:
        for key in keys:
            run(["ssh-add", "-q", key], timeout=30, env={**os.environ, "SSH_AUTH_SOCK": str(path)})
        yield path
    finally:
        run(["kill", pid], timeout=30)


async def test_agent_opens_what_the_files_do_not(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = tmp_path / "good"
    good.write_bytes((cluster.folder / "ssh/id").read_bytes())
    good.chmod(0o600)
    config = config_with(
        cluster, tmp_path / "config", "IdentitiesOnly no", f"IdentityFile {key_in(tmp_path, 'wrong')}"
    )
    with agent(tmp_path, good) as path:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(path))
        # What is asked for by name is used alone: the good key of the agent is not.
        only = host("n1", Ssh("n1", key=str(tmp_path / "wrong")))
        assert "agent with 1 keys" in (await refused(cluster, only)).message
        config.write_text(config.read_text().split("Include")[0])
        monkeypatch.setenv("HOME", str(tmp_path))
        known = cluster.folder / "ssh/known_hosts"
        lines = f"  HostName {cluster.addresses['n1']}\n  User dyn\n  UserKnownHostsFile {known}\n"
        config.write_text(config.read_text() + lines)
        assert await reached(cluster, host("n1"), config) == "n1"
        good.with_name("good.pub").write_bytes((cluster.folder / "ssh/id.pub").read_bytes())
        good.unlink()
        config.write_text(f"Host *\n  IdentitiesOnly yes\n  IdentityFile {good}.pub\n{lines}")
        assert await reached(cluster, host("n1"), config) == "n1"
    assert "does not answer" in (await refused(cluster, host("n1"), config)).message


async def test_inventory_says_more_than_the_configuration(cluster: Cluster, tmp_path: Path) -> None:
    config = config_with(cluster, tmp_path / "config", "User nobody-here", "Port 9", "ProxyJump n1")
    given = host("n2", Ssh("n2", user="dyn", port=22, proxy_jump="none"))
    assert await reached(cluster, given, config) == "n2"
    by_jump = host("n2", Ssh("n2", user="dyn", port=22, proxy_jump="dyn@n3:22,dyn@n4:22"))
    plain = config_with(cluster, tmp_path / "plain")
    async with ssh_of(cluster, config=plain) as ssh:
        there = await ssh.connect(by_jump)
        said = await there.check(["sh", "-c", "echo $SSH_CONNECTION"], timeout_s=30)
    assert said.decode().split()[0] == cluster.addresses["n4"]


async def test_inventory_alone_is_enough_without_any_configuration(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    known = cluster.folder / "ssh/known_hosts"
    given = Ssh(cluster.addresses["n2"], "dyn", 22, str(cluster.folder / "ssh/id"))
    async with SshHosts(SshOptions(known_hosts=(known,), limit=1)) as ssh:
        found = await ssh.connect_all([host("a", given), host("b", given)])
        assert all(isinstance(one, SshHost) for one in found.values())
    async with SshHosts(SshOptions()) as ssh:
        with pytest.raises(errors.HostKeyUnknown) as caught:
            await ssh.connect(host("a", given))
    assert f">> {tmp_path}/.ssh/known_hosts" in caught.value.hint


async def test_hosts_behind_the_same_jump_share_the_way(cluster: Cluster) -> None:
    behind = [host(f"b{n}", Ssh("n2", proxy_jump="n4")) for n in range(6)]
    async with ssh_of(cluster) as ssh:
        found = await ssh.connect_all([*behind, host("n4")])
        assert all(isinstance(one, SshHost) for one in found.values())
        n4 = found["n4"]
        assert isinstance(n4, SshHost)
        said = await n4.check(["sh", "-c", "grep -c ':0016 .* 01 ' /proc/net/tcp"], timeout_s=30)
        # This connection, the one on the way, and six from there.
        assert int(said) <= 8


async def test_jump_that_leads_to_itself_ends(cluster: Cluster, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(f"Host a\n  ProxyJump b\nHost b\n  ProxyJump a\nInclude {cluster.ssh_config}\n")
    error = await refused(cluster, host("a"), config)
    assert "never ends" in error.message


async def test_broken_configuration_is_told_by_file_and_line(cluster: Cluster, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("Host *\n  Port many\n")
    error = await refused(cluster, host("n1"), config)
    assert f"{config} line 2" in error.message


def test_variable_names_the_configuration_instead_of_the_usual_ones(tmp_path: Path) -> None:
    assert SshOptions.find({"DYNCTL_SSH_CONFIG": str(tmp_path / "c")}).configs == (tmp_path / "c",)
    assert tmp_path / "c" not in SshOptions.find({}).configs


async def test_power_cut_on_the_way_there_is_a_timeout_of_that_host_only(cluster: Cluster) -> None:
    with cluster.cut("n3"):
        async with ssh_of(cluster, connect_s=3.0) as ssh:
            found = await ssh.connect_all(hosts("n3", "n4"))
    lost = found["n3"]
    assert isinstance(lost, errors.SshError)
    assert lost.kind in ("host_timeout", "host_unreachable")
    assert isinstance(found["n4"], SshHost)
