"""A worker in a Slurm job changes its role while clients use it: its engine and its step run on."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cluster.commands import eventually
from tests.cluster.login import Login, served
from tests.cluster.ssh_deployment import under_load

pytestmark = pytest.mark.timeout(300)

APART = (
    "roles={prefill: {replicas: 3}, decode: {replicas: 2}}",
    "engine.drain_timeout=5s",
    "slurm.gpus_per_node=3",
)


def row(login: Login, seat: str) -> dict[str, Any]:
    return next(row for row in login.ps() if row["id"] == seat)


def steps(login: Login) -> set[str]:
    """Names of the job's steps that are workers'."""
    job = login.job()
    told = login.cluster.run_as_user(["squeue", "-s", "-h", "-j", job, "-o", "%j"]).stdout.split()
    return {name for name in told if name.startswith(("prefill", "decode"))}


def scaled(login: Login, *roles: str) -> str:
    return login.run("scale", *roles, "--name", login.name).stderr


def followed(login: Login) -> None:
    """The controller is killed, and another one follows it."""
    before, node = login.status()["controller_pid"], row(login, "frontend-0")["node"]
    login.cluster.run_as_user(["kill", "-9", str(before)], host=node)

    def another() -> bool:
        told = login.status()
        return told["controller_pid"] not in (0, before) and bool(told["ready"])

    eventually(another, "another controller", 40)


def test_its_engine_goes_on_is_found_and_ended_under_the_name_of_its_step(login: Login) -> None:
    with served(login, *APART) as url:
        former = row(login, "prefill-2")
        with under_load(url) as load:
            eventually(lambda: load.outcomes["whole"] > 5, "streams flow", 30)
            assert "prefill-2 becomes decode-2, its engine runs on" in scaled(login, "prefill=2", "decode=3")
            taken = row(login, "decode-2")
            for same in ("node", "pid", "engine_pid", "url"):
                assert taken[same] == former[same], same
            assert (taken["state"], taken["restarts"]) == ("ready", 0)
            assert "prefill-2.i1" in steps(login)
            assert "decode-2.i1" not in steps(login)
            assert "worker.ready id=decode-2" in login.run("logs", login.name, "decode/2").stdout

            # A new one of its former name is another, beside it; when that fails it alone is ended.
            scaled(login, "prefill=3")
            fresh = row(login, "prefill-2")
            assert {"prefill-2.i1", "prefill-2.i2"} <= steps(login)
            kill = ["kill", "-9", str(fresh["engine_pid"])]
            login.cluster.run_as_user(kill, host=fresh["node"])

            def again() -> bool:
                now = row(login, "prefill-2")
                return now["state"] == "ready" and now["engine_pid"] not in (0, fresh["engine_pid"])

            eventually(again, "it is started again", 40)
            assert row(login, "decode-2")["engine_pid"] == former["engine_pid"]

            # A controller after this one knows whose step that is.
            followed(login)
            assert row(login, "decode-2")["engine_pid"] == former["engine_pid"]

            # It ends as any other does.
            scaled(login, "decode=2", "prefill=3")
            assert "decode-2" not in {one["id"] for one in login.ps()}
            assert "prefill-2.i1" not in steps(login)
        assert set(load.outcomes) == {"whole"}, load.outcomes
    assert login.jobs() == []


def test_a_controller_that_dies_on_the_way_is_followed_by_one_that_sees_it_through(login: Login) -> None:
    with served(login, *APART) as url:
        former = row(login, "prefill-2")
        with under_load(url) as load:
            eventually(lambda: load.outcomes["whole"] > 5, "streams flow", 30)
            login.run("scale", "prefill=2", "decode=3", "--name", login.name, "--no-wait")
            eventually(lambda: "process.becoming" in login.run("events", login.name).stdout, "begun", 20)
            followed(login)
            login.run("wait", login.name, "--for", "settled", "--timeout", "40s")
            taken = row(login, "decode-2")
            assert (taken["engine_pid"], taken["state"]) == (former["engine_pid"], "ready")
            assert "prefill-2" not in {one["id"] for one in login.ps()}
            assert "prefill-2.i1" in steps(login)
        assert set(load.outcomes) == {"whole"}, load.outcomes
