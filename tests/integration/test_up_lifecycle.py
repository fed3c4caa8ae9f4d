"""`dynctl up` to `dynctl down` with simulated engines: what a user does, and what goes wrong in between."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from dynctl.deploy.ports import listening
from tests.conftest import REQUIRE_ALL
from tests.deployment import RECIPES, Cli, Deployment, end_all, eventually, get, owned, up

QUICKSTART = RECIPES / "quickstart.yaml"
FREE_PORT = ("--set", "frontend.port=0")
SLOW = ("--set", "engine.args.fault-slow-start=60")


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    yield Cli(tmp_path / "home")
    end_all(tmp_path / "home")


@pytest.fixture
def served(cli: Cli) -> Iterator[Deployment]:
    with up(cli, QUICKSTART, *FREE_PORT) as deployment:
        yield deployment


def run_ids(cli: Cli) -> list[str]:
    runs = cli.home / "runs"
    return [p.name for p in runs.iterdir() if not p.name.startswith(".")] if runs.is_dir() else []


def nothing_runs(cli: Cli) -> bool:
    return not any(owned(run_id) for run_id in run_ids(cli))


def row(deployment: Deployment, seat: str) -> dict[str, Any]:
    return next(r for r in deployment.ps() if r["id"] == seat)


def ready_again(deployment: Deployment, seat: str, restarts: int) -> bool:
    return eventually(lambda: (r := row(deployment, seat))["ready"] and r["restarts"] == restarts)


def controller_pid(deployment: Deployment) -> int:
    pid: int = deployment.cli.json("status", deployment.name)["controller_pid"]
    return pid


def chat(deployment: Deployment) -> str:
    said: str = deployment.cli.json("chat", "Hello", "--max-tokens", "4", "--name", deployment.name)[
        "content"
    ]
    return said


def error_of(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert "Traceback" not in done.stdout + done.stderr
    error: dict[str, str] = json.loads(done.stdout)["error"]
    assert set(error) == {"type", "message", "where"}
    return error


def test_what_a_failed_test_started_does_not_outlive_it(cli: Cli) -> None:
    cli.json("up", str(QUICKSTART), "-d", "-y", *FREE_PORT)
    (run_id,) = run_ids(cli)
    assert owned(run_id)
    end_all(cli.home)
    assert not owned(run_id)


def test_a_day_of_a_deployment(served: Deployment) -> None:
    cli = served.cli
    assert get(f"{served.url}/health")
    rows = served.ps()
    assert [r["id"] for r in rows] == ["frontend-0", "aggregated-0", "aggregated-1"]
    for r in rows:
        assert r["ready"], r
        assert r["state"] == "ready"
        assert r["pid"] in owned(served.run_dir.name)
        assert {"role", "index", "instance", "node", "engine_pid", "restarts", "url"} <= set(r)
    assert all(r["engine_pid"] in owned(served.run_dir.name) for r in rows if r["role"] != "frontend")

    assert re.search(r"aggregated +1 .* ready +yes", cli.run("ps").stdout)
    assert chat(served)
    assert cli.run("chat", "Hello", "--max-tokens", "4").stdout.strip()
    status = cli.json("status")
    assert (status["ready"], status["phase"], status["counts"], status["layer"]) == (True, "ready", "2/2", "")
    assert "all layers are well" in cli.run("status").stdout
    assert cli.json("ls")[0]["phase"] == "ready"

    events = [json.loads(line) for line in cli.run("events", "--json").stdout.splitlines()]
    assert events[0]["event"] == "controller.started"
    assert "deployment.ready" in [e["event"] for e in events]
    assert "process.started" in cli.run("events").stdout

    logs = cli.run("logs", "aggregated/1", "-n", "50").stdout
    assert {line.split()[0] for line in logs.splitlines()} <= {"aggregated-1", "aggregated-1.engine"}
    assert cli.run("logs", "--grep", "deployment[.]ready", "--since", "10m").stdout.startswith("controller")
    assert cli.run("logs", "prefill").returncode == 2
    assert cli.run("logs", "--grep", "(").returncode == 2


def test_secrets_and_state_are_for_their_owner_only(served: Deployment) -> None:
    assert served.run_dir.stat().st_mode & 0o777 == 0o700
    for name in ("keys.json", "plan.json", "state.json", "recipe.lock.yaml", "events.jsonl"):
        assert (served.run_dir / name).stat().st_mode & 0o777 == 0o600, name
    secret = json.loads((served.run_dir / "keys.json").read_text())["secret"]
    for process in owned(served.run_dir.name):
        shown = Path(f"/proc/{process}/cmdline").read_bytes() + Path(f"/proc/{process}/environ").read_bytes()
        assert secret.encode() not in shown


def test_a_killed_engine_is_restarted_and_said_so(served: Deployment) -> None:
    before = row(served, "aggregated-0")
    os.kill(before["engine_pid"], signal.SIGKILL)
    assert ready_again(served, "aggregated-0", 1)
    after = row(served, "aggregated-0")
    assert (after["incarnation"], after["last_exit"]) == (2, "the engine ended with signal SIGKILL")
    assert after["engine_pid"] != before["engine_pid"]
    assert chat(served)


def test_a_killed_sidecar_leaves_no_engine_behind(served: Deployment) -> None:
    before = row(served, "aggregated-1")
    os.kill(before["pid"], signal.SIGKILL)
    assert ready_again(served, "aggregated-1", 1)
    assert before["engine_pid"] not in owned(served.run_dir.name)
    assert chat(served)


def test_a_killed_frontend_is_restarted_on_its_port(served: Deployment) -> None:
    os.kill(row(served, "frontend-0")["pid"], signal.SIGKILL)
    assert ready_again(served, "frontend-0", 1)
    assert row(served, "frontend-0")["url"] == served.url
    assert eventually(lambda: not served.cli.json("status")["layer"])
    assert chat(served)


def test_traffic_outlives_the_controller_and_a_new_one_takes_over(served: Deployment) -> None:
    cli = served.cli
    os.kill(controller_pid(served), signal.SIGKILL)
    assert eventually(lambda: controller_pid(served) == 0)
    assert chat(served)
    assert cli.json("status")["layer"] == "controller"
    survivors = {r["id"]: r["pid"] for r in served.ps()}
    os.kill(survivors.pop("aggregated-1"), signal.SIGKILL)

    other = cli.run("up", str(QUICKSTART), "-d", "--json", "--set", "roles.aggregated.replicas=1", *FREE_PORT)
    assert other.returncode == 2
    assert "from another recipe" in error_of(other)["message"]

    again = cli.json("up", str(QUICKSTART), "-d", *FREE_PORT)
    assert again == {"name": served.name, "url": served.url, "run_dir": str(served.run_dir)}
    assert ready_again(served, "aggregated-1", 1)
    assert {r["id"]: r["pid"] for r in served.ps() if r["id"] in survivors} == survivors
    assert chat(served)


def test_a_controller_told_to_end_leaves_the_rest_running(served: Deployment) -> None:
    os.kill(controller_pid(served), signal.SIGTERM)
    assert eventually(lambda: controller_pid(served) == 0)
    assert chat(served)


def test_a_name_and_a_port_are_given_once(served: Deployment, tmp_path: Path) -> None:
    pids = {r["id"]: r["pid"] for r in served.ps()}
    again = served.cli.json("up", str(QUICKSTART), "-d", *FREE_PORT)
    assert (again["url"], again["changed"]) == (served.url, [])
    assert {r["id"]: r["pid"] for r in served.ps()} == pids

    port = served.url.rpartition(":")[2]
    other = tmp_path / "other.yaml"
    other.write_text(QUICKSTART.read_text().replace("name: quickstart", "name: other"))
    taken = served.cli.run("up", str(other), "-d", "--json", "--set", f"frontend.port={port}")
    assert taken.returncode == 7
    error = error_of(taken)
    assert error["type"] == "port_in_use"
    assert f"(pid {row(served, 'frontend-0')['pid']})" in error["message"]
    with up(served.cli, other, *FREE_PORT) as neighbour:
        several = served.cli.run("ps")
        assert several.returncode == 2
        assert "other, quickstart" in several.stderr
        assert chat(neighbour)


def test_down_leaves_nothing_but_the_run_directory(cli: Cli) -> None:
    with up(cli, QUICKSTART, *FREE_PORT) as deployment:
        ports = [int(r["url"].rpartition(":")[2]) for r in deployment.ps()]
    assert not set(ports) & set(listening())
    assert cli.json("ls")[0]["phase"] == "stopped"
    assert [r["state"] for r in cli.json("ps")] == ["stopped"] * 3
    assert "deployment.stopped" in cli.run("logs", "controller").stdout
    assert "it was stopped" in cli.run("status").stdout
    assert cli.run("logs", "-f", "-n", "1").returncode == 0
    assert "deployment.stopped" in cli.run("events", "-f").stdout
    assert "was not running" in cli.run("down", "quickstart").stderr
    assert cli.run("down").returncode == 2
    again = cli.run("down", "nope", "--json")
    assert (again.returncode, error_of(again)["type"]) == (2, "usage")


def test_down_works_without_a_controller(cli: Cli) -> None:
    with up(cli, QUICKSTART, *FREE_PORT) as deployment:
        os.kill(controller_pid(deployment), signal.SIGKILL)
    assert cli.json("ls")[0]["phase"] == "stopped"


def test_down_works_with_a_controller_that_hangs(cli: Cli) -> None:
    with up(cli, QUICKSTART, *FREE_PORT) as deployment:
        os.kill(controller_pid(deployment), signal.SIGSTOP)


def test_an_engine_that_dies_at_start_is_told_with_its_lines(cli: Cli) -> None:
    fault = "engine.args.fault-die-at-start=no memory left on the device"
    done = cli.run("up", str(QUICKSTART), "-d", "--json", *FREE_PORT, "--set", fault)
    assert done.returncode == 5
    error = error_of(done)
    assert error["type"] == "process_exited"
    assert "no memory left on the device" in error["message"]
    assert eventually(lambda: nothing_runs(cli))
    status = cli.json("status")
    assert (status["phase"], status["layer"]) == ("failed", "deployment")
    assert "no memory left on the device" in cli.run("logs", "engine").stdout


def test_a_start_that_takes_too_long_is_ended(cli: Cli) -> None:
    done = cli.run("up", str(QUICKSTART), "-d", "--json", "--timeout", "2", *FREE_PORT, *SLOW)
    assert done.returncode == 6
    assert "aggregated-0 is starting" in error_of(done)["message"]
    assert nothing_runs(cli)


def test_two_at_once_make_one_deployment(cli: Cli) -> None:
    command = [sys.executable, "-m", "dynctl.cli.main", "up", str(QUICKSTART), "-d", "--json", *FREE_PORT]
    env = {**os.environ, "DYNCTL_HOME": str(cli.home)}
    pair = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        told = [json.loads(p.communicate(timeout=60)[0]) for p in pair]
        codes = [p.returncode for p in pair]
        # The one that comes second finds the other's controller, or that it has the name but none yet.
        assert sorted(codes) in ([0, 0], [0, 2])
        assert sum("url" in t for t in told) == codes.count(0)
        assert len(run_ids(cli)) == 1
    finally:
        cli.run("down", "quickstart")
    assert nothing_runs(cli)


def start_attached(cli: Cli, *args: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dynctl.cli.main", "up", str(QUICKSTART), *FREE_PORT, *args]
    env = {**os.environ, "DYNCTL_HOME": str(cli.home)}
    return subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def seats_with_pids(cli: Cli) -> int:
    files = list(cli.home.glob("runs/[!.]*/state.json"))
    return sum(1 for s in json.loads(files[0].read_bytes())["seats"] if s["pid"]) if files else -1


@pytest.mark.parametrize("stage", ["run written", "some started", "all started"])
def test_up_killed_on_the_way_leaves_nothing_after_down(cli: Cli, stage: str) -> None:
    least = {"run written": 0, "some started": 1, "all started": 3}[stage]
    process = start_attached(cli, *SLOW)
    try:
        assert eventually(lambda: seats_with_pids(cli) >= least)
    finally:
        process.kill()
        process.communicate(timeout=30)
    # Killed before the name meant the run: then nothing can have been started either.
    if (cli.home / "deployments" / "quickstart").is_symlink():
        assert cli.run("down", "quickstart").returncode == 0
    assert nothing_runs(cli)


def test_ctrl_c_leaves_it_running_and_says_how_to_come_back(cli: Cli) -> None:
    process = start_attached(cli)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://")
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "dynctl status quickstart --watch comes back" in said
        assert "Traceback" not in said
        assert get(f"{url}/health")
    finally:
        done = cli.run("down", "quickstart")
    assert done.returncode == 0
    assert nothing_runs(cli)


def test_ctrl_c_before_it_is_ready_leaves_it_starting(cli: Cli) -> None:
    process = start_attached(cli, "-d", *SLOW)
    try:
        assert eventually(lambda: seats_with_pids(cli) == 3)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 130
        assert "dynctl down quickstart ends it" in said
        assert cli.json("status")["phase"] == "starting"
    finally:
        cli.run("down", "quickstart")
    assert nothing_runs(cli)


def test_whoever_is_attached_sees_it_end(cli: Cli) -> None:
    process = start_attached(cli)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("http://")
    assert cli.run("down", "quickstart").returncode == 0
    _, said = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "quickstart has ended: stopped" in said


def test_a_home_that_cannot_be_used_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = Cli(tmp_path / "file").run("up", str(QUICKSTART), "-d", *FREE_PORT)
    assert done.returncode == 5
    assert done.stderr.count("\n") == 1
    assert "the directory of runs cannot be used" in done.stderr


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ("engine.python=/nonexistent/python", 3, "/nonexistent/python"),
        ("model.path=/nonexistent", 3, "model directory missing: /nonexistent"),
        ("frontend.host=192.0.2.1", 3, "an address of this machine"),
        ("target=ssh", 3, "target ssh needs hosts"),
        ("rolls=1", 3, "did you mean 'roles'"),
    ],
)
def test_bad_input_starts_nothing(cli: Cli, change: str, code: int, said: str) -> None:
    done = cli.run("up", str(QUICKSTART), "-d", "--json", "--set", change)
    assert done.returncode == code
    assert said in error_of(done)["message"]
    assert run_ids(cli) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 9 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, timeout=30).returncode:
        (pytest.fail if REQUIRE_ALL else pytest.skip)("needs the right to mount a file system")
    try:
        yield folder
    finally:
        end_all(folder / "home")
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=30)


def fill(folder: Path) -> Path:
    """Leave no byte free; the file that takes it all."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (65536, 1):
            while _written(file, size):
                pass
    return ballast


