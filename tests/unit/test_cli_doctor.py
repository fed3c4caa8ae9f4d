"""How doctor's findings are shown, and which exit code they give."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from dynctl.cli.doctor import exit_code, granted_by, is_behind, machines, want
from dynctl.cli.doctor_view import report_text, wrapped
from dynctl.doctor.checks import LOGIN
from dynctl.doctor.findings import Finding, Level, size
from dynctl.doctor.service import Report
from dynctl.recipe.schema import Slurm
from dynctl.topology.inventory import Host
from tests.unit.host_samples import RECIPE, loaded

N1 = Host("n1", "10.0.0.1")
REPORT = Report(
    (
        Finding("n1", "reach", "ok", "answered"),
        Finding("n1", "ports", "fail", "port 8000 is taken", "end it"),
        Finding("n1", "ports", "ok", "the others are free"),
        Finding("n1", "gpus", "unknown", "nvidia-smi does not answer"),
        Finding("n1", "rdma", "note", "no RDMA device"),
        Finding("", "versions", "warn", "different drivers", "install one"),
    )
)


def fails(*checks: str) -> list[Finding]:
    return [Finding("n1", check, "fail", "x", "y") for check in checks]


def test_a_block_for_each_host_with_the_remedy_under_what_is_wrong() -> None:
    assert report_text(REPORT, [N1, Host("n2", "n2")]).splitlines() == [
        "n1  10.0.0.1",
        "  ✓ reach       answered",
        "  ✗ ports       port 8000 is taken",
        "                → end it",
        "  ✓             the others are free",
        "  ? gpus        nvidia-smi does not answer",
        "  · rdma        no RDMA device",
        "",
        "n2",
        "",
        "all hosts",
        "  ! versions    different drivers",
        "                → install one",
        "",
        "2 hosts: 3 well, 1 wrong, 1 doubtful, 1 could not be checked",
    ]


def test_of_many_hosts_only_what_is_wrong_is_listed() -> None:
    hosts = [N1, *(Host(f"n{i}", f"10.0.0.{i}") for i in range(2, 7))]
    lines = report_text(REPORT, hosts).splitlines()
    assert lines[:5] == [
        "n1  10.0.0.1",
        "  ✗ ports       port 8000 is taken",
        "                → end it",
        "  ? gpus        nvidia-smi does not answer",
        "  ✓ 3 checks well",
    ]


def test_on_a_terminal_lines_are_coloured_and_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((80, 24)))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert all(len(line) <= 64 for line in wrapped("a word " * 40))
    assert "\033[31m✗\033[0m" in report_text(REPORT, [N1])


@pytest.mark.parametrize(
    ("findings", "code"),
    [
        ([], 0),
        ([Finding("n1", "ports", "warn", "x", "y"), Finding("n1", "gpus", "unknown", "z")], 0),
        (fails("ports", "ports"), 7),
        (fails("ports", "model"), 4),
        (fails("model"), 4),
        (fails("model", "reach"), 8),
    ],
)
def test_exit_codes(findings: list[Finding], code: int) -> None:
    assert exit_code(findings) == code


@pytest.mark.parametrize(
    ("amount", "text"),
    [(10, "10 bytes"), (2_500, "2.5 kB"), (6.4e7, "64 MB"), (3e13, "30 TB")],
)
def test_sizes(amount: float, text: str) -> None:
    assert size(amount) == text


def test_a_plan_that_does_not_fit_is_a_finding_and_all_hosts_are_asked(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.yaml"
    hosts.write_text("hosts: [{name: n1, gpus: 4}, {name: n2, gpus: 2}]")
    asked, wanted, (fault,) = want(loaded(tmp_path), machines(loaded(tmp_path), hosts))
    level: Level = "fail"
    assert (fault.check, fault.level, wanted.plan) == ("placement", level, None)
    assert "needs 8 GPUs" in fault.message
    assert [host.name for host in asked] == ["n1", "n2"]


def test_hosts_that_only_stand_by_are_asked_too(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.yaml"
    hosts.write_text("hosts: [{name: n1, gpus: 8}, {name: n2, gpus: 2}]")
    asked, _, faults = want(loaded(tmp_path), machines(loaded(tmp_path), hosts))
    assert ([host.name for host in asked], faults) == (["n1", "n2"], [])


def test_hosts_whose_gpus_nobody_told_are_not_placed(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.yaml"
    hosts.write_text("hosts: [{name: n1, gpus: 8}, {name: n2, gpus: auto}]")
    asked, wanted, (doubt,) = want(loaded(tmp_path), machines(loaded(tmp_path), hosts))
    assert (len(asked), wanted.plan, doubt.level) == (2, None, "unknown")
    assert "not told by n2" in doubt.message


def test_what_slurm_will_grant_is_judged_where_the_recipe_says_it(tmp_path: Path) -> None:
    text = RECIPE.replace("target: ssh", "target: slurm\nslurm: {nodes: 1, gpus_per_node: 4}")
    recipe = loaded(tmp_path, text=text)
    _, wanted, (fault,) = want(recipe, machines(recipe, None))
    assert is_behind(wanted)
    assert "slurm.nodes 1 x gpus_per_node 4 has 4" in fault.message
    assert wanted.here
    assert granted_by(Slurm(nodes=2)) is None
    assert not {"gpus", "ports", "shm"} & LOGIN
