"""The Python of the cluster's test user: what that user cannot read is not chosen, a change is seen."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from tests.cluster import cluster, environment

PROJECT = tomllib.loads((environment.ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_interpreter_below_a_private_home_is_not_taken(tmp_path: Path) -> None:
    private = tmp_path / "home"
    private.mkdir(mode=0o700)
    (private / "python3").write_text("")
    (private / "python3").chmod(0o755)
    (tmp_path / "python3").symlink_to(private / "python3")
    assert not environment.readable_by_all(private / "python3")
    assert not environment.readable_by_all(tmp_path / "python3")
    assert environment.readable_by_all(Path("/bin/sh"))


def test_change_of_a_source_is_a_new_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    for name in ("pyproject.toml", "README.md", "LICENSE", "dynctl/cli.py", "recipes/one.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("before")
    before = list(environment.contents(PROJECT))
    assert list(environment.contents(PROJECT)) == before
    for name in ("dynctl/cli.py", "recipes/one.yaml", "pyproject.toml"):
        (tmp_path / name).write_text("after")
        after = list(environment.contents(PROJECT))
        assert after != before
        before = after


def test_missing_program_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "PROGRAMS", ("sh", "no-such-program"))
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert cluster.why_not() == "no no-such-program here; install: tests/cluster/up.sh install"