def _written(file: FileIO, size: int) -> bool:
    try:
        return file.write(bytes(size)) > 0
    except OSError:
        return False


@pytest.mark.root
def test_a_full_disk_is_one_message(small_disk: Path) -> None:
    cli = Cli(small_disk / "home")
    (small_disk / "some").write_bytes(bytes(2 * 1024 * 1024))
    done = cli.run("up", str(QUICKSTART), "-d", "--json", *FREE_PORT)
    assert done.returncode == 5
    assert "too little space for a run" in error_of(done)["message"]
    assert run_ids(cli) == []


@pytest.mark.root
def test_a_disk_that_fills_up_on_the_way_ends_the_start(small_disk: Path) -> None:
    cli = Cli(small_disk / "home")
    process = start_attached(cli, "-d", "--json", "--set", "engine.args.fault-slow-start=3")
    try:
        assert eventually(lambda: seats_with_pids(cli) == 3)
        fill(small_disk)
        out, said = process.communicate(timeout=60)
        assert process.returncode == 5, said
        assert "run directory cannot be written: No space left" in json.loads(out)["error"]["message"]
        assert nothing_runs(cli)
    finally:
        process.kill()
        (small_disk / "ballast").unlink(missing_ok=True)
        cli.run("down", "quickstart")


@pytest.mark.root
def test_a_disk_that_fills_up_does_not_end_what_serves(small_disk: Path) -> None:
    with up(Cli(small_disk / "home"), QUICKSTART, *FREE_PORT) as deployment:
        ballast = fill(small_disk)
        os.kill(row(deployment, "aggregated-0")["engine_pid"], signal.SIGKILL)
        assert eventually(lambda: not row(deployment, "aggregated-0")["ready"])
        assert chat(deployment)
        ballast.unlink()
        assert eventually(lambda: row(deployment, "aggregated-0")["ready"])
