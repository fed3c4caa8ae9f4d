"""`dynctl doctor --on-nodes` on a real Slurm: each fault with its node, and no node passes unasked."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cluster.commands import eventually
from tests.cluster.login import Login

pytestmark = pytest.mark.timeout(240)
_LOOK = """
import asyncio, json
from dynctl.deploy.slurm_look import Limits
from dynctl.deploy.slurm_size import parts_of
from dynctl.doctor.nodes import look_at
from dynctl.protocol.hosts import HostQuestion
from dynctl.recipe.load import load_recipe

sets = ["target=slurm", "slurm.nodes=2", "slurm.nodelist=n[1-2]"]
loaded = load_recipe("quickstart", sets)
seen = asyncio.run(look_at(loaded, parts_of(loaded)[0], HostQuestion(), Limits(10.0, 5.0)))
found = [(one.host, one.level, one.message) for one in seen.findings]
print(json.dumps({"facts": sorted(seen.facts), "findings": found}))
"""


def doctor(login: Login, *sets: str, within: str = "60s") -> tuple[int, dict[str, Any]]:
    words = [word for one in ("slurm.nodes=4", *sets) for word in ("--set", one)]
    args = ("quickstart", "--target", "slurm", "--on-nodes", "--within", within, *words, "--json")
    done = login.run("doctor", *args, check=False)
    report: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, report


def told(report: dict[str, Any], level: str) -> dict[tuple[str, str], str]:
    return {(f["host"], f["check"]): f["message"] for f in report["findings"] if f["level"] == level}


def test_each_nodes_own_fault_is_told_with_its_name(login: Login) -> None:
    """n1 alone has the model; another has the frontend's port on n2, where no frontend is to run."""
    login.cluster.exec("n1", "mkdir", "-p", "/run/local/m")
    serving = [str(login.cluster.python), "-m", "http.server", "8000", "--bind", "0.0.0.0"]
    try:
        with login.cluster.spawn_as_user(serving, host="n1"):
            code, report = doctor(login, "model.path=/run/local/m", "roles.aggregated.replicas=4")
    finally:
        login.cluster.exec("n1", "rm", "-rf", "/run/local/m")
    assert set(report["facts"]) == {"n1", "n2", "n3", "n4"}, report["findings"]
    wrong = told(report, "fail")
    assert {key for key in wrong if key[1] == "model"} == {(node, "model") for node in ("n2", "n3", "n4")}
    assert "port 8000 is taken by python" in wrong["n1", "ports"]
    assert code == 4
    eventually(lambda: not login.cluster.squeue(), "no job", 30)


def test_each_part_of_a_job_is_looked_at_on_nodes_of_its_own(login: Login) -> None:
    """n1 alone has the model: the part that is given n1 is well, the other is not."""
    login.cluster.exec("n1", "mkdir", "-p", "/run/local/m")
    parts = "prefill: {nodelist: n1, nodes: 1}, decode: {nodes: 2, exclude: n1}"
    roles = "roles={prefill: {replicas: 1}, decode: {replicas: 2}}"
    try:
        code, report = doctor(login, "model.path=/run/local/m", roles, f"slurm={{het: {{{parts}}}}}")
    finally:
        login.cluster.exec("n1", "rm", "-rf", "/run/local/m")
    seen = set(report["facts"])
    assert "n1" in seen
    assert len(seen) == 3, report["findings"]
    assert {key for key in told(report, "fail") if key[1] == "model"} == {
        (node, "model") for node in seen - {"n1"}
    }
    assert code == 4
    code, report = doctor(login, roles, "slurm={het: {prefill: {nodes: 1}, decode: {partition: nope}}}")
    assert code == 4
    assert told(report, "fail")["", "slurm"] == "part decode: no partition nope", report["findings"]
    eventually(lambda: not login.cluster.squeue(), "no job", 30)


def test_nodes_that_are_not_to_be_had_in_time_are_not_checked(login: Login) -> None:
    """One node is another's: three are looked at. When all are, none is, and nothing is left in the queue."""
    busy = ["srun", "--exclusive", "--nodelist=n4", "sleep", "300"]
    with login.cluster.spawn_as_user(busy, host="head"):
        eventually(lambda: login.cluster.node_states()["n4"] == "alloc", "n4 is taken", 30)
        code, report = doctor(login, "slurm.exclusive=true")
        assert (code, set(report["facts"])) == (0, {"n1", "n2", "n3"}), report["findings"]
        assert told(report, "unknown")["", "reach"].startswith("1 of 4 nodes not checked: ")
        assert ("n4", "reach") not in told(report, "ok")
        code, report = doctor(
            login, "slurm.exclusive=true", "slurm.nodelist=n4", "slurm.nodes=1", within="2s"
        )
        assert report["facts"] == {}
        assert told(report, "unknown")["", "reach"].startswith("1 of 1 node not checked: ")
        assert not any(check == "reach" for _, check in told(report, "ok"))
        assert all("doctor" not in job.name for job in login.cluster.squeue())
    login.cluster.scancel(*(job.id for job in login.cluster.squeue()))


def test_a_node_that_says_nothing_in_time_is_not_checked(login: Login) -> None:
    """Its python3 hangs; the job is given back all the same."""
    hanging = login.home.parent / "bin"
    login.cluster.run_as_user(["mkdir", "-p", hanging])
    text = '#!/bin/sh\n[ "$SLURMD_NODENAME" = n2 ] && exec sleep 600\nexec /usr/bin/python3 "$@"\n'
    login.cluster.run_as_user(["sh", "-c", 'cat > "$0"; chmod 755 "$0"', hanging / "python3"], input=text)
    env = {"PATH": f"{hanging}:{login.cluster.user_env()['PATH']}"}
    argv = [str(login.cluster.python), "-c", _LOOK]
    seen = json.loads(login.cluster.run_as_user(argv, env=env, timeout=90).stdout)
    assert seen["facts"] == ["n1"], seen
    assert seen["findings"] == [["n2", "unknown", "not checked: it said nothing in time"]]
    eventually(lambda: not login.cluster.squeue(), "no job", 30)
