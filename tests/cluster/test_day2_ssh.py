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

APART = """\
schema: dynctl/v1
model: {path: "builtin:tiny", served_name: tiny}
backend: mocker
engine: {drain_timeout: 5s}
roles:
  prefill: {replicas: 3}
  decode: {replicas: 2}
frontend: {host: 0.0.0.0, port: 0}
"""


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


class Apart(Laptop):
    """Of prefill and decode instead."""

    def up_args(self, *more: str) -> list[str]:
        recipe = self.home.parent / "apart.yaml"
        recipe.write_text(APART)
        recipe.chmod(0o644)
        where = ["--target", "ssh", "--inventory", str(self.inventory)]
        return ["up", str(recipe), *where, "--set", f"name={self.name}", "--detach", *more]


def test_an_engine_on_another_host_goes_on_in_the_other_role(
    cluster: Cluster, home: Path, token: str
) -> None:
    laptop = Apart(cluster, home, token)
    with deployed(laptop) as told:
        name = ("--name", laptop.name)
        former = next(row for row in laptop.ps() if row["id"] == "prefill-2")
        with under_load(told["url"]) as load:
            eventually(lambda: load.outcomes["whole"] > 5, "streams flow", 30.0)
            said = laptop.dynctl("scale", "prefill=2", "decode=3", *name)
            assert "prefill-2 becomes decode-2, its engine runs on" in said.stderr
            taken = next(row for row in laptop.ps() if row["id"] == "decode-2")
            for same in ("node", "pid", "engine_pid", "url"):
                assert taken[same] == former[same], same
            laptop.dynctl("exec", "decode-2", *name, "--", "kill", "-9", str(taken["engine_pid"]))

            def back() -> bool:
                row = next(row for row in laptop.ps() if row["id"] == "decode-2")
                return row["state"] == "ready" and row["engine_pid"] not in (0, taken["engine_pid"])

            eventually(back, "it is started again in its new role", 40.0)
            laptop.dynctl("scale", "prefill=3", *name)
            assert all(row["ready"] for row in laptop.ps())
        assert set(load.outcomes) == {"whole"}


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
