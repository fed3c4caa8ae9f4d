"""Hosts without dynctl, with another one, or whose environment is made twice, in half, or of torn files."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from dynctl import errors
from dynctl.launchers import bootstrap as boot
from dynctl.launchers.bootstrap import Bootstrap, bootstrap, bootstrap_all, find_dynctl
from dynctl.launchers.ssh import SshHosts
from dynctl.launchers.ssh_host import SshHost
from dynctl.launchers.wheel import Wheel, own_wheel, pack
from dynctl.native import load
from dynctl.topology.inventory import Host
from tests.cluster import environment
from tests.cluster.cluster import Cluster
from tests.cluster.ssh_hosts import DEADLINE_S, host, names_in, ssh_of, until, user_file

pytestmark = pytest.mark.timeout(300)


def small_wheel(version: str, needs: str = "") -> Wheel:
    """A dynctl that is nothing but a version."""
    info = f"dynctl-{version}.dist-info"
    about = f"Metadata-Version: 2.1\nName: dynctl\nVersion: {version}\n"
    about += f"Requires-Dist: {needs}\n" if needs else ""
    entry = "[console_scripts]\ndynctl = dynctl:main\n"
    main = f"def main():\n    print('{version}')\n"
    files = {"dynctl/__init__.py": main, f"{info}/METADATA": about, f"{info}/entry_points.txt": entry}
    return Wheel(version, pack(version, {name: text.encode() for name, text in files.items()}))


@pytest.fixture
def folders(cluster: Cluster) -> Iterator[tuple[Path, Path]]:
    """Where environments of the shared home are, and of priv's own; removed afterwards."""
    homes = [cluster.user_home, cluster.folder / "hosts/priv/home"]
    yield homes[0] / boot.ENVIRONMENTS, homes[1] / boot.ENVIRONMENTS
    for home in homes:
        for name in (".dynctl", ".local"):
            shutil.rmtree(home / name, ignore_errors=True)


async def one(ssh: SshHosts, name: str, python: str = "") -> tuple[SshHost, Host]:
    """A host, connected."""
    wanted = host(name, python=python)
    return await ssh.connect(wanted), wanted


async def several(ssh: SshHosts, *names: str) -> dict[str, tuple[SshHost, Host]]:
    """Some hosts, connected."""
    return {name: await one(ssh, name) for name in names}


def environments(folder: Path) -> list[str]:
    """What is there, drafts and locks too; files sent are left out."""
    return [name for name in names_in(folder) if not name.startswith(".wheels-")]


async def test_hosts_that_share_a_home_make_one_environment(
    cluster: Cluster, folders: tuple[Path, Path]
) -> None:
    wheel, steps = small_wheel("7.1"), []
    async with ssh_of(cluster) as ssh:
        there = await several(ssh, "n1", "n2", "n3", "priv")
        found = await bootstrap_all(there, Bootstrap(wheel), lambda name, step: steps.append((name, step)))
        made = f"{cluster.user_home}/.dynctl/env/{wheel.key}/bin/python"
        assert found == dict.fromkeys(there, made)
        for name, (n, wanted) in there.items():
            assert await find_dynctl(n, wanted, wheel) == made
            said = await n.check([made.replace("/python", "/dynctl")], timeout_s=DEADLINE_S)
            assert said == b"7.1\n", "its programs name the environment by the path it has in the end"
            assert (name, "dynctl is there") in steps
        assert [environments(folder) for folder in folders] == [[wheel.key], [wheel.key]]
        assert os.stat(folders[0]).st_mode & 0o777 == 0o700
        steps.clear()
        await bootstrap_all(there, Bootstrap(wheel), lambda name, step: steps.append((name, step)))
        assert sorted(steps) == [(name, "looking for dynctl") for name in sorted(there)], "sent and made once"


