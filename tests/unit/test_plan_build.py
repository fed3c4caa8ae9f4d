from __future__ import annotations

import json
from pathlib import Path

import pytest

from dynctl.deploy.plan import Plan
from dynctl.deploy.planner import build_plan
from dynctl.deploy.preflight import require_programs, require_startable
from dynctl.deploy.seats import RunContext
from dynctl.errors import CodecError, PlacementError, PortInUse, RecipeError
from dynctl.protocol.specs import FrontendSpec, WorkerSpec
from dynctl.recipe.load import LoadedRecipe, load_recipe
from dynctl.topology.inventory import LOCAL, Host, Inventory

RECIPE = """\
schema: dynctl/v1
name: demo
model: {path: org/model}
backend: vllm
engine: {env: {API_KEY: hidden}, device: cpu}
roles:
  prefill: {replicas: 1}
  decode: {replicas: 2}
frontend:
  port: 8000
  api_key: very-secret-key
"""
RUN = RunContext("run1", "/runs/run1", "python")
HERE = Inventory((Host(LOCAL, "127.0.0.1", 0),), "this machine")


def load(tmp_path: Path, *sets: str) -> LoadedRecipe:
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE)
    return load_recipe(file, sets, environ={"HOME": str(tmp_path)})


def test_every_process_belongs_to_the_run(tmp_path: Path) -> None:
    plan = build_plan(load(tmp_path), HERE, (), RUN)
    assert [p.id for p in plan.processes] == [
        "controller",
        "frontend-0",
        *(f"{seat}{part}" for seat in ("prefill-0", "decode-0", "decode-1") for part in ("", "/engine")),
    ]
    assert {p.command.env["DYNCTL_RUN"] for p in plan.processes} == {"run1"}
    assert plan.process("decode-1/engine").command.env["DYNCTL_PROCESS"] == "decode-1"
    assert plan.process("decode-1/engine").depends == ("decode-1",)
    assert plan.roles == {"prefill": 1, "decode": 2}
    with pytest.raises(KeyError):
        plan.process("decode-2")


@pytest.mark.parametrize(
    ("backend", "flag"), [("vllm", "enable-prompt-tokens-details"), ("sglang", "enable-cache-report")]
)
def test_engines_tell_what_was_cached_unless_the_recipe_says_no(
    tmp_path: Path, backend: str, flag: str
) -> None:
    def flags(*sets: str) -> list[str]:
        plan = build_plan(load(tmp_path, f"backend={backend}", *sets), HERE, (), RUN)
        return [word for word in plan.process("decode-0/engine").command.argv if word == f"--{flag}"]

    assert flags() == [f"--{flag}"]
    for spelling in (flag, flag.replace("-", "_")):
        assert flags(f"engine.args.{spelling}=false") == []
        assert flags(f"engine.args.{spelling}=true") == [f"--{flag}"]


def frontends_of(plan: Plan) -> list[tuple[str, set[str], int]]:
    processes = [p for p in plan.processes if p.kind == "frontend"]
    return [(p.node, set(p.ports), p.ports["http"]) for p in processes]


def test_frontends_of_one_host_share_its_port_and_have_one_each(tmp_path: Path) -> None:
    plan = build_plan(load(tmp_path, "frontend.replicas=3", "frontend.port=0"), HERE, (), RUN)
    (port,) = {port for _, _, port in frontends_of(plan)}
    assert plan.url == f"http://127.0.0.1:{port}"
    assert {names == {"http", "own", "events"} for _, names, _ in frontends_of(plan)} == {True}
    given = [p for process in plan.processes for p in process.ports.values() if p != port]
    assert len(given) == len(set(given))
    assert set(plan.nodes[0].ports) == {port, *given}


def test_frontends_are_spread_over_the_hosts_named(tmp_path: Path) -> None:
    two = Inventory((Host("n1", "10.0.0.1", 8), Host("n2", "10.0.0.2", 8)), "hosts.yaml")
    sets = ("frontend.replicas=2", "frontend.hosts=[n2, n1]", "frontend.host=0.0.0.0")
    plan = build_plan(load(tmp_path, *sets), two, (), RUN)
    assert plan.url == "http://10.0.0.2:8000"
    assert frontends_of(plan) == [("n2", {"http", "events"}, 8000), ("n1", {"http", "events"}, 8000)]
    with pytest.raises(PortInUse, match="port 8000 of n1"):
        build_plan(load(tmp_path, *sets), two, {("n1", 8000)}, RUN)


