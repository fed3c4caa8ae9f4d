"""What `up` makes of hosts that are not well."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dynctl.cli import up_ssh
from dynctl.deploy.home import Home
from dynctl.deploy.remote_note import Remote, RemoteHost, save_remote
from dynctl.errors import HostDynctlMissing, HostPythonMissing, LaunchError, SshError
from dynctl.topology.inventory import Host, Ssh


async def _fails(error: Exception, after_s: float) -> Any:
    await asyncio.sleep(after_s)
    raise error


@pytest.mark.parametrize("later_s", [0.0, 0.02])
async def test_what_is_told_of_a_python_that_will_not_do_is_the_same_every_time(
    later_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, broken = LaunchError("has dynctl 0.0.1", where="n1"), SshError("exit code 1", where="n1")
    monkeypatch.setattr(up_ssh, "_dynctl", lambda *args: _fails(version, later_s))
    monkeypatch.setattr(up_ssh, "probe", lambda *args, **kwargs: _fails(broken, 0.01))
    monkeypatch.setattr(up_ssh, "reached_at", lambda *args: asyncio.sleep(0, "n1"))
    shell: Any = SimpleNamespace()
    how: Any = SimpleNamespace()
    with pytest.raises(LaunchError, match="has dynctl"):
        await up_ssh._look_at(Host("n1", "n1", 0), shell, None, how)


async def test_hosts_that_cannot_be_reached_are_told_beside_those_that_will_not_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(up_ssh, "_look_at", lambda *args: _fails(LaunchError("no dynctl", where="n4"), 0.0))
    hosts = (Host("n2", "n2", 0, python="/p"), Host("n4", "n4", 0, python="/p"))
    checked: Any = SimpleNamespace(inventory=SimpleNamespace(hosts=hosts))
    how: Any = SimpleNamespace(bootstrap=False)
    reached: Any = {"n4": SimpleNamespace()}
    with pytest.raises(Exception, match="no dynctl") as raised:
        await up_ssh._look(checked, reached, [SshError("wrong key", where="n2")], how)
    assert "n2" in str(raised.value)
    assert "n4" in str(raised.value)


@pytest.mark.parametrize("later_s", [0.0, 0.02])
async def test_a_host_without_any_python_is_told_so_and_not_that_dynctl_is_missing(
    later_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = HostDynctlMissing("dynctl is not installed", where="n1", hint="--bootstrap installs this one")
    none = HostPythonMissing("python3 cannot be run there", where="n1")
    monkeypatch.setattr(up_ssh, "_dynctl", lambda *args: _fails(without, later_s))
    monkeypatch.setattr(up_ssh, "probe", lambda *args, **kwargs: _fails(none, 0.01))
    monkeypatch.setattr(up_ssh, "reached_at", lambda *args: asyncio.sleep(0, "n1"))
    shell: Any = SimpleNamespace()
    how: Any = SimpleNamespace()
    with pytest.raises(HostPythonMissing):
        await up_ssh._look_at(Host("n1", "n1", 0), shell, None, how)


@pytest.mark.parametrize("ended", [None, True, False])
async def test_hosts_that_cannot_be_reached_are_all_told_unless_something_of_the_name_runs(
    ended: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNCTL_HOME", str(tmp_path))
    if ended is not None:
        host = RemoteHost(name="n1", python="python3", home="/there", ssh=Ssh("n1"))
        note = Remote(name="d", run_id="d-1", hosts=[host], recipe="", ended=ended)
        save_remote(Home(tmp_path).make_note("d"), note)

    async def connect_all(hosts: Any) -> dict[str, Any]:
        return {"n1": SimpleNamespace(), "n2": SshError("wrong key", where="n2")}

    checked: Any = SimpleNamespace(
        inventory=SimpleNamespace(hosts=(Host("n1", "n1"), Host("n2", "n2"))),
        loaded=SimpleNamespace(recipe=SimpleNamespace(name="d")),
    )
    hosts: Any = SimpleNamespace(connect_all=connect_all)
    if ended is False:
        assert [str(one) for one in (await up_ssh._reach(checked, hosts))[1]] == ["n2: wrong key"]
    else:
        with pytest.raises(SshError, match="wrong key"):
            await up_ssh._reach(checked, hosts)
