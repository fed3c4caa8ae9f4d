"""Facts of a host that do not come, and directories that are taken for shared and are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynctl import errors
from dynctl.launchers.probe import probe
from dynctl.launchers.shared import shared_groups
from dynctl.launchers.ssh_host import SshHost
from dynctl.protocol.hosts import HostQuestion
from tests.cluster.cluster import Cluster
from tests.cluster.ssh_hosts import DEADLINE_S, host, hosts, names_in, ssh_of, user_file


async def test_facts_come_from_a_host_that_has_no_dynctl(cluster: Cluster) -> None:
    async with ssh_of(cluster) as ssh:
        found = await ssh.connect_all(hosts("n2", "priv"))
        for name, there in found.items():
            assert isinstance(there, SshHost)
            facts = await probe(there, HostQuestion(paths=("~",)), timeout_s=60)
            assert (facts.host, facts.user, facts.home) == (name, "dyn", str(cluster.user_home))
            assert 22 in facts.listening
            assert facts.paths["~"].is_dir


async def test_login_shell_that_prints_does_not_spoil_the_facts(cluster: Cluster) -> None:
    chatty = user_file(cluster, cluster.folder / "hosts/priv/home/.bashrc", 'echo "{welcome}"; echo noise\n')
    try:
        async with ssh_of(cluster) as ssh:
            priv = await ssh.connect(host("priv"))
            assert await priv.home() == str(cluster.user_home)
            assert (await probe(priv, HostQuestion(), timeout_s=60)).host == "priv"
    finally:
        chatty.unlink()


async def test_host_without_python_is_told_with_the_remedy(cluster: Cluster, home: Path) -> None:
    async with ssh_of(cluster) as ssh:
        n2 = await ssh.connect(host("n2"))
        for python in ("python-of-nobody", f"{home}/bin/python3"):
            with pytest.raises(errors.HostPythonMissing, match=f"{python} cannot be run there") as caught:
                await probe(n2, HostQuestion(), python=python, timeout_s=DEADLINE_S)
            assert caught.value.where == "n2"
            assert "python:" in caught.value.hint


async def test_what_is_shared_is_found_and_nothing_is_left(
    cluster: Cluster, home: Path, local_home: Path
) -> None:
    async with ssh_of(cluster) as ssh:
        found = await ssh.connect_all(hosts("n1", "priv", "n2", "n3"))
        there = {name: one for name, one in found.items() if isinstance(one, SshHost)}
        assert await shared_groups(there, str(home)) == [["n1", "n2", "n3"], ["priv"]]
        assert await shared_groups(there, str(local_home)) == [["n1"], ["priv"], ["n2"], ["n3"]]
    assert names_in(home) == []
