"""`dynctl doctor` as a user calls it, here with planted faults; `status` after a start that failed."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dynctl.engines.mocker import assets_dir
from tests.deployment import RECIPES, Cli, end_all

RECIPE = """\
schema: dynctl/v1
name: planted
model: {path: MODEL, served_name: m}
backend: vllm
engine:
  venv: VENV
  device: cpu
  start_timeout: 20s
  args:
    max-model-len: 4096
    enforce-eeger: true
roles: {aggregated: {}}
frontend: {port: PORT}
"""
HELP = """\
usage: vllm serve [model_tag] [options]

options:
  --max-model-len MAX_MODEL_LEN
                        Model context length.
  --enforce-eager, --no-enforce-eager
"""


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    yield Cli(tmp_path / "home", {"CUDA_VISIBLE_DEVICES": ""})
    end_all(tmp_path / "home")


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def planted(tmp_path: Path, port: int, model: str, engine: str) -> Path:
    """A recipe of an engine that is a shell script; its Python tells version 0.33.0."""
    program(tmp_path / "venv" / "bin" / "vllm", engine)
    program(tmp_path / "venv" / "bin" / "python", "echo 0.33.0")
    file = tmp_path / "planted.yaml"
    text = RECIPE.replace("MODEL", model).replace("VENV", str(tmp_path / "venv")).replace("PORT", str(port))
    file.write_text(text)
    return file


def told(report: dict[str, Any], level: str) -> dict[str, str]:
    return {f["check"]: f["message"] for f in report["findings"] if f["level"] == level}


def test_a_host_with_three_planted_faults(cli: Cli, tmp_path: Path, taken: int) -> None:
    missing = tmp_path / "no-such-model"
    recipe = planted(tmp_path, taken, str(missing), f"cat <<'END'\n{HELP}END")
    done = cli.run("doctor", str(recipe))
    assert done.returncode == 4, done.stderr
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    assert lines[0] == "local  this machine"
    wrong = {line.split(maxsplit=1)[1]: lines[i + 1].strip() for i, line in enumerate(lines) if "✗" in line}
    assert {" ".join(fault.split()): remedy for fault, remedy in wrong.items()} == {
        f"ports port {taken} is taken by {Path('/proc/self/comm').read_text().strip()} (pid {os.getpid()})": (
            "→ end it, or --set frontend.port=PORT (0 takes a free one)"
        ),
        f"model model missing: {missing}": "→ put it there on this machine, or correct model.path",
        "flags vllm 0.33.0 has no flag --enforce-eeger": (
            f"→ did you mean --enforce-eager? It is set at {recipe}:11"
        ),
    }
    assert lines[-1].startswith("1 host: ")
    assert ", 3 wrong" in lines[-1]
    assert "\033[" not in done.stdout
    assert not (cli.home / "runs").exists()


def test_the_same_for_scripts(cli: Cli, tmp_path: Path, taken: int) -> None:
    recipe = planted(tmp_path, taken, str(tmp_path / "none"), "exit 3")
    done = cli.run("doctor", str(recipe), "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["ok"], report["name"]) == (4, False, "planted")
    assert set(told(report, "fail")) == {"ports", "model"}
    assert "exit code 3" in told(report, "unknown")["flags"]
    assert report["counts"]["fail"] == 2
    assert report["facts"]["local"]["engine"]["version"] == "0.33.0"


def test_a_host_without_faults(cli: Cli) -> None:
    report = cli.json("doctor", str(RECIPES / "quickstart.yaml"), "--set", "frontend.port=0")
    assert report["ok"]
    assert told(report, "fail") == {}
    assert {"engine", "flags", "model", "dynctl"} <= set(told(report, "ok"))


def test_only_a_taken_port_has_a_code_of_its_own(cli: Cli, taken: int) -> None:
    done = cli.run("doctor", str(RECIPES / "quickstart.yaml"), "--set", f"frontend.port={taken}")
    assert done.returncode == 7
    assert f"port {taken} is taken" in done.stdout


def test_without_a_recipe_this_machine_is_looked_at_in_general(cli: Cli) -> None:
    report = cli.json("doctor")
    assert report["name"] == ""
    assert not {"model", "engine", "flags", "placement"} & {f["check"] for f in report["findings"]}


def test_too_few_gpus_are_one_fault_beside_the_others(cli: Cli) -> None:
    done = cli.run("doctor", "llama70b-disagg", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 4
    assert "needs 16 GPUs" in told(report, "fail")["placement"]


def test_hosts_that_cannot_be_reached_are_not_passed(cli: Cli, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.yaml"
    there = [{"name": f"n{i}", "host": f"127.0.0.{i}", "port": 1, "gpus": 8} for i in (1, 2)]
    hosts.write_text(json.dumps({"hosts": there}))
    done = cli.run("doctor", "llama70b-disagg", "--inventory", str(hosts))
    assert done.returncode == 8
    assert done.stdout.splitlines()[-1] == "2 hosts: 0 well, 2 wrong"
    assert "refused" in done.stdout


def test_a_wrong_recipe_ends_with_its_own_code(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("schema: dynctl/v1\n")
    assert cli.run("doctor", str(tmp_path / "r.yaml")).returncode == 3


@pytest.mark.parametrize(
    ("words", "checks"),
    [
        ("OSError: [Errno 98] Address already in use", {"ports"}),
        ("OSError: [Errno 28] No space left on device", {"disk", "shm"}),
        ("ModuleNotFoundError: No module named 'vllm'", {"engine"}),
    ],
)
def test_status_after_a_failed_start_looks_at_what_may_be_behind_it(
    cli: Cli, tmp_path: Path, words: str, checks: set[str]
) -> None:
    recipe = planted(tmp_path, 0, str(assets_dir()), f'echo "{words}" >&2; exit 1')
    assert cli.run("up", str(recipe), "-d", "--unset", "engine.args").returncode == 5
    status = cli.json("status")
    assert {cause["check"] for cause in status["causes"]} == checks
    shown = cli.run("status").stdout
    assert "what may be behind it" in shown
    assert "all checks: dynctl doctor " in shown or "doctor /" in shown


def test_status_names_who_has_the_port_that_a_start_failed_for(cli: Cli, tmp_path: Path) -> None:
    """The engine's port is taken between plan and start, and `status` still finds who took it."""
    code = "import socket,sys,time; s=socket.create_server(('127.0.0.1',int(sys.argv[1]))); time.sleep(60)"
    engine = (
        f'port=$(echo "$@" | sed "s/.*--port \\([0-9]*\\).*/\\1/"); '
        f'DYNCTL_RUN= DYNCTL_HOME={tmp_path}/home setsid python3 -c "{code}" "$port" >/dev/null 2>&1 & '
        'sleep 1; echo "Address already in use" >&2; exit 1'
    )
    recipe = planted(tmp_path, 0, str(assets_dir()), engine)
    assert cli.run("up", str(recipe), "-d", "--unset", "engine.args").returncode == 7
    causes = cli.json("status")["causes"]
    assert causes[0]["level"] == "fail"
    assert "is taken by python3 (pid " in causes[0]["message"]


def test_status_of_what_is_well_looks_at_nothing(cli: Cli) -> None:
    told = cli.json("up", str(RECIPES / "quickstart.yaml"), "-d", "-y", "--set", "frontend.port=0")
    assert cli.json("status")["causes"] == []
    assert cli.run("down", told["name"]).returncode == 0
    assert cli.json("status")["causes"] == []
