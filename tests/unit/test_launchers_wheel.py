"""Wheels of ourselves that lack a file, differ from time to time, or that pip does not take."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from dynctl.errors import LaunchError
from dynctl.launchers import wheel as wheels
from dynctl.launchers.wheel import own_wheel
from dynctl.native import load

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_same_files_make_the_same_bytes() -> None:
    first, second = own_wheel(), own_wheel()
    assert first == second
    assert first.key == f"{first.version}-{hashlib.sha256(first.content).hexdigest()[:12]}"


def test_all_that_the_build_would_take_is_in_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    names = set(zipfile.ZipFile(io.BytesIO(own_wheel().content)).namelist())
    listed = subprocess.run(
        ["git", "ls-files", "dynctl"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
    )
    wanted = set(listed.stdout.split())
    for source, place in project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"].items():
        wanted |= {
            f"{place}/{p.relative_to(ROOT / source)}" for p in (ROOT / source).rglob("*") if p.is_file()
        }
    assert wanted - names == set()
    assert not [name for name in names if name.endswith(".pyc")]


@pytest.mark.compiled
def test_the_compiled_relay_goes_along_and_another_machine_passes_it_over(tmp_path: Path) -> None:
    name = f"dynctl/native/{load.MODULE}"
    zipfile.ZipFile(io.BytesIO(own_wheel().content)).extractall(tmp_path)
    ask = [sys.executable, "-P", "-c", "from dynctl.native import load; print(load.told())"]

    def told() -> str:
        env = {"PYTHONPATH": str(tmp_path)}
        return subprocess.run(ask, env=env, capture_output=True, text=True, check=True, timeout=30).stdout

    assert told() == "compiled\n"
    module = bytearray((tmp_path / name).read_bytes())
    module[18:20] = (183).to_bytes(2, "little")  # e_machine: AArch64; here, whatever here is, another one
    if sys.byteorder == "big" or os.uname().machine == "aarch64":
        module[18:20] = (62).to_bytes(2, sys.byteorder)
    (tmp_path / name).write_bytes(module)
    assert told().startswith("in Python (it cannot be loaded: ")


def test_record_and_metadata_are_as_pip_wants_them() -> None:
    made = own_wheel()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    archive = zipfile.ZipFile(io.BytesIO(made.content))
    info = f"dynctl-{made.version}.dist-info"
    rows = {row[0]: row[1:] for row in csv.reader(io.StringIO(archive.read(f"{info}/RECORD").decode()))}
    assert set(rows) == set(archive.namelist())
    for name, (digest, size) in rows.items():
        if name.endswith("/RECORD"):
            continue
        content = archive.read(name)
        raw = hashlib.sha256(content).digest()
        assert digest == "sha256=" + base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
        assert int(size) == len(content)
    about = archive.read(f"{info}/METADATA").decode()
    assert "Requires-Dist: " in about
    assert made.needs == tuple(project["dependencies"])
    assert "dynctl = dynctl.cli.main:main" in archive.read(f"{info}/entry_points.txt").decode()


def test_installed_dynctl_makes_the_wheel_it_came_from(tmp_path: Path) -> None:
    made, site = own_wheel(), tmp_path / "site"
    (tmp_path / made.filename).write_bytes(made.content)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
    subprocess.run(
        [*pip, "--no-index", "--target", str(site), str(tmp_path / made.filename)], check=True, timeout=120
    )
    code = "from dynctl.launchers.wheel import own_wheel; import sys; sys.stdout.write(own_wheel().key)"
    said = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert said.stdout == made.key


def test_broken_installation_is_told_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    monkeypatch.setattr(wheels, "_PACKAGE", tmp_path / "dynctl")
    with pytest.raises(LaunchError, match="no wheel can be made") as caught:
        own_wheel()
    assert "pip" in caught.value.hint
