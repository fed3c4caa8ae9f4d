"""A compiled module that does not load, is missing or of other sources: Python takes over, and says why."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dynctl.native import load
from dynctl.native.build import build, build_into

ASK = "from dynctl.native import load; print(load.compiled is not None, load.told())"


def told(folder: Path, **env: str) -> str:
    """What a dynctl says of its hot path that has nothing but its native part."""
    path = {**os.environ, "PYTHONPATH": str(folder), **env}
    argv = [sys.executable, "-P", "-c", ASK]
    return subprocess.run(
        argv, env=path, cwd=folder, capture_output=True, text=True, check=True, timeout=60
    ).stdout


@pytest.fixture
def native(tmp_path: Path) -> Path:
    """The native part of a dynctl as it is installed without a compiler."""
    folder = tmp_path / "dynctl" / "native"
    folder.mkdir(parents=True)
    (tmp_path / "dynctl" / "__init__.py").touch()
    for path in (load.FOLDER / "__init__.py", load.FOLDER / "load.py", *load.sources(load.FOLDER)):
        shutil.copy(path, folder)
    return folder


def test_without_a_compiled_one_python_relays(native: Path) -> None:
    assert told(native.parents[1]) == "False in Python (it was not compiled)\n"


def test_why_it_was_not_compiled_is_kept(native: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    failure = build_into(native)
    assert failure == "there was no C compiler (no-such-compiler) when dynctl was installed"
    assert told(native.parents[1]) == f"False in Python ({failure})\n"


def test_missing_headers_are_named(native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    monkeypatch.setenv("CC", "true")
    assert f"({tmp_path}/Python.h)" in build_into(native)


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(
        "#!/bin/sh\necho 'relay.c:1: note: x' >&2\necho 'relay.c:7: error: it is Tuesday' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    (native / load.MODULE).write_bytes(b"of an earlier installation")
    assert build_into(native).endswith("relay.c:7: error: it is Tuesday")
    assert not [path.name for path in native.iterdir() if "compiled" in path.name]
    compiler.write_text("#!/bin/sh\nexit 3\n")
    assert build_into(native).endswith("exit code 3")
    compiler.write_text("#!/no/such/interpreter\n")
    assert "No such file" in build_into(native)


@pytest.mark.parametrize("content", [b"", b"\x7fELF of another machine" + bytes(200)])
def test_a_module_that_cannot_be_loaded_is_passed_over(native: Path, content: bytes) -> None:
    (native / load.MODULE).write_bytes(content)
    assert told(native.parents[1]).startswith("False in Python (it cannot be loaded: ")


@pytest.mark.compiled
def test_a_module_of_other_sources_is_passed_over(native: Path) -> None:
    assert build(native, native / load.MODULE) == ""
    assert told(native.parents[1]) == "True compiled\n"
    with (native / "relay.c").open("a") as source:
        source.write("\n")
    assert told(native.parents[1]) == (
        "False in Python (compiled from other sources: install dynctl again)\n"
    )


@pytest.mark.compiled
def test_it_can_be_switched_off(native: Path) -> None:
    assert build(native, native / load.MODULE) == ""
    assert told(native.parents[1], DYNCTL_COMPILED="0") == "False in Python (DYNCTL_COMPILED=0)\n"


@pytest.mark.compiled
def test_the_source_has_no_warnings(tmp_path: Path) -> None:
    strict = ("-Wall", "-Wextra", "-Werror", "-Wno-missing-field-initializers", "-Wno-cast-function-type")
    assert build(load.FOLDER, tmp_path / load.MODULE, strict) == ""