def test_a_role_or_frontend_on_hosts_there_are_not_is_refused_by_line(tmp_path: Path) -> None:
    two = Inventory((Host("n1", "10.0.0.1", 8), Host("n2", "10.0.0.2", 8, labels=("lab",))), "hosts.yaml")
    for field in ("roles.aggregated.hosts", "frontend.hosts"):
        with pytest.raises(PlacementError, match=r"no host 'n3' in hosts[.]yaml") as caught:
            build_plan(load(tmp_path, f"{field}=[n3]"), two, (), RUN)
        assert caught.value.where.startswith(f"--set {field}")
        assert caught.value.hint == "there are n1, n2; labels lab"


def test_frontends_of_a_group_cannot_all_listen_on_one_address(tmp_path: Path) -> None:
    hosts = tuple(Host(name, name, 8, labels=("lab",)) for name in ("n1", "n2"))
    sets = ("frontend.replicas=2", "frontend.hosts=[lab]")
    with pytest.raises(PlacementError, match="frontends on 2 hosts cannot all listen"):
        build_plan(load(tmp_path, *sets), Inventory(hosts, "hosts.yaml"), (), RUN)


def test_a_frontend_alone_has_its_port_only(tmp_path: Path) -> None:
    plan = build_plan(load(tmp_path), HERE, (), RUN)
    assert frontends_of(plan) == [("local", {"http"}, 8000)]


def test_specs_are_what_the_processes_read(tmp_path: Path) -> None:
    import msgspec

    plan = build_plan(load(tmp_path), HERE, (), RUN)
    files = plan.process("decode-1").command.files
    worker = msgspec.json.decode(files["specs/decode-1.json"], type=WorkerSpec)
    engine = plan.process("decode-1/engine")
    assert worker.engine is not None
    assert tuple(worker.engine.argv) == engine.command.argv
    assert worker.url == f"http://127.0.0.1:{engine.ports['http']}"
    assert worker.registry == plan.registry
    files = plan.process("frontend-0").command.files
    frontend = msgspec.json.decode(files["specs/frontend-0.json"], type=FrontendSpec)
    assert frontend.roles == {"prefill": 1, "decode": 2}
    assert frontend.membership == plan.membership
    assert [(key.name, len(key.sha256)) for key in frontend.api_keys] == [("key-1", 64)]


def test_stored_whole_and_printed_masked(tmp_path: Path) -> None:
    plan = build_plan(load(tmp_path), HERE, (), RUN)
    stored, shown = plan.to_json(), json.dumps(plan.shown())
    assert Plan.from_json(stored) == plan
    assert "hidden" in stored
    assert "hidden" not in shown
    assert "very-secret-key" not in stored + shown
    wanted = {"id", "kind", "role", "index", "node", "gpus", "ports", "argv", "env"}
    assert all(wanted <= process.keys() for process in plan.shown()["processes"])


@pytest.mark.parametrize("text", ["", "{}", "[]", "null"])
def test_what_is_no_plan(text: str) -> None:
    with pytest.raises(CodecError, match="not a plan"):
        Plan.from_json(text)


def test_a_plan_of_another_version(tmp_path: Path) -> None:
    text = build_plan(load(tmp_path), HERE, (), RUN).to_json().replace('"version": 1', '"version": 9')
    with pytest.raises(CodecError, match="plan version 9 is not 1"):
        Plan.from_json(text)


def test_taken_ports_are_stepped_over(tmp_path: Path) -> None:
    first = build_plan(load(tmp_path), HERE, (), RUN)
    taken = {(LOCAL, port) for port in first.nodes[0].ports}
    second = build_plan(load(tmp_path, "frontend.port=8001"), HERE, taken, RUN)
    assert not set(second.nodes[0].ports) & set(first.nodes[0].ports)


