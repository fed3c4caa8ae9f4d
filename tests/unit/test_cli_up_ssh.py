"""What `up` makes of hosts that are not well."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from dynctl.cli import up_ssh
from dynctl.errors import LaunchError, SshError
from dynctl.topology.inventory import Host


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
