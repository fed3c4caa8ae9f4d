"""The verbs that start nothing, as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dynctl.cli.main import dispatch
from dynctl.cli.plan_view import ranges
from dynctl.recipe import shipped
from dynctl.recipe.schema import Recipe
from dynctl.recipe.shipped import find_recipe, shipped_recipes

HOSTS = "hosts: [{name: n1, address: 10.0.0.1, gpus: 8}, {name: n2, address: 10.0.0.2, gpus: 8}]"
DISAGG = "recipes/llama70b-disagg.yaml"


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "hosts.yaml").write_text(HOSTS)
    return "hosts.yaml"


def test_plan_shows_the_node_map_and_commands(hosts: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["plan", DISAGG, "--inventory", hosts, "--set", "engine.env.API_TOKEN=abc"]) == 0
    out, err = capsys.readouterr()
    assert "llama70b-disagg  vllm, model llama-70b, target ssh: 2 prefill, 1 decode" in out
    assert "n2    10.0.0.2  0-7" in out
    assert "decode-0/engine  on n1, GPU 0-7" in out
    assert "--tensor-parallel-size 8" in out
    assert "API_TOKEN='***'" in out
    assert "\033[" not in out
    assert "warning: " in err


def test_plan_json_holds_every_command(hosts: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["plan", DISAGG, "--inventory", hosts, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    engines = [p for p in plan["processes"] if p["kind"] == "engine"]
    assert [(p["role"], p["index"], len(p["gpus"])) for p in engines] == [
        ("prefill", 0, 4),
        ("prefill", 1, 4),
        ("decode", 0, 8),
    ]
    assert all(p["argv"] and p["env"]["DYNCTL_RUN"] for p in plan["processes"])


def test_plan_without_hosts_says_what_is_short(hosts: str, capsys: pytest.CaptureFixture[str]) -> None:
    (Path(hosts)).write_text("hosts: [{name: n1, gpus: 4}]")
    assert dispatch(["plan", DISAGG, "--inventory", hosts, "--json"]) == 4
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["type"] == "placement"
    assert "needs 16 GPUs" in error["message"]


@pytest.mark.usefixtures("hosts")
def test_validate_checks_what_it_can(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["validate", DISAGG]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("llama70b-disagg.yaml: valid\n")
    assert "placement not checked" in err
    assert dispatch(["validate", DISAGG, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["valid"] is True
    assert told["name"] == "llama70b-disagg"
    assert len(told["warnings"]) == 1


@pytest.mark.usefixtures("hosts")
def test_validate_looks_for_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["recipes/tiny-vllm-cpu.yaml", "--set", "engine.venv=.", "--set", "model.path=."]
    assert dispatch(["validate", *args]) == 3
    assert "engine program missing" in capsys.readouterr().err


def test_schema_is_json_schema_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"schema", "name", "model", "backend", "roles"}
    sections = {"recipe": schema, **schema["$defs"]}
    bare = [
        f"{name}.{field}"
        for name, section in sections.items()
        for field, facts in section["properties"].items()
        if "description" not in facts
    ]
    assert not bare
    assert set(schema["properties"]) == {f.alias or n for n, f in Recipe.model_fields.items()}


def test_recipes_lists_the_shipped_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["recipes", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["recipe"] for row in rows] == [f"recipes/{path.name}" for path in shipped_recipes()]
    assert len(rows) >= 6
    assert all(row["description"] and row["backend"] for row in rows)
    assert dispatch(["recipes"]) == 0
    assert "recipes/quickstart.yaml" in capsys.readouterr().out


def test_sbatch_scripts_are_found_where_dynctl_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert dispatch(["recipes"]) == 0
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "serve.sbatch" in line]
    assert Path(told.split()[-2]).is_file()


def test_shipped_recipes_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "quickstart.yaml", "recipes/quickstart.yaml"):
        assert find_recipe(Path(name)).is_file()
    assert find_recipe(Path("other/quickstart.yaml")) == Path("other/quickstart.yaml")
    assert find_recipe(Path("nothing")) == Path("nothing")
    Path("quickstart.yaml").write_text("")
    assert find_recipe(Path("quickstart.yaml")) == Path("quickstart.yaml")


def test_an_installation_without_recipes_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "dynctl")
    assert shipped.directory() is None
    assert shipped.shipped_recipes() == []
    (tmp_path / "dynctl" / "_data" / "recipes").mkdir(parents=True)
    (tmp_path / "dynctl" / "_data" / "recipes" / "a.yaml").write_text("")
    assert [path.name for path in shipped.shipped_recipes()] == ["a.yaml"]


def test_number_ranges() -> None:
    assert ranges([]) == ""
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
