"""Faults of the engine, its flags, its container, the model's files."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dynctl.doctor import programs
from dynctl.doctor.checks import question
from dynctl.doctor.subject import Wanted
from dynctl.protocol.hosts import ContainerFacts, EngineFacts, PathFacts
from tests.unit.host_samples import FLAGS, HOSTS, MODEL, levels, loaded, only, subject, wanted

HUB = "model.path=org/llama"


@pytest.fixture
def want(tmp_path: Path) -> Wanted:
    return wanted(loaded(tmp_path))


def test_an_engine_that_is_not_there(want: Wanted) -> None:
    told = only(programs.engine(subject(want, engine=EngineFacts())), "fail")
    assert "engine.venv (/opt/vllm)" in told.message
    assert "on n1" in told.remedy


def test_an_engine_that_comes_with_dynctl_is_looked_for_where_dynctl_is_there(tmp_path: Path) -> None:
    mocker = wanted(loaded(tmp_path, "backend=mocker", "engine.venv=null"))
    asked = question(HOSTS[0], mocker, ("~/own/python",))
    assert asked.engine is not None
    assert sys.executable not in asked.to_json()
    assert asked.dynctl == ("~/own/python",)
    told = only(programs.engine(subject(mocker, engine=EngineFacts())), "unknown")
    assert "comes with dynctl" in told.message


def test_an_engine_that_does_not_tell_its_version_is_no_pass(want: Wanted) -> None:
    silent = EngineFacts(found="/opt/vllm/bin/vllm", note="no end after 60 s")
    assert "no end after 60 s" in only(programs.engine(subject(want, engine=silent)), "unknown").message
    assert levels(programs.engine(subject(want, engine=None))) == ["unknown"]


def test_an_engine_that_cannot_print_its_help_may_not_start_either(want: Wanted) -> None:
    broken = EngineFacts(found="/x", version="0.33.0", note="vllm: exit code 1: no libcuda.so.1")
    found = programs.engine(subject(want, engine=broken))
    assert levels(found) == ["ok", "warn"]
    assert "no libcuda.so.1" in only(found, "warn").message
    mute = EngineFacts(found="/x", note="python: no such file; vllm: exit code 1")
    found = programs.engine(subject(want, engine=mute))
    assert only(found, "unknown").message.endswith("python: no such file")
    assert only(found, "warn").message.endswith("vllm: exit code 1")


def test_an_unknown_flag_names_the_nearest_and_its_line(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, "engine.args.enable-prefix-cacheing=true")
    told = only(programs.flags(subject(wanted(recipe))), "fail")
    assert told.message == "vllm 0.33.0 has no flag --enable-prefix-cacheing"
    assert "did you mean --enable-prefix-caching? " in told.remedy
    assert "--set engine.args.enable-prefix-cacheing" in told.remedy


def test_a_flag_of_one_role_is_found_too(tmp_path: Path) -> None:
    text = loaded(tmp_path, "roles.decode.args.zzz=1")
    assert "--zzz" in only(programs.flags(subject(wanted(text))), "fail").message


def test_a_flag_that_is_short_for_another(tmp_path: Path) -> None:
    found = programs.flags(subject(wanted(loaded(tmp_path, "engine.args.block=16"))))
    assert only(found, "warn").message == "--block is short for --block-size"


def test_what_click_takes_for_another_flag_is_not_short_for_it(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, "backend=trtllm", "engine.args={max_batch_size: 8}")
    listed = EngineFacts(found="/x", flags=["--max_batch_size_of_all"])
    assert levels(programs.flags(subject(wanted(recipe), engine=listed))) == ["fail"]


def test_known_flags_pass_however_their_words_are_joined(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, "engine.args.block_size=16", "engine.args.no-enable-prefix-caching=true")
    assert levels(programs.flags(subject(wanted(recipe)))) == ["ok"]


def test_flags_without_help_are_no_pass(want: Wanted) -> None:
    mute = EngineFacts(found="/x", note="exit code 1")
    assert "exit code 1" in only(programs.flags(subject(want, engine=mute)), "unknown").message


def test_settings_that_are_no_flags_are_said(tmp_path: Path) -> None:
    text = "engine.args={max_batch_size: 8, kv_cache_config: {dtype: fp8}}"
    recipe = loaded(tmp_path, "backend=trtllm", text)
    found = programs.flags(
        subject(wanted(recipe), engine=EngineFacts(found="/x", flags=["--max_batch_size"]))
    )
    assert "1 settings are no flags" in only(found, "note").message
    assert only(found, "ok")


def test_a_model_that_is_not_there(want: Wanted) -> None:
    told = only(programs.model(subject(want, paths={MODEL: PathFacts()})), "fail")
    assert told.message == f"model missing: {MODEL}"
    assert told.remedy == "put it there on n1, or correct model.path"


def test_a_model_that_may_not_be_read(want: Wanted) -> None:
    closed = {MODEL: PathFacts(exists=True, is_dir=True)}
    assert "cannot be read" in only(programs.model(subject(want, paths=closed)), "fail").message
    part = {MODEL: PathFacts(exists=True, is_dir=True, unread=f"{MODEL}/a.safetensors")}
    told = only(programs.model(subject(want, paths=part)), "fail").message
    assert told.endswith(f"{MODEL}: a.safetensors in it")


def test_a_model_on_a_server_that_hangs_is_no_pass(want: Wanted) -> None:
    hung = subject(want, paths={}, notes=[f"model {MODEL}: no answer after 5 s"])
    assert "no answer after 5 s" in only(programs.model(hung), "unknown").message


def test_a_model_that_is_a_file(want: Wanted) -> None:
    assert levels(programs.model(subject(want, paths={MODEL: PathFacts(exists=True, readable=True)}))) == [
        "warn"
    ]


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    want = wanted(loaded(tmp_path, "model.tokenizer=/tok"))
    there = subject(want).facts.paths
    found = programs.model(subject(want, paths={**there, "/tok": PathFacts()}))
    assert "/tok" in only(found, "fail").message


def test_a_model_of_the_hub(tmp_path: Path) -> None:
    want = wanted(loaded(tmp_path, HUB))
    assert "hf download org/llama" in only(programs.model(subject(want, model_at="")), "warn").remedy
    offline = subject(want, model_at="", env={"HF_HUB_OFFLINE": "1"})
    assert "HF_HUB_OFFLINE" in only(programs.model(offline), "fail").message
    assert levels(programs.model(subject(want, model_at="/cache/x"))) == ["ok"]
    hung = subject(want, model_at="", notes=["model org/llama: no answer after 5 s"])
    assert levels(programs.model(hung)) == ["unknown"]


def test_a_container_without_its_runtime_or_image(tmp_path: Path) -> None:
    want = wanted(loaded(tmp_path, "engine.container=/images/v.sif"))
    assert "apptainer" in only(programs.container(subject(want)), "fail").message
    late = subject(want, notes=["containers: no answer after 10 s"])
    assert levels(programs.container(late)) == ["unknown"]
    runs = ContainerFacts(apptainer="1.3")
    gone = subject(want, containers=runs, paths={"/images/v.sif": PathFacts()})
    assert "image missing" in only(programs.container(gone), "fail").message
    assert levels(programs.model(subject(want, containers=runs))) == ["unknown"]


def test_flags_of_the_sample_are_those_of_help() -> None:
    assert sorted(FLAGS) == FLAGS


def test_a_model_that_comes_with_dynctl_is_where_dynctl_is(tmp_path: Path) -> None:
    want = wanted(loaded(tmp_path, "target=ssh", "model.path=builtin:tiny"))
    assert only(programs.model(subject(want, model_at="")), "ok").message == "builtin:tiny comes with dynctl"
    assert question(HOSTS[0], want, ()).model == ""
