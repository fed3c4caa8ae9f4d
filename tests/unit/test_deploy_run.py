"""The steps of `up` that start nothing: claiming a name, planning on free ports, writing the run."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from dynctl.deploy import run as steps
from dynctl.deploy.home import Home, RunDir
from dynctl.deploy.plan import Plan
from dynctl.deploy.planner import build_plan
from dynctl.deploy.records import initial_state
from dynctl.deploy.run import Checked, Site, UpRequest, check, claim, controller_of, plan_run, write_run
from dynctl.deploy.seats import RunContext
from dynctl.deploy.state import load_state, save_state
from dynctl.errors import CodecError, LaunchError, PlacementError, PortInUse, RecipeError, UsageError
from dynctl.launchers.base import Owned, ProcessHandle
from dynctl.launchers.local import LocalLauncher
from dynctl.recipe.lock import lock_text
from tests.deployment import RECIPES

RECIPE = """
schema: dynctl/v1
name: d
model: {path: builtin:tiny, served_name: tiny}
backend: mocker
roles: {prefill: {replicas: 1}, decode: {replicas: 1}}
frontend: {host: 127.0.0.1, port: 0}
"""


class Living(LocalLauncher):
    """Says that these seats live."""

    def __init__(self, *seats: str) -> None:
        super().__init__()
        self.seats = seats

    def owned(self, run_id: str) -> list[Owned]:
        return [Owned(ProcessHandle(1, 1, 1), 0, seat, 1) for seat in self.seats]


def site(tmp_path: Path, *living: str) -> Site:
    home = Home(tmp_path / "home")
    home.prepare()
    return Site(home, Living(*living), os.environ, sys.executable, "0")


def checked(tmp_path: Path, sets: Sequence[str] = ()) -> Checked:
    path = tmp_path / "d.yaml"
    path.write_text(RECIPE)
    return check(UpRequest(path, sets))


def written(made: Checked, where: Site) -> tuple[RunDir, Plan]:
    context = RunContext("d-1", str(where.home.runs / "d-1"), sys.executable)
    plan = build_plan(made.loaded, made.inventory, (), context)
    return write_run(plan, lock_text(made.loaded, "0"), made.inventory, where.home), plan


def test_gpus_that_other_runs_have_are_left_to_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = on_four_gpus(tmp_path, monkeypatch, 2)
    assert [gpu for node in plan.nodes for gpu in node.gpus] == [2, 3]
    with pytest.raises(PlacementError, match="too few GPUs are free: 'a' has 0, 1"):
        on_four_gpus(tmp_path, monkeypatch, 4)
    with pytest.raises(PlacementError, match="8 GPUs"):
        on_four_gpus(tmp_path, monkeypatch, 8)


def on_four_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> Plan:
    """The plan of a replica of that size, where a run 'a' has two of four GPUs."""
    (tmp_path / "hosts.yaml").write_text("hosts: [{name: local, address: 127.0.0.1, gpus: 4}]\n")
    path = tmp_path / "d.yaml"
    path.write_text(
        RECIPE.replace("mocker", "vllm")
        .replace(
            "{prefill: {replicas: 1}, decode: {replicas: 1}}", f"{{aggregated: {{tensor_parallel: {size}}}}}"
        )
        .replace("builtin:tiny", ".")
    )
    made = check(UpRequest(path, (), (), tmp_path / "hosts.yaml"))
    monkeypatch.setattr(steps, "gpus_of_others", lambda home: {0: "a", 1: "a"})
    context = RunContext("d-1", str(tmp_path), sys.executable)
    return steps._on_free_gpus(made, site(tmp_path), context)


def test_only_what_can_run_here_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="target ssh needs hosts"):
        checked(tmp_path, ["target=ssh"])


def test_the_first_state_has_every_seat_and_no_process(tmp_path: Path) -> None:
    run, plan = written(checked(tmp_path), site(tmp_path))
    state = load_state(run.state)
    assert state is not None
    assert state == initial_state(plan, state.created_at)
    assert [(s.id, s.kind, s.pid, s.incarnation) for s in state.seats] == [
        ("frontend-0", "frontend", 0, 0),
        ("prefill-0", "worker", 0, 0),
        ("decode-0", "worker", 0, 0),
    ]
    assert state.seats[1].start_timeout_s == 900.0
    assert run.keys.stat().st_mode & 0o777 == 0o600


def test_a_name_that_nothing_lives_of_is_free(tmp_path: Path) -> None:
    made, where = checked(tmp_path), site(tmp_path)
    assert claim(made, where) is None
    written(made, where)
    assert claim(made, where) is None


def test_a_name_with_a_controller_is_taken(tmp_path: Path) -> None:
    made, where = checked(tmp_path), site(tmp_path, "controller", "decode-0")
    written(made, where)
    with pytest.raises(UsageError, match="'d' is running already") as caught:
        claim(made, where)
    assert "dynctl down d" in caught.value.hint


def test_what_lives_without_a_controller_is_taken_over_by_the_same_recipe_only(tmp_path: Path) -> None:
    made, where = checked(tmp_path), site(tmp_path, "decode-0")
    run, _ = written(made, where)
    assert claim(made, where) == run
    with pytest.raises(UsageError, match="from another recipe"):
        claim(checked(tmp_path, ["roles.decode.replicas=2"]), where)
    run.lock.unlink()
    with pytest.raises(UsageError, match="from another recipe"):
        claim(made, where)


def test_what_lives_of_an_unreadable_run_is_not_taken_over(tmp_path: Path) -> None:
    made, where = checked(tmp_path), site(tmp_path, "decode-0")
    run, _ = written(made, where)
    run.state.write_text("{")
    with pytest.raises(UsageError, match="still run"):
        claim(made, where)


def test_ports_of_a_deployment_that_is_being_started_are_not_given_again(tmp_path: Path) -> None:
    made, where = checked(tmp_path), site(tmp_path)
    run, plan = written(made, where)
    ports = set(plan.nodes[0].ports)
    assert steps.reserved_ports(where) == ports
    context = RunContext("d-2", "/r", sys.executable)
    assert not ports & set(plan_run(made, where, context).nodes[0].ports)
    state = load_state(run.state)
    assert state is not None
    state.created_at -= 3600
    save_state(run.state, state)
    assert steps.reserved_ports(where) == set()
    state.phase = "stopped"
    save_state(run.state, state)
    assert steps.reserved_ports(where) == set()


@pytest.mark.parametrize("plan", ["{", None], ids=["no plan in it", "no file"])
def test_an_unreadable_plan_of_a_dead_run_is_a_warning(
    plan: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made, where = checked(tmp_path), site(tmp_path)
    run, _ = written(made, where)
    spoil(run, plan)
    assert steps.reserved_ports(where) == set()
    assert plan_run(made, where, RunContext("d-2", "/r", sys.executable)).nodes[0].ports
    assert f"plan.unreadable path={run.plan}" in caplog.text
    assert {r.levelname for r in caplog.records} == {"WARNING"}


@pytest.mark.parametrize("plan", ["{", None], ids=["no plan in it", "no file"])
def test_an_unreadable_plan_of_a_living_run_is_an_error(plan: str | None, tmp_path: Path) -> None:
    made, where = checked(tmp_path), site(tmp_path, "decode-0")
    run, _ = written(made, where)
    spoil(run, plan)
    with pytest.raises(CodecError, match="the plan cannot be read") as caught:
        steps.reserved_ports(where)
    assert caught.value.where == str(run.plan)
    assert "dynctl down d" in caught.value.hint


def spoil(run: RunDir, plan: str | None) -> None:
    run.plan.unlink()
    if plan is not None:
        run.plan.write_text(plan)


def test_no_process_inherits_the_variables_of_api_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "long-enough")
    made = checked(tmp_path, ("frontend.api_key=env:SOME_KEY",))
    plan = written(made, site(tmp_path))[1]
    assert controller_of(plan, 1, made).withheld == {"SOME_KEY", "DYNCTL_SET"}


def test_the_frontends_port_is_probed_where_it_will_listen(tmp_path: Path) -> None:
    where, context = site(tmp_path), RunContext("d-2", "/r", sys.executable)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PortInUse, match=rf"port {port} .* \(pid {os.getpid()}\)") as caught:
            plan_run(checked(tmp_path, [f"frontend.port={port}"]), where, context)
        assert "frontend.port" in caught.value.where
        elsewhere = checked(tmp_path, [f"frontend.port={port}", "frontend.host=127.0.0.2"])
        assert plan_run(elsewhere, where, context).url.endswith(f":{port}")


def test_an_address_of_another_machine_is_refused(tmp_path: Path) -> None:
    made = checked(tmp_path, ["frontend.host=192.0.2.1", "frontend.port=8000"])
    with pytest.raises(RecipeError, match=r"cannot listen on 192\.0\.2\.1 port 8000") as caught:
        plan_run(made, site(tmp_path), RunContext("d-2", "/r", sys.executable))
    assert caught.value.hint == "an address of this machine"


def test_keys_that_cannot_be_written_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dynctl.transport.keys.Keys.save", full)
    with pytest.raises(LaunchError, match="No space left on device"):
        written(checked(tmp_path), site(tmp_path))


def test_the_quickstart_may_be_started() -> None:
    assert check(UpRequest(RECIPES / "quickstart.yaml")).warnings == ()
