"""`dynctl scale` beyond the nodes of a job, on a real Slurm: other jobs bring more, and are given back."""

from __future__ import annotations

import pytest

from tests.cluster.commands import eventually
from tests.cluster.gpu_engines import gpu_engines
from tests.cluster.login import Login

pytestmark = pytest.mark.timeout(300)


def workers(login: Login) -> dict[str, str]:
    """Node of each worker that is ready."""
    return {r["instance"]: r["node"] for r in login.ps() if r["role"] != "frontend" and r["ready"]}


def test_replicas_without_room_come_with_a_job_and_it_goes_with_them(login: Login) -> None:
    with gpu_engines(login):
        assert len(login.jobs()) == 1
        done = login.run("scale", "aggregated=3", "--name", login.name)
        assert "aggregated-1 awaits a node" in done.stderr
        assert "done, ready 3/3" in done.stderr
        nodes = workers(login)
        assert len(set(nodes.values())) == 3, nodes
        assert len(login.jobs()) == 3
        told = login.status()
        assert told["ready"]
        assert [one["state"] for one in told["job"]["follow_ups"]] == ["RUNNING"] * 2
        assert '"status":"ready"' in login.health()
        login.run("scale", "aggregated=2", "--name", login.name)
        eventually(lambda: len(login.jobs()) == 2, "the job of aggregated-2 is cancelled", 30)
        assert set(workers(login)) == {"aggregated-0", "aggregated-1"}
        login.run("scale", "aggregated=1", "--name", login.name)
        eventually(lambda: len(login.jobs()) == 1, "none but its own", 30)
        events = login.run("events", login.name).stdout
        assert events.count("follow_up.released") == 2
        assert login.run("down", login.name).returncode == 0
        assert login.jobs() == []