def test_a_taken_frontend_port_names_the_line(tmp_path: Path) -> None:
    with pytest.raises(PortInUse, match=r"r\.yaml:10: port 8000 of local is taken"):
        build_plan(load(tmp_path), HERE, {(LOCAL, 8000)}, RUN)
    plan = build_plan(load(tmp_path, "frontend.port=0"), HERE, {(LOCAL, 8000)}, RUN)
    assert plan.url == f"http://127.0.0.1:{plan.process('frontend-0').ports['http']}"


def test_too_few_gpus_name_the_role(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match=r"r\.yaml:7: the recipe needs 3 GPUs, this machine has 0"):
        build_plan(load(tmp_path, "engine.device=gpu"), HERE, (), RUN)


def test_more_replicas_than_ports_name_the_field_and_soon(tmp_path: Path) -> None:
    loaded = load(tmp_path, "roles.decode.replicas=1000000")
    with pytest.raises(PlacementError, match="fewer replicas") as caught:
        build_plan(loaded, HERE, (), RUN)
    assert caught.value.where == "--set roles.decode.replicas=1000000"


@pytest.mark.parametrize(
    ("host", "address", "url"),
    [
        ("0.0.0.0", "10.0.0.1", "http://10.0.0.1:8000"),
        ("::", "fd00::1", "http://[fd00::1]:8000"),
        ("127.0.0.1", "10.0.0.1", "http://127.0.0.1:8000"),
    ],
)
def test_public_url(tmp_path: Path, host: str, address: str, url: str) -> None:
    inventory = Inventory((Host("n1", address, 0),), "hosts.yaml")
    assert build_plan(load(tmp_path, f"frontend.host='{host}'"), inventory, (), RUN).url == url


def test_a_target_without_its_machines_and_local_with_others_are_refused(tmp_path: Path) -> None:
    require_startable(load(tmp_path), HERE)
    with pytest.raises(RecipeError, match="--set target=ssh: target ssh needs hosts"):
        require_startable(load(tmp_path, "target=ssh"), HERE)
    require_startable(load(tmp_path, "target=ssh"), Inventory((Host("n1", "10.0.0.1", 0),), "hosts.yaml"))
    with pytest.raises(RecipeError, match=r"hosts\.yaml names other hosts"):
        require_startable(load(tmp_path), Inventory((Host("n1", "10.0.0.1", 0),), "hosts.yaml"))


def test_missing_engine_program_says_where_was_looked(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    plan = build_plan(loaded, HERE, (), RUN)
    with pytest.raises(RecipeError) as caught:
        require_programs(plan, loaded, {"PATH": str(tmp_path / "bin")})
    assert f"r.yaml:4: engine program missing: 'vllm' is not on PATH ({tmp_path}/bin)" in str(caught.value)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "vllm").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "vllm").chmod(0o755)
    require_programs(plan, loaded, {"PATH": str(tmp_path / "bin")})


def test_missing_program_of_a_venv_names_the_venv(tmp_path: Path) -> None:
    (tmp_path / "venv").mkdir()
    loaded = load(tmp_path, f"engine.venv={tmp_path}/venv")
    plan = build_plan(loaded, HERE, (), RUN)
    with pytest.raises(RecipeError, match="venv/bin/vllm is not there or may not be run"):
        require_programs(plan, loaded, {})
    remote = load(tmp_path, "target=ssh", f"engine.venv={tmp_path}/venv")
    require_programs(build_plan(remote, HERE, (), RUN), remote, {})


def test_a_moved_venv_is_told_before_anything_is_started(tmp_path: Path) -> None:
    program = tmp_path / "venv" / "bin" / "vllm"
    program.parent.mkdir(parents=True)
    program.write_text("#!/old/place/venv/bin/python3 -u\n")
    program.chmod(0o755)
    loaded = load(tmp_path, f"engine.venv={tmp_path}/venv")
    plan = build_plan(loaded, HERE, (), RUN)
    with pytest.raises(RecipeError, match="is for /old/place/venv/bin/python3, which is not there") as caught:
        require_programs(plan, loaded, {})
    assert caught.value.where == f"--set engine.venv={tmp_path}/venv"
    for first in (b"#!/bin/sh\n", b"#! /usr/bin/env python\n", b"#!\n", b"#!python\n", b"\x7fELF\xff\n", b""):
        program.write_bytes(first)
        require_programs(plan, loaded, {})