async def test_dynctl_that_is_not_there_or_another_one_tells_the_remedy(
    cluster: Cluster, folders: tuple[Path, Path]
) -> None:
    async with ssh_of(cluster) as ssh:
        n2, wanted = await one(ssh, "n2")
        with pytest.raises(errors.HostDynctlMissing, match="dynctl is not installed") as caught:
            await find_dynctl(n2, wanted, small_wheel("7.1"))
        assert caught.value.where == "n2"
        assert "--bootstrap" in caught.value.hint
        made = await bootstrap(n2, wanted, Bootstrap(small_wheel("7.0")))
        own = host("n2", python=made)
        with pytest.raises(errors.HostDynctlMissing, match=r"has dynctl 7\.0, 7\.1 is needed"):
            await find_dynctl(n2, own, small_wheel("7.1"))
        assert await find_dynctl(n2, own, small_wheel("7.0")) == made
        program = cluster.user_home / ".local/bin/dynctl"
        for head in (f"#!{made}\n", f"#!/bin/sh\n'''exec' \"{made}\" \"$0\" \"$@\"\n' '''\n"):
            user_file(cluster, program, head)
            with pytest.raises(errors.HostDynctlMissing, match=r"dynctl 7\.0 is there, 7\.1 is needed"):
                await find_dynctl(n2, wanted, small_wheel("7.1"))
        os.rename(folders[0] / small_wheel("7.0").key, folders[0] / "elsewhere")
        user_file(cluster, program, f"#!{folders[0]}/elsewhere/bin/python\n")
        assert await find_dynctl(n2, wanted, small_wheel("7.0")) == f"{folders[0]}/elsewhere/bin/python"


async def test_killed_installation_leaves_nothing_that_looks_whole(
    cluster: Cluster, folders: tuple[Path, Path]
) -> None:
    wheel = small_wheel("7.2")
    async with ssh_of(cluster) as ssh:
        n2, wanted = await one(ssh, "n2")
        pending = asyncio.ensure_future(bootstrap(n2, wanted, Bootstrap(wheel)))
        await until(lambda: any(f".{wheel.key}.n2" in n for n in names_in(folders[0])), "it is being made")
        cluster.kill_sshd_sessions("n2")
        for process in cluster.processes():
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(errors.HostLost):
            await pending
        assert wheel.key not in environments(folders[0])
        lock = folders[0] / f".{wheel.key}.lock"
        assert lock.name in environments(folders[0])
        os.utime(lock, (1, 1))  # as if it had been given up long ago
        n3, other = await one(ssh, "n3")
        made = await bootstrap(n3, other, Bootstrap(wheel))
        assert await find_dynctl(n3, other, wheel) == made


async def test_file_that_came_torn_or_was_changed_is_sent_again(
    cluster: Cluster, folders: tuple[Path, Path]
) -> None:
    what = Bootstrap(small_wheel("7.3"))
    async with ssh_of(cluster) as ssh:
        n2, wanted = await one(ssh, "n2")
        await n2.put({f"{cluster.user_home}/{what.folder}/{what.wheel.filename}": b"PK torn"})
        made = await bootstrap(n2, wanted, what)
        assert await find_dynctl(n2, wanted, what.wheel) == made


async def test_environment_whose_python_has_gone_is_made_anew(
    cluster: Cluster, folders: tuple[Path, Path]
) -> None:
    what = Bootstrap(small_wheel("7.4"))
    async with ssh_of(cluster) as ssh:
        n2, wanted = await one(ssh, "n2")
        made = await bootstrap(n2, wanted, what)
        os.unlink(made)
        os.symlink("/no/such/python", made)
        with pytest.raises(errors.HostDynctlMissing):
            await find_dynctl(n2, wanted, what.wheel)
        assert await bootstrap(n2, wanted, what) == made
        assert await find_dynctl(n2, wanted, what.wheel) == made
        assert environments(folders[0]) == [what.wheel.key]


async def test_host_without_index_is_told_of_the_wheelhouse_which_then_serves(
    cluster: Cluster, folders: tuple[Path, Path]
) -> None:
    wheel = small_wheel("7.5", needs="dynctl-needs-this==1")
    async with ssh_of(cluster) as ssh:
        n2, wanted = await one(ssh, "n2")
        other = Bootstrap(wheel, {"other-1-py3-none-any.whl": small_wheel("1").content})
        with pytest.raises(errors.HostDynctlMissing, match=r"installing: .*dynctl-needs-this==1") as caught:
            await bootstrap(n2, wanted, other)
        assert "what the wheelhouse lacks" in caught.value.hint
        assert "--wheelhouse DIR" in caught.value.hint
        assert caught.value.hint.endswith("pip download -d DIR --only-binary :all: dynctl-needs-this==1")
        assert environments(folders[0]) == []
        house = {"dynctl_needs_this-1-py3-none-any.whl": needs_this()}
        assert await bootstrap(n2, wanted, Bootstrap(wheel, house))


def needs_this() -> bytes:
    """Another package."""
    made = io.BytesIO()
    info = "dynctl_needs_this-1.dist-info"
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("needed.py", "")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: dynctl-needs-this\nVersion: 1\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return made.getvalue()


