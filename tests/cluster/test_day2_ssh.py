"""Changes to a deployment on SSH hosts while clients use it: what runs elsewhere is not cut either."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.commands import eventually
from tests.cluster.ssh_deployment import Laptop, deployed, under_load

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def laptop(cluster: Cluster, home: Path, token: str) -> Laptop:
    return Laptop(cluster, home, token)


def test_restart_scale_and_drain_cut_no_request(laptop: Laptop) -> None:
    with deployed(laptop) as told:
        before = {row["id"]: row["pid"] for row in laptop.ps()}
        name = ("--name", laptop.name)
        with under_load(told["url"]) as load:
            eventually(lambda: load.outcomes["whole"] > 5, "streams flow", 30.0)
            laptop.dynctl("restart", "aggregated", *name)
            assert len([row for row in laptop.ps() if row["ready"]]) == 5
            laptop.dynctl("scale", "aggregated=6", *name)
            assert {row["node"] for row in laptop.ps() if row["index"] >= 4} <= {"n1", "n2", "n3", "n4"}
            laptop.dynctl("drain", "n3", *name)
            out = {row["id"] for row in laptop.ps() if row["state"] == "drained"}
            assert out == {row["id"] for row in laptop.ps() if row["node"] == "n3"}
            laptop.dynctl("undrain", "n3", *name)
            laptop.dynctl("scale", "aggregated=4", *name)
            laptop.dynctl("wait", laptop.name, "--for", "settled")
        sys.stdout.write(f"restart, scale, drain: {dict(load.outcomes)}\n")
        assert set(load.outcomes) == {"whole"}
        after = {row["id"]: row["pid"] for row in laptop.ps()}
        assert after.keys() == before.keys()
        assert after["frontend-0"] == before["frontend-0"]
        assert not {pid for seat, pid in after.items() if seat != "frontend-0"} & set(before.values())


def test_a_command_runs_on_the_node_of_its_worker(laptop: Laptop) -> None:
    with deployed(laptop):
        there = {row["node"]: row["id"] for row in laptop.ps() if row["role"] != "frontend"}
        done = laptop.dynctl("exec", "n3", "--name", laptop.name, "--", "hostname", check=False)
        assert (done.returncode, done.stdout.strip()) == (0, "n3"), done.stderr
        told = laptop.dynctl(
            "exec",
            there["n2"],
            "--name",
            laptop.name,
            "--json",
            "--",
            "sh",
            "-c",
            "hostname; exit 3",
            check=False,
        )
        assert told.returncode == 3
        assert json.loads(told.stdout) | {"stderr": ""} == {
            "process": there["n2"],
            "node": "n2",
            "code": 3,
            "stdout": "n2\n",
            "stderr": "",
        }
