"""`dynctl doctor` on real SSH hosts: each host's own fault is told with its name, beside what is well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.ssh_deployment import Laptop
from tests.deployment import RECIPES

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def laptop(cluster: Cluster, home: Path, token: str) -> Laptop:
    return Laptop(cluster, home, token)


def doctor(laptop: Laptop, *args: str) -> tuple[int, dict[str, Any]]:
    recipe = laptop.home.parent / "quickstart.yaml"
    recipe.write_text((RECIPES / "quickstart.yaml").read_text())
    recipe.chmod(0o644)
    sets = ("--set", "target=ssh", "--set", "roles.aggregated.replicas=4", *args)
    where = ("--inventory", str(laptop.inventory))
    done = laptop.dynctl("doctor", str(recipe), *where, *sets, "--json", check=False)
    report: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, report


def told(report: dict[str, Any], level: str) -> dict[tuple[str, str], str]:
    return {(f["host"], f["check"]): f["message"] for f in report["findings"] if f["level"] == level}


def test_hosts_that_are_well_pass(laptop: Laptop) -> None:
    code, report = doctor(laptop)
    assert told(report, "fail") == {}
    assert code == 0
    well = told(report, "ok")
    for host in laptop.hosts:
        wanted = {(host, check) for check in ("reach", "clock", "dynctl", "model", "engine")}
        others = [f for f in report["findings"] if f["host"] == host and f["level"] != "ok"]
        assert wanted <= set(well), others
    assert set(report["facts"]) == set(laptop.hosts)


def test_each_hosts_own_fault_is_told_with_its_name(laptop: Laptop) -> None:
    """n1 alone has the model, on n1 another has the frontend's port, n4 is off."""
    laptop.cluster.exec("n1", "mkdir", "-p", "/run/local/m")
    serving = [str(laptop.cluster.python), "-m", "http.server", "8000", "--bind", "0.0.0.0"]
    try:
        with laptop.cluster.spawn_as_user(serving, host="n1"), laptop.cluster.off("n4"):
            code, report = doctor(laptop, "--set", "model.path=/run/local/m")
    finally:
        laptop.cluster.exec("n1", "rm", "-rf", "/run/local/m")
    wrong = told(report, "fail")
    assert code == 8
    assert set(wrong) == {("n4", "reach"), ("n1", "ports"), ("n2", "model"), ("n3", "model")}
    assert "port 8000 is taken by python" in wrong["n1", "ports"]
    assert wrong["n2", "model"] == "model missing: /run/local/m"
    assert all(f["remedy"] for f in report["findings"] if f["level"] == "fail")


def test_a_file_system_that_is_not_shared_is_found_by_trying(laptop: Laptop) -> None:
    _, report = doctor(laptop, "--shared", "/run/local")
    (alone,) = [f for f in report["findings"] if f["check"] == "shared" and f["level"] == "fail"]
    assert "is not seen on n2 and n3 and n4" in alone["message"]
    _, report = doctor(laptop, "--shared", "/tmp")
    assert "is seen on all hosts" in told(report, "ok")["", "shared"]
