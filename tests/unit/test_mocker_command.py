"""The mocker's flags, and the command line that dynctl makes for it."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest

from dynctl.engines.base import (
    ArgValue,
    EngineEnvironment,
    EngineLaunch,
    ModelRef,
    Parallel,
    Rank,
    RoleSettings,
)
from dynctl.engines.mocker import ARGUMENTS, OWNED, Mocker, assets_dir
from dynctl.mocker.options import Options, parse_options
from dynctl.mocker.tokens import BUILTIN
from dynctl.protocol.instances import Role

PORTS = {"http": 7000, "kv_events": 7001, "kv_replay": 7003}


def launch(role: Role = "aggregated", **given: Any) -> EngineLaunch:
    values: dict[str, Any] = {
        "model": ModelRef("builtin:tiny", "tiny"),
        "role": role,
        "index": 0,
        "parallel": Parallel(),
        "ranks": (Rank("n", "10.0.0.1"),),
        "ports": PORTS,
    }
    return EngineLaunch(**{**values, **given})


def parsed(given: EngineLaunch) -> Options:
    (command,) = Mocker().commands(given)
    assert command.argv[1:3] == ("-m", "dynctl.mocker")
    return parse_options(command.argv[3:])


def role_settings(role: Role = "aggregated", args: dict[str, ArgValue] | None = None) -> RoleSettings:
    return RoleSettings(role, 1, Parallel(), args or {}, {}, "builtin:tiny")


def test_every_flag_is_either_dynctls_or_the_recipes() -> None:
    flags = {field.name.replace("_", "-") for field in dataclasses.fields(Options)}
    assert flags == ARGUMENTS | {name for name in OWNED if "_" not in name}


def test_what_dynctl_starts_is_what_the_mocker_reads() -> None:
    options = parsed(
        launch(
            "prefill",
            parallel=Parallel(tensor=2, data=2),
            disaggregated=True,
            args={"max_num_seqs": 8, "enable-prefix-caching": False, "fault-hang": True, "speedup": 2.5},
        )
    )
    assert options.model == str(BUILTIN) == str(assets_dir())
    assert (options.served_model_name, options.host, options.port) == ("tiny", "10.0.0.1", 7000)
    assert (options.tensor_parallel_size, options.data_parallel_size) == (2, 2)
    assert (options.sends_kv, options.receives_kv, options.lease_s) == (True, True, 30.0)
    assert (options.max_num_seqs, options.speedup, options.shutdown_timeout) == (8, 2.5, 5.0)
    assert (options.enable_prefix_caching, options.fault_hang) == (False, True)
    assert options.kv_events_config["endpoint"] == "tcp://127.0.0.1:7001"
    source = Mocker().kv_source(launch(parallel=Parallel(data=2)))
    assert source is not None
    assert source.endpoints == ("tcp://127.0.0.1:7001", "tcp://127.0.0.1:7002")
    assert source.replay_endpoints == ("tcp://127.0.0.1:7003", "tcp://127.0.0.1:7004")


def test_decode_takes_either_part_and_no_events_are_sent_when_nobody_listens() -> None:
    options = parsed(launch("decode", disaggregated=True, kv_events=False))
    assert (options.sends_kv, options.receives_kv) == (True, True)
    assert options.kv_events_config == {}
    assert Mocker().kv_source(launch(kv_events=False)) is None


@pytest.mark.parametrize(
    ("environment", "start"),
    [
        (EngineEnvironment(), (sys.executable,)),
        (EngineEnvironment(python="/p/python"), ("/p/python",)),
        (EngineEnvironment(venv="/v/"), ("/v/bin/python",)),
        (EngineEnvironment(container="i.sif"), ("apptainer", "exec", "i.sif", "python3")),
    ],
)
def test_the_python_is_this_one_unless_the_recipe_names_another(
    environment: EngineEnvironment, start: tuple[str, ...]
) -> None:
    (command,) = Mocker().commands(launch(environment=environment))
    assert command.argv[: len(start) + 2] == (*start, "-m", "dynctl.mocker")


def test_a_tokenizer_and_template_of_their_own_are_passed_on() -> None:
    options = parsed(launch(model=ModelRef("/m", "n", tokenizer="builtin:tiny", chat_template="/t.jinja")))
    assert (options.model, options.tokenizer, options.chat_template) == ("/m", str(BUILTIN), "/t.jinja")


def test_names_are_the_mockers_own() -> None:
    engine = Mocker()
    assert engine.known_args("max_num_seqs")
    assert engine.known_args("no-enable-prefix-caching")
    assert not engine.known_args("no-speedup")
    assert not engine.known_args("gpu-memory-utilization")


def test_a_cache_that_cannot_hold_one_request_is_an_error() -> None:
    engine = Mocker()
    args: dict[str, ArgValue] = {"num-gpu-blocks-override": 10, "max-model-len": 161}
    (finding,) = engine.check([role_settings(args=args)], None)
    assert finding.field == "roles.aggregated.args.num-gpu-blocks-override"
    assert not engine.check([role_settings(args={**args, "block-size": 32})], None)
    assert not engine.check([role_settings()], None)


def test_prefill_and_decode_with_different_blocks_are_an_error() -> None:
    roles = [role_settings("prefill", {"block-size": 32}), role_settings("decode")]
    assert [finding.field for finding in Mocker().check(roles, None)] == ["roles.prefill.args.block-size"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--block-size", "0"], "--block-size must be at least 1"),
        (["--fault-event-loss", "2"], "--fault-event-loss must be between 0 and 1"),
        (["--speedup", "-1"], "--speedup must not be negative"),
        (["--kv-events-config", "{"], "not JSON"),
        (["--kv-events-config", "[]"], "a JSON object is needed"),
        (["--max-num-seq", "4"], "unrecognized arguments"),
        (["--port", "x"], "invalid int value"),
    ],
)
def test_a_bad_flag_is_named(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_options(argv)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_the_model_may_stand_without_a_flag() -> None:
    assert parse_options(["/m"]).model == "/m"
    assert parse_options(["/m", "--model", "/n"]).model == "/n"
    lease = '{"kv_role":"kv_both","kv_connector_extra_config":{"kv_lease_duration":2}}'
    assert parse_options(["--kv-transfer-config", lease]).lease_s == 2.0
