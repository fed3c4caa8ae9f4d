"""LoRA adapters of a running deployment: at every worker or at none, through restarts of anything."""

from __future__ import annotations

import json
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.deployment import RECIPES, Cli, Deployment, end_all, eventually, post, up

TWO = ("--set", "frontend.port=0", "--set", "roles.aggregated.replicas=2")


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    yield Cli(tmp_path / "home")
    end_all(tmp_path / "home")


@pytest.fixture
def served(cli: Cli) -> Iterator[Deployment]:
    with up(cli, RECIPES / "quickstart.yaml", *TWO) as deployment:
        yield deployment


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    return folder


def ask(url: str, body: dict[str, Any], key: str = "") -> tuple[int, dict[str, Any]]:
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def names_at(url: str, key: str = "") -> list[str]:
    request = urllib.request.Request(url + "/v1/models", headers={"authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return [card["id"] for card in json.load(answer)["data"]]


def at_workers(deployment: Deployment, name: str) -> list[bool]:
    key = (deployment.run_dir / "engine.key").read_text().strip()
    return [name in names_at(row["url"], key) for row in deployment.workers("aggregated")]


def kill(deployment: Deployment, seat: str, field: str = "pid") -> None:
    row = next(row for row in deployment.ps() if row["id"] == seat)
    os.kill(row[field], signal.SIGKILL)
    was = row["restarts"]

    def back() -> bool:
        now = next(row for row in deployment.ps() if row["id"] == seat)
        return bool(now["ready"] and now["restarts"] > was)

    assert eventually(back, 60)


def model_of(deployment: Deployment, name: str) -> str:
    client = openai.OpenAI(base_url=deployment.url + "/v1", api_key="none", max_retries=0)
    messages: Any = [{"role": "user", "content": "hello"}]
    return client.chat.completions.create(model=name, messages=messages, max_tokens=3).model


def test_an_adapter_is_at_every_worker_also_after_their_restarts(served: Deployment, adapter: Path) -> None:
    status, told = ask(served.url + "/v1/load_lora_adapter", {"lora_name": "ad", "lora_path": str(adapter)})
    assert (status, sorted(told["workers"])) == (200, ["aggregated-0", "aggregated-1"])
    assert names_at(served.url)[1:] == ["ad"]
    assert at_workers(served, "ad") == [True, True]
    assert [model_of(served, "ad") for _ in range(4)] == ["ad"] * 4
    kill(served, "aggregated-0")
    assert at_workers(served, "ad") == [True, True]
    kill(served, "frontend-0")
    assert names_at(served.url)[1:] == ["ad"]
    controller: int = served.cli.json("status", served.name)["controller_pid"]
    os.kill(controller, signal.SIGKILL)
    assert eventually(lambda: served.cli.json("status", served.name)["controller_pid"] == 0)
    assert ask(served.url + "/v1/unload_lora_adapter", {"lora_name": "ad"})[0] == 503
    served.cli.json("up", str(RECIPES / "quickstart.yaml"), "-d", *TWO)
    kill(served, "aggregated-1")
    assert at_workers(served, "ad") == [True, True]
    assert ask(served.url + "/v1/unload_lora_adapter", {"lora_name": "ad"})[0] == 200
    assert (at_workers(served, "ad"), names_at(served.url)[1:]) == ([False, False], [])


def test_an_adapter_that_one_worker_cannot_load_is_at_none(served: Deployment, adapter: Path) -> None:
    second = served.workers("aggregated")[1]["url"]
    post(second + "/mock/faults", {"refuse_adapters": True})
    status, told = ask(served.url + "/v1/load_lora_adapter", {"lora_name": "ad", "lora_path": str(adapter)})
    assert status == 502
    assert "aggregated-1: load answered 500" in told["error"]["message"]
    assert "aggregated-0" not in told["error"]["message"]
    assert at_workers(served, "ad") == [False, False]
    assert names_at(served.url)[1:] == []
    post(second + "/mock/faults", {"refuse_adapters": False})
    status, _ = ask(served.url + "/v1/load_lora_adapter", {"lora_name": "ad", "lora_path": str(adapter)})
    assert (status, at_workers(served, "ad")) == (200, [True, True])
    status, told = ask(served.url + "/v1/unload_lora_adapter", {"lora_name": "ad"})
    assert (status, at_workers(served, "ad"), names_at(served.url)[1:]) == (200, [False, False], [])


def test_wrong_wishes_are_refused_and_change_nothing(served: Deployment, adapter: Path) -> None:
    load, unload = served.url + "/v1/load_lora_adapter", served.url + "/v1/unload_lora_adapter"
    status, told = ask(load, {"lora_name": "ad", "lora_path": str(adapter / "missing")})
    assert (status, "No adapter found" in told["error"]["message"]) == (400, True)
    assert ask(load, {"lora_name": "ad"})[0] == 400
    assert ask(load, {"lora_name": "", "lora_path": "x"})[0] == 400
    assert ask(load, {"lora_name": names_at(served.url)[0], "lora_path": str(adapter)})[0] == 400
    assert ask(unload, {"lora_name": "ad"})[0] == 404
    assert ask(load, {"lora_name": "ad", "lora_path": str(adapter)})[0] == 200
    assert ask(load, {"lora_name": "ad", "lora_path": str(adapter)})[0] == 200
    status, told = ask(load, {"lora_name": "ad", "lora_path": "/elsewhere"})
    assert (status, "unload it first" in told["error"]["message"]) == (400, True)
    assert at_workers(served, "ad") == [True, True]


def test_adapters_need_an_admin_key_where_keys_are_asked_for(cli: Cli, adapter: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "keys.yaml"
    text = (RECIPES / "quickstart.yaml").read_text()
    keys = "[{key: plain-sesame, name: user}, {key: admin-sesame, name: boss, admin: true}]"
    recipe.write_text(text.replace("frontend:\n", f"frontend:\n  api_key: {keys}\n", 1))
    assert "admin-sesame" in recipe.read_text()
    with up(cli, recipe, *TWO) as deployment:
        load, body = deployment.url + "/v1/load_lora_adapter", {"lora_name": "ad", "lora_path": str(adapter)}
        assert [ask(load, body, key)[0] for key in ("", "plain-sesame")] == [401, 403]
        assert at_workers(deployment, "ad") == [False, False]
        assert ask(load, body, "admin-sesame")[0] == 200
        assert at_workers(deployment, "ad") == [True, True]
