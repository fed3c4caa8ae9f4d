"""A recipe that is wrong gives one error that names file, line, field, and what would be valid."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import yaml

from dynctl.errors import RecipeError
from dynctl.recipe.load import LoadedRecipe, load_recipe
from dynctl.recipe.lock import lock_text
from dynctl.recipe.source import MAX_FILE_BYTES

GOOD = """\
schema: dynctl/v1
name: demo
model: {path: org/model-7b}
backend: vllm
roles:
  aggregated:
    replicas: 2
"""


def load(tmp_path: Path, text: str | bytes, *sets: str, **environ: str) -> LoadedRecipe:
    file = tmp_path / "r.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe(file, sets, environ={"HOME": str(tmp_path), **environ})


def failure(tmp_path: Path, text: str | bytes, *sets: str, **environ: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text, *sets, **environ)
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_defaults_are_filled_in(tmp_path: Path) -> None:
    loaded = load(tmp_path, GOOD)
    recipe = loaded.recipe
    assert recipe.model.name == recipe.model.served_name == "model-7b"
    assert recipe.frontend.host == "127.0.0.1"
    assert recipe.router.mode == "kv"
    assert recipe.roles.present().keys() == {"aggregated"}
    assert loaded.where("roles.aggregated.replicas") == f"{tmp_path}/r.yaml:7"
    assert loaded.where("roles.aggregated.args.block-size") == f"{tmp_path}/r.yaml:6"
    assert loaded.where("frontend.port") == f"{tmp_path}/r.yaml"


def test_engine_wide_argument_is_found_for_a_role(tmp_path: Path) -> None:
    loaded = load(tmp_path, GOOD + "engine:\n  args:\n    block-size: 32\n")
    assert loaded.where("roles.aggregated.args.block-size") == f"{tmp_path}/r.yaml:10"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "r.yaml: the file is empty"),
        ("# nothing\n", "r.yaml: the file is empty"),
        ("- a\n", "r.yaml:1: must be a mapping of keys, not a list"),
        ("hello", "r.yaml:1: must be a mapping of keys, not a string"),
        ("a: [1\nb: 2\n", "r.yaml:2: broken YAML"),
        ("a: 1\n\tb: 2\n", "r.yaml:2: broken YAML"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2: broken YAML"),
        ("a: *x\n", "r.yaml:1: broken YAML"),
        ("a: \x07\n", "r.yaml:1: broken YAML: unprintable character"),
        ("name: a\nname: b\n", "r.yaml:2: duplicate key 'name' (first given in line 1)"),
        ("a: !!python/object:os.system x\n", "r.yaml:1: the tag"),
        ("a: !!int x\n", "r.yaml:1: 'x' is not of the type given"),
        ("a: .nan\n", "r.yaml:1: '.nan' is not a finite number"),
        ("? [a]\n: b\n", "r.yaml:1: a key must be a word"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", "r.yaml:3: merge keys (<<) are not supported"),
        ("a: &x [*x]\n", "r.yaml:1: the document is too large"),
        ("[" * 5000, "r.yaml: nested too deeply"),
        (b"a: \xff\n", "r.yaml:1: is not UTF-8 text"),
        ("#" * (MAX_FILE_BYTES + 1), "r.yaml: the file is too large"),
    ],
    ids=range(19),
)
def test_what_is_no_recipe_file(tmp_path: Path, text: str | bytes, told: str) -> None:
    assert failure(tmp_path, text).startswith(told)


def test_many_aliases_do_not_take_all_memory(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    assert "the document is too large" in failure(tmp_path, "\n".join(lines))


def test_missing_file_directory_and_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no\.yaml: no such file"):
        load_recipe(tmp_path / "no.yaml")
    with pytest.raises(RecipeError, match="is a directory"):
        load_recipe(tmp_path)
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe("/proc/self/mem")
    with pytest.raises(RecipeError, match="cannot be read: Not a directory"):
        load_recipe(
            tmp_path / "r.yaml" / "x" if (tmp_path / "r.yaml").write_text("") else tmp_path / "r.yaml/x"
        )


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("replicas: 2", "replica: 2", "7: unknown key 'replica' in 'roles.aggregated' (did you"),
        ("backend: vllm", "backend: vllm\nruoter: {}", "5: unknown key 'ruoter' (did you mean 'router'?"),
        ("replicas: 2", "zzz: 2", "7: unknown key 'zzz' in 'roles.aggregated' (valid: args,"),
        ("replicas: 2", "replicas: two", "7: 'roles.aggregated.replicas' must be a whole number, not"),
        ("replicas: 2", "replicas: '2'", "7: 'roles.aggregated.replicas' must be a whole number"),
        ("replicas: 2", "replicas: true", "7: 'roles.aggregated.replicas' must be a whole number, not"),
        ("replicas: 2", "replicas: 0", "7: 'roles.aggregated.replicas' is a whole number (0): input"),
        ("replicas: 2", "replicas: 1.5", "7: 'roles.aggregated.replicas' must be a whole number"),
        ("name: demo", "name: Demo!", "2: 'name' must be lower-case letters, digits and dashes"),
        ("name: demo\n", "", "1: 'name' is missing (Name of the deployment)"),
        ("backend: vllm", "backend: vlm", "4: 'backend' must be one of vllm, sglang, trtllm"),
        ("dynctl/v1", "dynctl/v2", "1: 'schema' must be dynctl/v1, not a string ('dynctl/v2')"),
        ("{path: org/model-7b}", "org/model-7b", "3: 'model' must be a mapping of keys, not a string"),
        ("{path: org/model-7b}", "{path: 'a b'}", "3: 'a b' is no model (a directory, or"),
        ("{path: org/model-7b}", "{path: ./none}", "3: model directory missing: none"),
        ("{path: org/model-7b}", "{path: /none/x}", "3: model directory missing: /none/x"),
        ("{path: org/model-7b}", "{path: 'builtin:x'}", "3: there is no builtin:x (valid: b"),
        ("{path: org/model-7b}", "{path: 'builtin:..'}", "3: there is no builtin:.."),
        ("replicas: 2", "env: {A: true}", "7: 'roles.aggregated.env.A' must be a string; quote it"),
        ("replicas: 2", "env: {A: null}", "7: 'roles.aggregated.env.A' must be a string; quote it"),
        ("replicas: 2", "urls: http://x", "7: 'roles.aggregated.urls' must be a list, not a string"),
    ],
)  # fmt: skip
def test_wrong_fields_name_file_line_and_what_is_valid(tmp_path: Path, old: str, new: str, told: str) -> None:
    assert old in GOOD
    assert failure(tmp_path, GOOD.replace(old, new)).startswith("r.yaml:" + told)


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ("router: {mode: best}", "r.yaml:8: 'router.mode' must be kv, least_loaded, round_robin, random, "),
        ("router: {overlap_credit: -1}", "r.yaml:8: 'router.overlap_credit' is a whole number (-1)"),
        ("sla: {ttft: fast}", "r.yaml:8: 'sla.ttft' must be a duration such as"),
        ("sla: {percentile: best}", "r.yaml:8: 'sla.percentile' must be a percentile such as p50"),
        (
            "frontend: {port: 70000}",
            "r.yaml:8: 'frontend.port' is a whole number (70000): input should be less",
        ),
        ("frontend: {limits: {body: huge}}", "r.yaml:8: 'frontend.limits.body' must be a size such as"),
        ("frontend: {api_key: short}", "r.yaml:8: an API key is too short (at least 8 characters)"),
        (
            "frontend: {api_key: 'env:NOPE'}",
            "r.yaml:8: the environment variable NOPE is not set (export NOPE",
        ),
        ("frontend: {api_key: 'sha256:12'}", "r.yaml:8: no SHA-256 digest follows 'sha256:' (64 digits of"),
        ("frontend: {limits: {body: 0}}", "r.yaml:8: 'frontend.limits.body' is a whole number (0): input"),
        ("frontend: {limits: {stall_timeout: 0}}", "r.yaml:8: 'frontend.limits.stall_timeout' is a"),
        ("router: {queue: {deadline: 0}}", "r.yaml:8: 'router.queue.deadline' is a"),
        ("router: {session_affinity: {ttl: 0s}}", "r.yaml:8: 'router.session_affinity.ttl' is a"),
        ("frontend: {api_key: 'file:nope'}", "r.yaml:8: the key file nope cannot be read"),
        ("frontend: {tls: {cert: c.pem, key: k.pem}}", "r.yaml: 2 problems\n  r.yaml:8: file missing: c.pem"),
        ("frontend: {tls: {cert: c.pem}}", "r.yaml:8: 'frontend.tls.key' is missing (Private key file)"),
        ("engine: {venv: ./none}", "r.yaml:8: virtual environment missing: none"),
        ("engine: {python: /none/python}", "r.yaml:8: file missing: /none/python"),
        ("engine: {device: tpu}", "r.yaml:8: 'engine.device' must be gpu or cpu"),
        ("hosts: [{name: n1, gpu: 8}]", "r.yaml:8: unknown key 'gpu' in 'hosts.0' (did you mean"),
        ("slurm: {time: soon}", "r.yaml:8: 'slurm.time' must be a duration such as"),
        (
            "slurm: {sbatch_args: {mail-type: [END]}}",
            "r.yaml:8: 'slurm.sbatch_args.mail-type' must be a text of one line, a number, or true",
        ),
        (
            "frontend: {api_key: [12345678]}",
            "r.yaml:8: 'frontend.api_key' must be a string, or a mapping with name and key; quote a key of",
        ),
        ("target: moon", "r.yaml:8: 'target' must be local, ssh or slurm"),
    ],
)
def test_wrong_sections(tmp_path: Path, extra: str, told: str) -> None:
    assert failure(tmp_path, f"{GOOD}{extra}\n").startswith(told)


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    told = failure(tmp_path, GOOD.replace("replicas", "replica").replace("demo", "D") + "colour: red\n")
    assert told.startswith("r.yaml: 3 problems\n  r.yaml:2: 'name'")
    assert "r.yaml:7: unknown key 'replica'" in told
    assert "r.yaml:8: unknown key 'colour'" in told


def test_a_file_that_is_something_else_is_not_told_whole(tmp_path: Path) -> None:
    told = failure(tmp_path, "".join(f"{'x' * 90}{i}: 1\n" for i in range(50)))
    assert "r.yaml: 55 problems" in told
    assert told.endswith("and 43 more")
    assert "x" * 41 not in told


@pytest.mark.parametrize(
    ("change", "hint"),
    [("frontend.limits=", "(write {} for the defaults)"), ("model=", "(Which model, under which name)")],
)
def test_empty_sections(tmp_path: Path, change: str, hint: str) -> None:
    assert failure(tmp_path, GOOD, change).endswith(f"must be a mapping of keys, not nothing {hint}")


def test_dates_and_octals_stay_what_was_written(tmp_path: Path) -> None:
    loaded = load(tmp_path, GOOD + "engine: {args: {seed-day: 2024-01-01}}\nslurm: {time: 04:00:00}\n")
    assert loaded.recipe.engine.args == {"seed-day": "2024-01-01"}
    assert loaded.recipe.slurm is not None
    assert loaded.recipe.slurm.time == 14400


def test_relative_paths_are_the_recipes_or_the_callers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, recipes = tmp_path / "here", tmp_path / "recipes"
    for folder in (here / "m", recipes / "m"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    text = GOOD.replace("org/model-7b", "./m")
    assert load(recipes, text).recipe.model.path == str(recipes / "m")
    assert load(recipes, text, "model.path=./m").recipe.model.path == str(here / "m")
    assert load(recipes, text, DYNCTL_SET="model.path=./m").recipe.model.path == str(here / "m")


def test_remote_targets_do_not_need_the_files_here(tmp_path: Path) -> None:
    text = GOOD.replace("org/model-7b", "/data/none") + "engine: {venv: /opt/none}\ntarget: ssh\n"
    assert load(tmp_path, text).recipe.engine.venv == "/opt/none"


def test_model_facts_come_from_the_config(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    config = tmp_path / "m" / "config.json"
    text = GOOD.replace("org/model-7b", "m")
    assert load(tmp_path, text).model.facts is None
    config.write_text(
        '{"text_config": {"num_attention_heads": 8, "torch_dtype": "bfloat16"}, "num_hidden_layers": 4}'
    )
    facts = load(tmp_path, text).model.facts
    assert facts is not None
    assert (facts.kv_heads, facts.attention_heads, facts.layers, facts.dtype) == (8, 8, 4, "bfloat16")
    config.write_text("{")
    assert "config.json cannot be read" in failure(tmp_path, text)
    config.write_text("[]")
    assert "config.json is not a mapping" in failure(tmp_path, text)


def test_downloaded_model_is_found_in_the_hub_cache(tmp_path: Path) -> None:
    cached = tmp_path / ".cache" / "huggingface" / "hub" / "models--org--model-7b"
    snapshot = cached / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    (snapshot / "tokenizer.json").write_text("{}")
    files = load(tmp_path, GOOD).model
    assert files.directory == files.tokenizer == str(snapshot)
    assert load(tmp_path, GOOD, "model.revision=other").model.directory == ""


def test_off_needs_no_quotes(tmp_path: Path) -> None:
    text = GOOD + "router: {session_affinity: {mode: off}, conditional_disagg: {mode: off}}\n"
    router = load(tmp_path, text).recipe.router
    assert (router.session_affinity.mode, router.conditional_disagg.mode) == ("off", "off")
    assert (
        load(tmp_path, GOOD, "router.session_affinity.mode=off").recipe.router.session_affinity.mode == "off"
    )
    told = failure(tmp_path, GOOD + "router: {session_affinity: {mode: on}}\n")
    assert "must be off, soft or hard" in told


def test_api_keys_are_kept_as_digests_only(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("from-a-file\n")
    text = GOOD + "frontend: {api_key: [literal-key, 'env:KEY', 'file:key']}\n"
    loaded = load(tmp_path, text, KEY="from-environment")
    keys = ("literal-key", "from-environment", "from-a-file")
    assert [key.key for key in loaded.recipe.frontend.api_key] == [
        "sha256:" + hashlib.sha256(key.encode()).hexdigest() for key in keys
    ]
    assert not any(key in lock_text(loaded, "1") for key in keys)
    assert loaded.secrets == {"KEY", "DYNCTL_SET"}
    assert len(load(tmp_path, GOOD + "frontend: {api_key: literal-key}\n").recipe.frontend.api_key) == 1


def test_api_keys_have_names_and_limits_of_their_own(tmp_path: Path) -> None:
    text = GOOD + "frontend: {api_key: [plain-key, {name: batch, key: 'env:KEY', max_concurrent: 4}]}\n"
    loaded = load(tmp_path, text, KEY="from-environment")
    assert [(key.name, key.max_concurrent) for key in loaded.recipe.frontend.api_key] == [
        ("key-1", 0),
        ("batch", 4),
    ]
    locked = lock_text(loaded, "1")
    assert "from-environment" not in locked
    assert load(tmp_path, locked).recipe == loaded.recipe


def test_lock_loads_as_the_same_recipe(tmp_path: Path) -> None:
    text = GOOD + "engine: {env: {TOKEN: x}}\nsla: {ttft: 200ms}\nfrontend: {api_key: literal-key}\n"
    loaded = load(tmp_path, text, "engine.env.TOKEN=hidden", "router.mode=round_robin", "frontend.port=0")
    text = lock_text(loaded, "1.2")
    assert text.startswith(f"# Resolved by dynctl 1.2 from {tmp_path}/r.yaml.\n")
    assert "# Changed by: --set engine.env.TOKEN=***\n" in text
    assert "# Changed by: --set router.mode=round_robin\n" in text
    assert yaml.safe_load(text)["frontend"]["port"] == 0
    again = load(tmp_path, text)
    assert again.recipe == loaded.recipe
    assert lock_text(again, "1.2").split("\n", 4)[-1].endswith(text.split("\n")[-2] + "\n")


def test_an_unknown_section_of_a_flag_is_blamed_on_the_flag(tmp_path: Path) -> None:
    told = failure(tmp_path, GOOD, "rolse.decode.replicas=2")
    assert told.startswith("--set rolse.decode.replicas=2: unknown key 'rolse' (did you mean 'roles'?")


def test_a_misspelt_recipe_is_told_those_that_come_along() -> None:
    with pytest.raises(RecipeError, match="no such file") as caught:
        load_recipe("quikstart", environ={})
    assert caught.value.where == "quikstart"
    assert "did you mean 'quickstart'" in caught.value.hint
