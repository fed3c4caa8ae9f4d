"""Mishaps of deployments with follow-up jobs on a real Slurm: cancelled jobs, killed keepers, dead nodes."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from tests.cluster.commands import eventually
from tests.cluster.gpu_engines import gpu_engines
from tests.cluster.login import Login
from tests.cluster.test_slurm_scale import own_jobs, workers

pytestmark = pytest.mark.timeout(300)


def events(login: Login) -> list[dict[str, Any]]:
    """All events of the deployment."""
    lines = login.run("events", login.name, "--json").stdout.splitlines()
    found: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return found


def head_of(login: Login) -> str:
    """The node that its controller runs on."""
    return str(next(row["node"] for row in login.ps() if row["role"] == "frontend"))


def test_a_follow_up_job_that_is_cancelled_is_noticed_by_what_ended_and_is_no_try_of_its_engine(
    login: Login,
) -> None:
    with gpu_engines(login):
        own = {job.id for job in login.cluster.squeue()}
        login.run("scale", "aggregated=2", "--name", login.name)
        lost = workers(login)["aggregated-1"]
        (more,) = {job.id for job in login.cluster.squeue()} - own
        before = len(events(login))
        login.cluster.scancel(more)
        there = {"", lost}
        eventually(lambda: workers(login).get("aggregated-1", "") not in there, "ready elsewhere", 90)
        told = events(login)[before:]
        names = [one["event"] for one in told]
        exited, noticed = names.index("process.exited"), names.index("follow_up.ended")
        sys.stdout.write(f"noticed {told[noticed]['ts'] - told[exited]['ts']:.2f} s after the step's end\n")
        assert names.index("node.lost") < exited, "that the node is gone is known before"
        assert names.count("process.exited") == names.count("process.started") == 1
        assert "process.backoff" not in names
        assert "process.gave_up" not in names
        (no_room,) = [one["message"] for one in told if one["event"] == "node.no_room"]
        assert no_room.endswith("another job is asked for a node in its place")
        assert "--inventory" not in no_room


def test_what_outlives_the_deployments_own_job_is_shown_and_ended_by_down_without_a_name(
    login: Login,
) -> None:
    with gpu_engines(login):
        login.run("scale", "aggregated=2", "--name", login.name)
        # The bracket keeps pgrep from finding the very command that it is a part of.
        find = ["pgrep", "-f", "[s]lurm_holder --run-dir"]
        holders = login.cluster.run_as_user(find, host=workers(login)["aggregated-1"]).stdout.split()
        keeper = ["pgrep", "-f", "[s]lurm_keeper --run-dir"]
        head, there = head_of(login), workers(login)["aggregated-1"]
        login.cluster.run_as_user(["kill", "-STOP", *holders], host=there)  # it would end in a moment
        found = login.cluster.run_as_user(keeper, host=head).stdout.split()
        login.cluster.run_as_user(["kill", "-9", *found], host=head)
        eventually(lambda: login.status()["phase"] == "stopped", "its own job has ended", 60)
        rows = {row["id"]: (row["state"], bool(row["pid"]), row["ready"]) for row in login.ps()}
        assert rows["aggregated-0"] == ("stopped", False, False)
        assert rows["aggregated-1"] == ("stopping", True, False), "its job runs"
        assert f"on {there} is about to end, dynctl down" in login.run("ps", login.name).stderr
        done = login.run("down")
        assert f"{login.name} is down" in done.stderr
        assert own_jobs(login) == []
        assert {row["state"] for row in login.ps()} == {"stopped"}


def test_a_follow_up_job_on_a_dead_node_is_told_of_in_one_line_by_who_waits(login: Login) -> None:
    with gpu_engines(login):
        used = set(workers(login).values())
        dead = next(node for node in login.cluster.nodes if node not in used)  # Slurm gives this one first
        with login.cluster.off(dead):
            done = login.run("scale", "aggregated=2", "--name", login.name)
        assert "done, ready 2/2" in done.stderr
        released = [one["message"] for one in events(login) if one["event"] == "follow_up.released"]
        assert released
        assert "\n" not in released[0]
        assert f"was given {dead}, where nothing can be started: " in released[0]
        assert f"aggregated-1 awaits a node ({released[0]}: another job is asked for)" in done.stderr


def test_what_status_tells_to_do_about_a_controller_that_hangs_helps(login: Login) -> None:
    with gpu_engines(login):
        hung = login.status()["controller_pid"]
        login.cluster.run_as_user(["kill", "-STOP", str(hung)], host=head_of(login))
        told = login.status()
        assert told["layer"] == "controller"
        command, _, then = told["remedy"].partition(": ")
        assert then == "another one takes over"
        login.cluster.run_as_user(command.split())
        eventually(lambda: login.status()["controller_pid"] not in (0, hung), "another controller", 30)
        eventually(lambda: login.status()["layer"] == "", "all is well", 30)
        assert {row["restarts"] for row in login.ps()} == {0}
