"""Where the secrets of a running deployment are, and where they are not."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deployment import RECIPES, Cli, Deployment, end_all, owned, up

QUICKSTART = RECIPES / "quickstart.yaml"
CLIENT_KEY = "clients-own-key-7c1f"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Deployment]:
    cli = Cli(tmp_path / "home", {"TEAM_KEY": CLIENT_KEY})
    keys = "frontend.api_key=[{name: team, key: 'env:TEAM_KEY', max_concurrent: 4}]"
    try:
        with up(cli, QUICKSTART, "--set", "frontend.port=0", "--set", keys) as deployment:
            yield deployment
    finally:
        end_all(tmp_path / "home")


def ask(url: str, key: str) -> int:
    """The status of a completion asked for with `key`."""
    body = json.dumps({"model": "tiny", "prompt": "hello", "max_tokens": 2}).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_secrets_are_in_the_key_files_alone(served: Deployment) -> None:
    """Not in a command line, a log, a spec, the plan (stored or printed), the lock file or the metrics."""
    engine_key = (served.run_dir / "engine.key").read_text()
    assert (ask(f"{served.url}/v1/completions", CLIENT_KEY), ask(f"{served.url}/v1/completions", "no")) == (
        200,
        401,
    )
    for secret in (CLIENT_KEY, engine_key):
        for file in served.run_dir.rglob("*"):
            if file.is_file() and file.name != "engine.key":
                assert secret.encode() not in file.read_bytes(), file
        for pid in owned(served.run_dir.name):
            assert secret.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        for verb in (("ps",), ("status",), ("logs",)):
            assert secret not in served.cli.run(*verb, served.name).stdout
        with urllib.request.urlopen(f"{served.url}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        assert secret not in text
    assert 'api_key_requests_total{key="team"} 1.0' in text
    for file in served.run_dir.rglob("*"):
        assert file.stat().st_mode & 0o077 == 0, file


def test_an_engines_port_is_closed_to_whoever_has_not_its_key(served: Deployment) -> None:
    """Clients could pass the frontend by, and with it keys, limits and accounts."""
    port = next(
        argument
        for pid in owned(served.run_dir.name)
        if b"dynctl.mocker" in (line := Path(f"/proc/{pid}/cmdline").read_bytes())
        for before, argument in zip(line.split(b"\0"), line.split(b"\0")[1:], strict=False)
        if before == b"--port"
    ).decode()
    engine = f"http://127.0.0.1:{port}/v1/completions"
    assert ask(engine, CLIENT_KEY) == 401
    assert ask(engine, (served.run_dir / "engine.key").read_text()) == 200
