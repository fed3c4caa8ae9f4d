from __future__ import annotations

from pathlib import Path

import pytest

from dynctl.errors import RecipeError
from dynctl.recipe.schema import Host as RecipeHost
from dynctl.recipe.schema import Recipe
from dynctl.topology.inventory import Host, discover_local, from_hosts, inventory_for, load_inventory


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "i.yaml"
    file.write_text(text)
    return file


def test_hosts_keep_their_order_and_default_their_address(tmp_path: Path) -> None:
    file = write(tmp_path, "hosts: [{name: n2, gpus: 8}, {name: n1, address: 10.0.0.1}]")
    made = load_inventory(file)
    assert made.hosts == (Host("n2", "n2", 8), Host("n1", "10.0.0.1", 0))
    assert made.source == str(file)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("hosts: []", "i.yaml:1: 'hosts' is a list"),
        ("host: []", "i.yaml: 2 problems"),
        ("hosts:\n- {name: a}\n- {name: b, gpu: 1}", "i.yaml:3: unknown key 'gpu' in 'hosts.1' (did you"),
        ("hosts:\n- {name: a}\n- {name: a, address: x}", "i.yaml:3: two hosts have the name 'a'"),
        ("hosts:\n- {name: a, address: x}\n- {name: b, address: x}", "i.yaml:3: two hosts have the addr"),
        ("hosts:\n- {name: a, gpus: many}", "i.yaml:2: 'hosts.0.gpus' must be a whole number"),
        ("hosts:\n- {name: a, gpus: -1}", "i.yaml:2: 'hosts.0.gpus' is a whole number (-1)"),
        ("hosts:\n- a", "i.yaml:2: 'hosts.0' must be a mapping of keys, not a string"),
    ],
)  # fmt: skip
def test_wrong_inventories_name_the_line(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_inventory(write(tmp_path, text))
    assert str(caught.value).replace(f"{tmp_path}/", "").startswith(told)


@pytest.mark.parametrize(
    ("script", "gpus"),
    [
        ("echo 'GPU 0: NVIDIA H100'; echo 'GPU 1: NVIDIA H100'", 2),
        ("echo 'No devices were found'", 0),
        ("echo 'GPU 0: x'; exit 9", 0),
    ],
)
def test_local_gpus_are_those_nvidia_smi_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, gpus: int
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert discover_local().hosts == (Host("local", "127.0.0.1", gpus),)


def test_no_nvidia_smi_or_a_broken_one_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert discover_local().hosts[0].gpus == 0
    program = tmp_path / "nvidia-smi"
    program.write_bytes(b"\x7fELF nothing that runs")
    program.chmod(0o755)
    assert discover_local().hosts[0].gpus == 0


def test_a_file_wins_over_the_recipe_and_the_recipe_over_this_machine(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        {
            "schema": "dynctl/v1",
            "name": "a",
            "model": {"path": "m"},
            "backend": "external",
            "roles": {},
            "hosts": [{"name": "own", "gpus": 2}],
        }
    )
    file = write(tmp_path, "hosts: [{name: filed}]")
    assert inventory_for(recipe, "r.yaml", file).hosts[0].name == "filed"
    assert inventory_for(recipe, "r.yaml", None) == from_hosts([RecipeHost(name="own", gpus=2)], "r.yaml")
    plain = recipe.model_copy(update={"hosts": []})
    assert inventory_for(plain, "r.yaml", None).source == "this machine"