@pytest.mark.parametrize(
    ("script", "kind", "told"),
    [
        ("", "host_python", "cannot be run there"),
        ("#!/bin/sh\necho python 3 9\n", "host_python", "is Python 3.9, 3.11 or newer is needed"),
        ("#!/bin/sh\necho; echo python 3 12 ensurepip\n", "host_python", "has no module ensurepip"),
        ("#!/bin/sh\necho 'No space left on device' >&2; exit 1\n", "host_disk_full", "its disk is full"),
        ("#!/bin/sh\necho 'broken' >&2; exit 1\n", "ssh", "failed there with exit code 1: broken"),
    ],
)
async def test_python_that_will_not_do_is_told_with_host_and_remedy(
    cluster: Cluster, folders: tuple[Path, Path], home: Path, script: str, kind: str, told: str
) -> None:
    python = str(home / "python3")
    if script:
        user_file(cluster, home / "python3", script)
    async with ssh_of(cluster) as ssh:
        names = ["n2", *(["priv"] if not script else [])]
        there = {name: await one(ssh, name, python if name == "n2" else "") for name in names}
        found = await bootstrap_all(there, Bootstrap(small_wheel("7.6")))
    error = found["n2"]
    assert isinstance(error, errors.SshError)
    assert (error.kind, error.where) == (kind, "n2")
    assert told in error.message
    assert isinstance(found.get("priv", ""), str), "one that fails holds nobody up"


@pytest.mark.parametrize(
    ("size", "filled", "told"),
    [
        ("12m", "4m", "looking for room: no space left on device"),
        ("12m", "0", "No space left on device"),
    ],
)
async def test_full_disk_before_or_while_it_is_made_is_called_so_and_leaves_nothing(
    cluster: Cluster, folders: tuple[Path, Path], size: str, filled: str, told: str
) -> None:
    async with ssh_of(cluster) as ssh:
        priv, wanted = await one(ssh, "priv")
        await priv.check(["mkdir", "-p", "-m", "700", ".dynctl"], timeout_s=DEADLINE_S)
        with cluster.full_disk("priv", f"{cluster.user_home}/.dynctl", size):
            cluster.exec("priv", "chmod", "700", f"{cluster.user_home}/.dynctl")
            free = ["truncate", "-s", filled, f"{cluster.user_home}/.dynctl/filler"]
            cluster.exec("priv", *free)
            with pytest.raises(errors.HostDiskFull) as caught:
                await bootstrap(priv, wanted, Bootstrap(small_wheel("7.7")))
            assert caught.value.where == "priv"
            assert told in caught.value.message
            look = ["find", f"{cluster.user_home}/.dynctl", "-mindepth", "2"]
            assert cluster.exec("priv", *look).stdout == ""


async def test_this_dynctl_gets_to_a_host_without_network_and_runs(
    cluster: Cluster, folders: tuple[Path, Path]
) -> None:
    wheel = own_wheel()
    house = boot.read_wheelhouse(_wheelhouse(), wheel)
    async with ssh_of(cluster) as ssh:
        priv, wanted = await one(ssh, "priv")
        python = await bootstrap(priv, wanted, Bootstrap(wheel, house))
        for argv in (["-m", "dynctl.cli.main", "version"], ["-m", "dynctl.cli.main", "plan", "quickstart"]):
            said = await priv.check([python, *argv], timeout_s=120)
            assert said
        # The compiled hot path goes along, and loads: hosts here are of this machine's kind.
        told = (
            f"dynctl {wheel.version}, hot path compiled"
            if load.compiled
            else f"dynctl {wheel.version}, relay in"
        )
        assert told.encode() in await priv.check(
            [python.replace("/python", "/dynctl"), "version"], timeout_s=60
        )


def _wheelhouse() -> Path:
    """Wheels of all that dynctl needs, for the hosts' Python, kept from run to run."""
    base = environment.interpreter()
    assert base is not None
    project = tomllib.loads((environment.ROOT / "pyproject.toml").read_text())["project"]
    needs: list[str] = project["dependencies"]
    key = hashlib.sha256("\0".join([str(base), *sorted(needs)]).encode()).hexdigest()[:12]
    folder = environment.cache_folder() / f"wheels-{key}"
    if not folder.exists():
        draft = folder.with_name(f"{folder.name}.{os.getpid()}")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "-d", str(draft)]
        only = ["--only-binary", ":all:", "--python-version", ".".join(base[1].split(".")[:2])]
        subprocess.run([*pip, *only, *needs], check=True, timeout=600)
        draft.rename(folder)
    return folder
