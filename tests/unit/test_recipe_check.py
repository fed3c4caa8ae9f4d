"""What fields mean together: every refusal says where and why, before anything starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dynctl.engines import catalog
from dynctl.errors import RecipeError
from dynctl.recipe.check import check_recipe
from dynctl.recipe.load import load_recipe

HEAD = "schema: dynctl/v1\nname: demo\nmodel: {path: m}\nbackend: vllm\n"
AGGREGATED = "roles: {aggregated: {}}\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 8, "num_key_value_heads": 2}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def check(tmp_path: Path, text: str) -> list[str]:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    warnings = check_recipe(load_recipe(file, environ={"HOME": str(tmp_path)}))
    return [str(w).replace(f"{tmp_path}/", "") for w in warnings]


def failure(tmp_path: Path, text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        check(tmp_path, text)
    return str(caught.value).replace(f"{tmp_path}/", "")


@pytest.mark.usefixtures("model")
def test_sound_recipes_pass(tmp_path: Path) -> None:
    assert check(tmp_path, HEAD + AGGREGATED) == []
    assert check(tmp_path, HEAD + "roles: {prefill: {replicas: 2}, decode: {}}\n") == []


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(
    ("roles", "told"),
    [
        ("{}", "r.yaml:5: there is no role; give aggregated, or prefill and decode"),
        ("{decode: null}", "r.yaml:5: there is no role"),
        ("{prefill: {}}", "r.yaml:5: prefill alone serves nothing; give decode too"),
        ("{decode: {}}", "r.yaml:5: decode alone serves nothing; give prefill too"),
        ("{aggregated: {}, decode: {}}", "r.yaml:5: aggregated and decode exclude each other"),
        ("{aggregated: {}, decode: {}, prefill: {}}", "r.yaml:5: aggregated and prefill and decode exclude"),
        ("{encode: {}, aggregated: {}}", "r.yaml:5: encode workers are not supported yet"),
        (
            "{aggregated: {urls: ['http://h:1']}}",
            "r.yaml:5: backend vllm starts its own engines; only backend",
        ),
        ("{aggregated: {kv_events: ['tcp://h:1']}}", "r.yaml:5: backend vllm starts its own engines"),
        ("{aggregated: {tensor_parallel: 3}}", "r.yaml:5: "),
        ("{aggregated: {args: {port: 1}}}", "r.yaml:5: 'port' cannot be given: dynctl allocates it"),
        (
            "{aggregated: {args: {tensor_parallel_size: 2}}}",
            "from roles.aggregated.tensor_parallel: set it there",
        ),
        (
            "{aggregated: {args: {kv-transfer-config: {}}}}",
            "from roles (prefill and decode) and engine.kv_transfer: set it there",
        ),
        ("{aggregated: {args: {--dtype: x}}}", "r.yaml:5: write 'dtype', without leading dashes"),
        ("{aggregated: {args: {'a b': x}}}", "r.yaml:5: 'a b' is not an argument of vllm"),
    ],
)
def test_roles_and_arguments_that_cannot_be(tmp_path: Path, roles: str, told: str) -> None:
    assert told in failure(tmp_path, f"{HEAD}roles: {roles}\n")


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ("frontend: {hosts: [a, b]}", "1 replicas but 2 hosts"),
        ("frontend: {replicas: 2, hosts: [a, a]}", "r.yaml:6: a host is named twice"),
        (
            "frontend: {replicas: 2, hosts: [a, b]}",
            "frontends on 2 hosts cannot all listen on 127.0.0.1; use 0.0.0.0",
        ),
        ("engine: {venv: ., python: python3}", "r.yaml:6: engine.venv and engine.python exclude each other"),
        ("engine:\n  args:\n    host: x", "r.yaml:8: 'host' is set by dynctl, from hosts"),
        ("hosts: [{name: a}, {name: a}]", "r.yaml:6: there are two hosts named 'a'"),
        (
            "frontend: {api_key: [{name: a, key: long-key-1}, {name: a, key: long-key-2}]}",
            "r.yaml:6: there are two API keys named 'a'",
        ),
        (
            "frontend: {api_key: [{name: a, key: long-key-1}, {name: b, key: long-key-1}]}",
            "r.yaml:6: the API keys 'a' and 'b' are the same; give each its own",
        ),
    ],
)
def test_sections_that_cannot_be(tmp_path: Path, extra: str, told: str) -> None:
    assert told in failure(tmp_path, f"{HEAD}{AGGREGATED}{extra}\n")


@pytest.mark.usefixtures("model")
def test_findings_of_the_engine_carry_lines(tmp_path: Path) -> None:
    text = HEAD + "roles:\n  prefill: {}\n  decode:\n    args:\n      dtype: float16\n"
    assert failure(tmp_path, text).startswith("r.yaml:9: ")


def test_missing_tokenizer_is_a_warning_for_kv_routing(tmp_path: Path, model: Path) -> None:
    (model / "tokenizer.json").unlink()
    assert check(tmp_path, HEAD + AGGREGATED)[0].startswith("r.yaml:3: no tokenizer.json is at hand")
    assert check(tmp_path, HEAD + AGGREGATED + "router: {mode: least_loaded}\n") == []


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "'::1'"])
def test_by_ssh_a_service_that_only_its_own_host_reaches_is_a_warning(tmp_path: Path, host: str) -> None:
    away = "target: ssh\nhosts: [{name: n1}]\n"
    (told,) = check(tmp_path, HEAD + AGGREGATED + away + f"frontend: {{host: {host}}}\n")
    assert "only the frontend's own host reaches the service" in told
    assert check(tmp_path, HEAD + AGGREGATED + away + "frontend: {host: 0.0.0.0}\n") == []
    assert check(tmp_path, HEAD + AGGREGATED + f"frontend: {{host: {host}}}\n") == []


@pytest.mark.usefixtures("model")
def test_an_engine_without_events_routes_by_load_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = catalog.get("vllm")
    monkeypatch.setattr(engine, "features", replace(engine.features, kv_events="none"))
    assert check(tmp_path, HEAD + AGGREGATED + "router: {mode: kv}\n") == [
        "r.yaml:6: backend vllm publishes no KV events: mode kv guesses what is cached"
    ]


EXTERNAL = "schema: dynctl/v1\nname: demo\nmodel: {path: m}\nbackend: external\n"


@pytest.mark.usefixtures("model")
def test_external_engines_count_their_urls(tmp_path: Path) -> None:
    roles = (
        "roles: {aggregated: {urls: ['http://a:1', 'http://b:1'], kv_events: ['tcp://a:2', 'tcp://b:2']}}\n"
    )
    assert check(tmp_path, EXTERNAL + roles) == []
    loaded = load_recipe(tmp_path / "r.yaml")
    assert loaded.recipe.roles.present()["aggregated"].replicas == 2


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(
    ("role", "told"),
    [
        ("{}", "needs the engines' addresses"),
        ("{urls: ['http://a:1'], replicas: 2}", "r.yaml:5: 2 replicas but 1 urls"),
        ("{urls: ['ftp://a:1']}", "r.yaml:5: 'ftp://a:1' is no base address"),
        (
            "{urls: ['http://a:1'], kv_events: ['tcp://a:1', 'tcp://b:1']}",
            "2 endpoints for 1 urls; one for each",
        ),
        ("{urls: ['http://a:1'], kv_events: ['a:1']}", "'a:1' is no endpoint; write tcp://host:port"),
        ("{urls: ['http://a:1'], kv_events: ['tcp://a']}", "'tcp://a' is no endpoint"),
        ("{urls: ['http://a:1'], kv_events: ['tcp://a:x']}", "'tcp://a:x' is no endpoint"),
        ("{urls: ['http://a:1'], data_parallel: 2}", "backend external has no data parallelism"),
        ("{urls: ['http://a:1'], args: {x: 1}}", "has no effect"),
    ],
)
def test_external_engines_that_cannot_be(tmp_path: Path, role: str, told: str) -> None:
    assert told in failure(tmp_path, f"{EXTERNAL}roles: {{aggregated: {role}}}\n")


@pytest.mark.usefixtures("model")
def test_external_engines_have_no_environment_and_no_roles_apart(tmp_path: Path) -> None:
    told = failure(tmp_path, EXTERNAL + "engine: {venv: .}\nroles: {prefill: {}, decode: {}}\n")
    assert "r.yaml:5: backend external starts no engine; remove it" in told
    assert "r.yaml:6: backend external cannot do prefill and decode apart" in told


@pytest.mark.parametrize(
    ("backend", "transfer", "told"),
    [
        ("vllm", "mooncake", ""),
        ("sglang", "mooncake_tcp", ""),
        ("trtllm", "ucx", ""),
        ("vllm", "ucx", "cannot move the KV cache by ucx: nixl, mooncake, mooncake_tcp"),
        ("mocker", "mooncake", "cannot move the KV cache by mooncake: nixl"),
    ],
)
def test_how_the_kv_cache_moves_is_the_engines_to_allow(
    tmp_path: Path, backend: str, transfer: str, told: str
) -> None:
    text = (
        HEAD.replace("vllm", backend)
        + f"engine: {{kv_transfer: {transfer}}}\nroles: {{prefill: {{}}, decode: {{}}}}\n"
    )
    if told:
        assert told in failure(tmp_path, text)
    else:
        check(tmp_path, text)


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(
    ("backend", "mode", "told"),
    [
        ("vllm", "kv", []),
        ("vllm", "least_loaded", ["mode least_loaded does not look at prompts: prefill is never skipped"]),
        ("sglang", "kv", ["decode workers of backend sglang read no prompts: prefill is never skipped"]),
    ],
)
def test_prefill_that_would_never_be_skipped_is_said_to_be_so(
    tmp_path: Path, backend: str, mode: str, told: list[str]
) -> None:
    router = f"router: {{mode: {mode}, conditional_disagg: {{mode: isl}}}}\n"
    text = HEAD.replace("vllm", backend) + "roles: {prefill: {}, decode: {}}\n" + router
    warnings = check(tmp_path, text)
    assert len(warnings) == len(told)
    assert all(part in warning for part, warning in zip(told, warnings, strict=True))
