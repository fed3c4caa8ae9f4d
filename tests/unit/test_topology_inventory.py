from __future__ import annotations

from pathlib import Path

import pytest

from dynctl.errors import PlacementError, RecipeError
from dynctl.recipe.schema import Host as RecipeHost
from dynctl.recipe.schema import Recipe
from dynctl.topology.inventory import Host, Ssh, with_gpus
from dynctl.topology.inventory_file import discover_local, from_hosts, inventory_for, load_inventory


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "i.yaml"
    file.write_text(text)
    return file


def test_hosts_keep_their_order_and_default_their_address(tmp_path: Path) -> None:
    file = write(tmp_path, "hosts: [{name: n2, gpus: 8}, {name: n1, address: 10.0.0.1}]")
    made = load_inventory(file)
    assert made.hosts == (Host("n2", "n2", 8, ssh=Ssh("n2")), Host("n1", "10.0.0.1", 0, ssh=Ssh("n1")))
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
        ("hosts:\n- {name: a, gpus: -1}", "i.yaml:2: 'hosts.0.gpus' must be a whole number from 0 to 64"),
        ("hosts:\n- {name: -oProxyCommand=x}", "i.yaml:2: 'hosts.0.name' must be letters"),
        ("hosts:\n- {name: 'a b'}", "i.yaml:2: 'hosts.0.name' must be letters"),
        ("hosts:\n- {name: a, host: '-oProxyCommand=x'}", "i.yaml:2: 'hosts.0.host' must be a host name"),
        ("hosts:\n- {name: a, host: 'x;reboot'}", "i.yaml:2: 'hosts.0.host' must be a host name"),
        ("hosts:\n- {name: a, user: '-l root'}", "i.yaml:2: 'hosts.0.user' must be a user's name"),
        ("hosts:\n- {name: a, proxy_jump: 'b c'}", "i.yaml:2: 'hosts.0.proxy_jump' must be [USER@]HOST"),
        ("hosts:\n- {name: a, labels: ['']}", "i.yaml:2: 'hosts.0.labels.0' must be letters"),
        ("hosts:\n- {name: a, port: 0}", "i.yaml:2: 'hosts.0.port' is a whole number (0)"),
        ("hosts:\n- {name: a}\ndefaults: {address: b}", "i.yaml:3: unknown key 'address' in 'defaults'"),
        ("hosts:\n- {name: a}\ngroups: {a: [a]}", "i.yaml:3: 'a' is a host and a group"),
        ("hosts:\n- {name: a}\ngroups:\n  g: [a,\n b*]", "i.yaml:5: no host is 'b*' (there are a)"),
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


FULL = """
defaults: {user: svc, gpus: auto, key: keys/id, labels: [lab]}
hosts:
  - {name: a1, host: alias, port: 2222, gpus: 8, labels: [big, fast]}
  - {name: a2, user: other, proxy_jump: "me@jump:22,hop", python: /opt/python3}
  - {name: b1, key: /keys/b}
groups: {rack: ["a*"], all: ["*"]}
"""


def test_defaults_hold_for_hosts_that_do_not_say_otherwise(tmp_path: Path) -> None:
    a1, a2, b1 = load_inventory(write(tmp_path, FULL)).hosts
    assert a1.ssh == Ssh("alias", "svc", 2222, f"{tmp_path}/keys/id")
    assert (a1.gpus, a1.discover, a1.labels) == (8, False, ("big", "fast"))
    assert a2.ssh == Ssh("a2", "other", None, f"{tmp_path}/keys/id", "me@jump:22,hop")
    assert (a2.gpus, a2.discover, a2.labels, a2.python) == (0, True, ("lab",), "/opt/python3")
    assert b1.ssh.key == "/keys/b"


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        (["b1", "a1"], ["b1", "a1"]),
        (["rack"], ["a1", "a2"]),
        (["lab"], ["a2", "b1"]),
        (["a2", "rack", "fast"], ["a2", "a1"]),
        ([], []),
    ],
)
def test_names_groups_and_labels_mean_hosts(tmp_path: Path, wanted: list[str], names: list[str]) -> None:
    inventory = load_inventory(write(tmp_path, FULL))
    assert [host.name for host in inventory.select(wanted)] == names


def test_a_name_nobody_has_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(PlacementError) as caught:
        load_inventory(write(tmp_path, FULL)).select(["a1", "racks"])
    assert caught.value.message == f"no host 'racks' in {tmp_path}/i.yaml"
    assert caught.value.hint == "there are a1, a2, b1; groups rack, all; labels big, fast, lab"


def test_found_gpus_are_filled_in_only_where_they_are_to_be_found(tmp_path: Path) -> None:
    inventory = load_inventory(write(tmp_path, FULL))
    assert inventory.undiscovered() == ("a2", "b1")
    found = with_gpus(inventory, {"a1": 1, "a2": 4})
    assert [(host.gpus, host.discover) for host in found.hosts] == [(8, False), (4, False), (0, True)]
    assert found.groups == inventory.groups
