"""Command lines, environments, ports and event sources of the engines, by what goes wrong without them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from dynctl.command import Command
from dynctl.engines import catalog
from dynctl.engines.arguments import both_spellings, flags, normal_name, program
from dynctl.engines.base import (
    ArgValue,
    Engine,
    EngineEnvironment,
    EngineLaunch,
    KvPoll,
    KvSource,
    ModelRef,
    Parallel,
    Rank,
)
from dynctl.errors import CodecError, PlacementError, RecipeError
from dynctl.protocol.instances import Role

ONE = (Rank("n1", "10.0.0.1", (0, 1)),)
TWO = (Rank("n1", "10.0.0.1", (0, 1)), Rank("n2", "10.0.0.2", (0, 1)))
MODEL = ModelRef(path="/m", served_name="llama")


def launch(engine: Engine, role: Role = "aggregated", **changes: Any) -> EngineLaunch:
    """A replica with its ports counted up from 7000 in hundreds."""
    parallel: Parallel = changes.get("parallel", Parallel())
    apart = changes.get("disaggregated", False)
    transfer = changes.get("transfer", "")
    needs = engine.port_needs(role, parallel, disaggregated=apart, transfer=transfer)
    ports = {name: 7000 + 100 * number for number, name in enumerate(needs)}
    base = EngineLaunch(model=MODEL, role=role, index=0, parallel=parallel, ranks=ONE, ports=ports)
    return replace(base, **changes)


ROLES_APART: tuple[Role, ...] = ("prefill", "decode")


def value(argv: tuple[str, ...], flag: str) -> str:
    assert argv.count(flag) == 1
    return argv[argv.index(flag) + 1]


def test_flags_are_sorted_and_values_take_their_form() -> None:
    args: Mapping[str, ArgValue] = {
        "z_last": 1,
        "--a-first": True,
        "off": False,
        "gone": None,
        "ratio": 0.9,
        "many": ["x", 2],
        "config": {"b": 1, "a": [True]},
    }
    assert flags(args) == [
        *("--a-first", "--config", '{"a":[true],"b":1}', "--many", "x", "2"),
        *("--ratio", "0.9", "--z-last", "1"),
    ]
    assert flags({"max-batch-size": 4}, "_") == ["--max_batch_size", "4"]


def test_names_have_one_spelling() -> None:
    assert normal_name("--max_model_len") == normal_name("max-model-len") == "max-model-len"
    assert both_spellings({"a-b": "x", "c": "y"}) == {"a-b": "x", "a_b": "x", "c": "y"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (EngineEnvironment(), ("tool",)),
        (EngineEnvironment(venv="/v/"), ("/v/bin/tool",)),
        (EngineEnvironment(python="/p"), ("/p", "-m", "mod")),
        (
            EngineEnvironment(venv="/v", container="i.sif"),
            ("apptainer", "exec", "--nv", "i.sif", "/v/bin/tool"),
        ),
    ],
)
def test_program_by_environment(environment: EngineEnvironment, expected: tuple[str, ...]) -> None:
    assert program(environment, "tool", ["mod"]) == expected


def test_catalogue_knows_its_names_and_refuses_others() -> None:
    assert catalog.names() == ("vllm", "sglang", "trtllm", "mocker", "external")
    assert catalog.get("vllm") is catalog.get("vllm")
    with pytest.raises(RecipeError, match="one of vllm"):
        catalog.get("vlm")


@pytest.mark.parametrize("name", ["vllm", "sglang", "trtllm"])
def test_same_launch_gives_the_same_command(name: str) -> None:
    engine = catalog.get(name)
    one = launch(engine, args={"b": 1, "a": 2}, env={"Y": "1", "X": "2"})
    two = launch(engine, args={"a": 2, "b": 1}, env={"X": "2", "Y": "1"})
    assert engine.commands(one)[0].argv == engine.commands(two)[0].argv
    assert engine.name == name


@pytest.mark.parametrize(
    ("name", "transfer"), [(name, way) for name in catalog.names() for way in catalog.get(name).transfers]
)
def test_engines_are_started_alike_for_both_roles_exactly_where_they_take_either(
    name: str, transfer: str
) -> None:
    """Else a worker would change its role with an engine that cannot, or start anew one that could."""
    engine = catalog.get(name)
    started = []
    for role in ROLES_APART:
        apart = launch(engine, role, disaggregated=True, transfer=transfer)
        command = engine.commands(apart)[0]
        started.append((command.argv, command.env, command.files, apart.ports, engine.kv_source(apart)))
    assert (started[0] == started[1]) == catalog.takes_either_role(name, transfer)


def test_engines_take_either_role_only_by_a_way_that_says_so() -> None:
    assert catalog.takes_either_role("mocker")
    assert not catalog.takes_either_role("vllm")  # NIXL with a role of its own
    assert catalog.takes_either_role("vllm", "nixl_both")
    assert not any(catalog.takes_either_role(name) for name in ("sglang", "trtllm", "external"))


@pytest.mark.parametrize("name", ["vllm", "sglang", "trtllm"])
def test_model_extras_become_flags(name: str) -> None:
    engine = catalog.get(name)
    model = ModelRef("/m", "llama", revision="r1", tokenizer="/t", chat_template="/c.jinja")
    (command,) = engine.commands(launch(engine, model=model))
    assert {"r1", "/t", "/c.jinja"} <= set(command.argv)


@pytest.mark.parametrize(
    ("engine", "good", "bad"),
    [
        ("vllm", "max-model-len", "kv-transfer-config.kv_role"),
        ("sglang", "page-size", "Page size"),
        ("trtllm", "max_batch_size", "a=b"),
    ],
)
def test_argument_names_are_checked_for_shape(engine: str, good: str, bad: str) -> None:
    assert catalog.get(engine).known_args(good)
    assert not catalog.get(engine).known_args(bad)


class TestVllm:
    engine = catalog.get("vllm")

    def test_one_node(self) -> None:
        (command,) = self.engine.commands(launch(self.engine, parallel=Parallel(tensor=2), args={"seed": 1}))
        assert command.argv[:3] == ("vllm", "serve", "/m")
        assert command.argv[-4:] == ("--seed", "1", "--shutdown-timeout", "30")
        assert value(command.argv, "--host") == "10.0.0.1"
        assert value(command.argv, "--port") == "7000"
        assert command.env == {"CUDA_VISIBLE_DEVICES": "0,1", "VLLM_HOST_IP": "10.0.0.1"}
        events = json.loads(value(command.argv, "--kv-events-config"))
        assert events["endpoint"] == "ipc://sockets/7000.kv"
        assert events["replay_endpoint"] == "ipc://sockets/7000.replay"
        assert "--kv-transfer-config" not in command.argv

    def test_recipe_may_choose_the_shutdown_timeout(self) -> None:
        (command,) = self.engine.commands(launch(self.engine, args={"shutdown_timeout": 5}))
        assert value(command.argv, "--shutdown-timeout") == "5"

    def test_python_form(self) -> None:
        environment = EngineEnvironment(python="/p")
        (command,) = self.engine.commands(launch(self.engine, environment=environment))
        assert command.argv[:4] == ("/p", "-m", "vllm.entrypoints.cli.main", "serve")

    def test_followers_are_headless_and_meet_at_the_head(self) -> None:
        spread = launch(self.engine, parallel=Parallel(tensor=4, expert=4), ranks=TWO)
        head, follower = self.engine.commands(spread)
        assert "--headless" not in head.argv
        assert "--headless" in follower.argv
        for number, command in enumerate((head, follower)):
            assert value(command.argv, "--node-rank") == str(number)
            assert value(command.argv, "--nnodes") == "2"
            assert value(command.argv, "--master-addr") == "10.0.0.1"
            assert value(command.argv, "--master-port") == "7300"
            assert "--enable-expert-parallel" in command.argv
        assert follower.env["VLLM_HOST_IP"] == "10.0.0.2"

    def test_data_parallel_ranks_over_nodes(self) -> None:
        spread = launch(self.engine, parallel=Parallel(data=4), ranks=TWO)
        head, follower = self.engine.commands(spread)
        assert "--data-parallel-start-rank" not in head.argv
        assert value(follower.argv, "--data-parallel-start-rank") == "2"
        assert value(follower.argv, "--data-parallel-size-local") == "2"
        source = self.engine.kv_source(spread)
        assert isinstance(source, KvSource)
        assert source.endpoints == (
            *("tcp://127.0.0.1:7100", "tcp://127.0.0.1:7101"),
            *("tcp://10.0.0.2:7102", "tcp://10.0.0.2:7103"),
        )
        # The sidecar on the head asks the ranks of the other node too.
        assert '"replay_endpoint":"tcp://*:7200"' in value(follower.argv, "--kv-events-config")

    def test_data_parallel_on_one_node_takes_a_port_per_rank(self) -> None:
        apart = launch(self.engine, "decode", parallel=Parallel(data=2), disaggregated=True)
        assert self.engine.port_needs("decode", Parallel(data=2), disaggregated=True) == {
            "http": 1,
            "kv_events": 2,
            "kv_replay": 2,
            "nixl": 2,
            "master": 1,
        }
        assert value(self.engine.commands(apart)[0].argv, "--data-parallel-size") == "2"

    def test_uneven_spread_is_refused(self) -> None:
        with pytest.raises(PlacementError, match="3 data-parallel ranks"):
            self.engine.commands(launch(self.engine, parallel=Parallel(data=3), ranks=TWO))

    @pytest.mark.parametrize(("role", "kv_role"), [("prefill", "kv_producer"), ("decode", "kv_consumer")])
    def test_roles_apart_have_a_reachable_side_channel(self, role: Role, kv_role: str) -> None:
        (command,) = self.engine.commands(launch(self.engine, role, disaggregated=True))
        transfer = json.loads(value(command.argv, "--kv-transfer-config"))
        assert transfer == {"kv_connector": "NixlConnector", "kv_role": kv_role}
        assert command.env["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "10.0.0.1"
        assert command.env["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "7300"

    def test_an_engine_for_either_role_is_told_so(self) -> None:
        (command,) = self.engine.commands(
            launch(self.engine, "prefill", disaggregated=True, transfer="nixl_both")
        )
        transfer = json.loads(value(command.argv, "--kv-transfer-config"))
        assert transfer == {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
        assert command.env["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "7300"

    def test_no_events_when_not_wanted(self) -> None:
        quiet = launch(self.engine, kv_events=False)
        assert self.engine.kv_source(quiet) is None
        assert "--kv-events-config" not in self.engine.commands(quiet)[0].argv

    def test_cpu_build_sees_no_gpu_variable(self) -> None:
        ranks = (Rank("n1", "127.0.0.1"),)
        assert "CUDA_VISIBLE_DEVICES" not in self.engine.commands(launch(self.engine, ranks=ranks))[0].env

    def test_events_go_to_ports_where_the_run_directory_is_not_seen(self) -> None:
        boxed = launch(self.engine, environment=EngineEnvironment(container="i.sif"))
        events = json.loads(value(self.engine.commands(boxed)[0].argv, "--kv-events-config"))
        assert (events["endpoint"], events["replay_endpoint"]) == ("tcp://*:7100", "tcp://127.0.0.1:7200")
        source = self.engine.kv_source(boxed)
        assert isinstance(source, KvSource)
        assert source.endpoints == ("tcp://127.0.0.1:7100",)

    def test_mooncake_has_a_bootstrap_server_at_prefill_and_no_side_channel(self) -> None:
        sides: dict[Role, Command] = {}
        roles: tuple[Role, ...] = ("prefill", "decode")
        for role in roles:
            apart = launch(self.engine, role, disaggregated=True, transfer="mooncake_tcp")
            sides[role] = self.engine.commands(apart)[0]
            assert "nixl" not in apart.ports
        prefill, decode = (json.loads(value(c.argv, "--kv-transfer-config")) for c in sides.values())
        extra = {"mooncake_protocol": "tcp"}
        assert prefill == {
            "kv_connector": "MooncakeConnector",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": extra,
        }
        assert decode["kv_role"] == "kv_consumer"
        assert sides["prefill"].env["VLLM_MOONCAKE_BOOTSTRAP_PORT"] == "7300"
        assert "VLLM_MOONCAKE_BOOTSTRAP_PORT" not in sides["decode"].env
        assert not any(name.startswith("VLLM_NIXL") for side in sides.values() for name in side.env)


class TestSglang:
    engine = catalog.get("sglang")

    def test_one_node(self) -> None:
        (command,) = self.engine.commands(launch(self.engine))
        assert command.argv[:4] == ("sglang", "serve", "--model-path", "/m")
        assert value(command.argv, "--page-size") == "64"
        assert "--enable-metrics" in command.argv
        assert "--disaggregation-mode" not in command.argv
        events = json.loads(value(command.argv, "--kv-events-config"))
        assert events["publisher"] == "zmq"
        source = self.engine.kv_source(launch(self.engine))
        unix = "ipc://sockets/7000"
        assert source == KvSource((f"{unix}.kv",), (f"{unix}.replay",), "kv-events")

    def test_python_form(self) -> None:
        environment = EngineEnvironment(python="/p")
        (command,) = self.engine.commands(launch(self.engine, environment=environment))
        assert command.argv[:4] == ("/p", "-m", "sglang.launch_server", "--model-path")

    def test_events_are_for_the_sidecar_beside_it_alone(self) -> None:
        """They hold the tokens of all prompts; the engine would bind a wildcard by itself."""
        (command,) = self.engine.commands(launch(self.engine))
        events = json.loads(value(command.argv, "--kv-events-config"))
        assert events["bind"] is True
        assert events["endpoint"].startswith("ipc://sockets/")
        assert events["replay_endpoint"].startswith("ipc://sockets/")
        boxed = launch(self.engine, environment=EngineEnvironment(container="i.sif"))
        events = json.loads(value(self.engine.commands(boxed)[0].argv, "--kv-events-config"))
        assert events["endpoint"] == "tcp://127.0.0.1:7100"
        assert events["replay_endpoint"] == "tcp://127.0.0.1:7200"

    def test_the_transfer_is_the_recipes(self) -> None:
        for transfer, told in (("", "nixl"), ("mooncake", "mooncake")):
            apart = launch(self.engine, "decode", disaggregated=True, transfer=transfer)
            assert value(self.engine.commands(apart)[0].argv, "--disaggregation-transfer-backend") == told

    def test_nodes_meet_at_the_head(self) -> None:
        sizes = Parallel(tensor=4, expert=2)
        spread = launch(self.engine, parallel=sizes, ranks=TWO)
        assert self.engine.port_needs("aggregated", sizes, disaggregated=False)["dist_init"] == 8
        for number, command in enumerate(self.engine.commands(spread)):
            assert value(command.argv, "--node-rank") == str(number)
            assert value(command.argv, "--dist-init-addr") == "10.0.0.1:7300"
            assert value(command.argv, "--host") == TWO[number].address
            assert value(command.argv, "--ep-size") == "2"
        with pytest.raises(PlacementError, match="evenly"):
            self.engine.commands(launch(self.engine, parallel=Parallel(tensor=3), ranks=TWO))

    def test_data_parallel_ranks_over_nodes_are_refused_as_the_engine_does(self) -> None:
        sizes = Parallel(tensor=2, data=2)
        with pytest.raises(PlacementError, match="data-parallel ranks over 2 nodes"):
            self.engine.commands(launch(self.engine, parallel=sizes, ranks=TWO))
        one = launch(self.engine, parallel=sizes)
        source = self.engine.kv_source(one)
        assert isinstance(source, KvSource)
        assert source.endpoints == ("tcp://127.0.0.1:7100", "tcp://127.0.0.1:7101")

    def test_prefill_has_a_bootstrap_server(self) -> None:
        (command,) = self.engine.commands(launch(self.engine, "prefill", disaggregated=True))
        assert value(command.argv, "--disaggregation-mode") == "prefill"
        assert value(command.argv, "--disaggregation-transfer-backend") == "nixl"
        assert value(command.argv, "--disaggregation-bootstrap-port") == "7300"
        assert command.env["SGLANG_DISAGGREGATION_WAITING_TIMEOUT"] == "120"

    def test_decode_forgets_a_prefill_that_is_gone_before_it_can_be_back(self) -> None:
        """One back on its port before that is taken for the old one: every request would fail for minutes."""
        (command,) = self.engine.commands(launch(self.engine, "decode", disaggregated=True))
        assert command.env["SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL"] == "2"

    def test_decode_has_events_only_with_a_prefix_cache(self) -> None:
        plain = launch(self.engine, "decode", disaggregated=True)
        assert self.engine.kv_source(plain) is None
        (command,) = self.engine.commands(plain)
        assert not {"--kv-events-config", "--disaggregation-bootstrap-port"} & set(command.argv)
        cached = replace(plain, args={"disaggregation_decode_enable_radix_cache": True})
        assert self.engine.kv_source(cached) is not None

    def test_recipe_may_choose_timeouts(self) -> None:
        env = {"SGLANG_DISAGGREGATION_WAITING_TIMEOUT": "60"}
        (command,) = self.engine.commands(launch(self.engine, "decode", disaggregated=True, env=env))
        assert command.env["SGLANG_DISAGGREGATION_WAITING_TIMEOUT"] == "60"


class TestTrtllm:
    engine = catalog.get("trtllm")

    def settings(self, **changes: Any) -> dict[str, Any]:
        role: Role = changes.pop("role", "aggregated")
        (command,) = self.engine.commands(launch(self.engine, role, **changes))
        path = value(command.argv, "--config")
        assert path == f"specs/trtllm-{role}-0.yaml"
        found: dict[str, Any] = json.loads(command.files[path])
        return found

    def test_one_node(self) -> None:
        args: Mapping[str, ArgValue] = {"max-seq-len": 4096, "stream_interval": 2, "left_out": None}
        (command,) = self.engine.commands(
            launch(self.engine, parallel=Parallel(tensor=2, expert=2), args=args)
        )
        assert command.argv[:2] == ("trtllm-serve", "/m")
        assert value(command.argv, "--tp_size") == value(command.argv, "--ep_size") == "2"
        assert value(command.argv, "--max_seq_len") == "4096"
        assert command.env == {"CUDA_VISIBLE_DEVICES": "0,1"}
        assert self.settings(args=args) == {
            "enable_iter_perf_stats": True,
            "kv_cache_config": {"enable_block_reuse": True, "event_buffer_max_size": 16384},
            "stream_interval": 2,
        }

    def test_recipe_adds_to_sections(self) -> None:
        found = self.settings(args={"kv_cache_config": {"tokens_per_block": 64}}, kv_events=False)
        assert found["kv_cache_config"] == {"enable_block_reuse": True, "tokens_per_block": 64}

    def test_context_workers_have_a_transceiver_and_no_overlap(self) -> None:
        found = self.settings(role="prefill", disaggregated=True, args={"max_seq_len": 8192})
        assert found["disable_overlap_scheduler"] is True
        assert found["cache_transceiver_config"] == {
            "backend": "NIXL",
            "kv_transfer_timeout_ms": 60000,
            "max_tokens_in_buffer": 8192,
        }
        decode = self.settings(role="decode", disaggregated=True)
        assert "disable_overlap_scheduler" not in decode
        assert "max_tokens_in_buffer" not in decode["cache_transceiver_config"]

    def test_nodes_are_one_mpi_world_started_on_the_head(self) -> None:
        spread = launch(self.engine, parallel=Parallel(tensor=4), ranks=TWO, env={"B": "1", "A": "2"})
        (command,) = self.engine.commands(spread)
        assert command.argv[:9] == (
            *("mpirun", "-n", "4", "--host", "10.0.0.1:2,10.0.0.2:2", "-x", "A", "-x", "B"),
        )
        start = command.argv.index("trtllm-llmapi-launch")
        assert command.argv[start + 1] == "trtllm-serve"

    def test_ranks_on_other_nodes_see_their_gpus_only_and_carry_the_run(self) -> None:
        second = tuple(replace(rank, gpus=(2, 3)) for rank in TWO)
        (command,) = self.engine.commands(launch(self.engine, parallel=Parallel(tensor=4), ranks=second))
        assert command.env["CUDA_VISIBLE_DEVICES"] == "2,3"
        taken_along = {command.argv[at + 1] for at, word in enumerate(command.argv) if word == "-x"}
        assert taken_along >= {"CUDA_VISIBLE_DEVICES", "DYNCTL_RUN", "DYNCTL_PROCESS", "DYNCTL_INCARNATION"}
        apart = (TWO[0], replace(TWO[1], gpus=(2, 3)))
        with pytest.raises(PlacementError, match="same indices"):
            self.engine.commands(launch(self.engine, parallel=Parallel(tensor=4), ranks=apart))

    def test_uneven_nodes_are_refused(self) -> None:
        with pytest.raises(PlacementError, match="same number of GPUs"):
            self.engine.commands(launch(self.engine, parallel=Parallel(tensor=3), ranks=TWO))

    def test_events_are_polled(self) -> None:
        found = self.engine.kv_source(launch(self.engine))
        assert found == KvPoll(path="/kv_cache_events", block_size=32, timeout_s=60.0)
        assert self.engine.features.kv_events == "http-poll"

    @pytest.mark.parametrize("key", ["kv_cache_config", "kv-cache-config"])
    @pytest.mark.parametrize("size", [64, "64"])
    def test_block_size_is_the_recipes(self, key: str, size: int | str) -> None:
        found = self.engine.kv_source(launch(self.engine, args={key: {"tokens_per_block": size}}))
        assert isinstance(found, KvPoll)
        assert found.block_size == 64

    @pytest.mark.parametrize(
        "cache", [{"event_buffer_max_size": 0}, {"enable_block_reuse": False}, "nothing", None]
    )
    def test_engine_that_keeps_no_events_is_not_polled(self, cache: Any) -> None:
        found = self.engine.kv_source(launch(self.engine, args={"kv_cache_config": cache}))
        assert (found is None) == (cache is not None)
        assert self.engine.kv_source(launch(self.engine, kv_events=False)) is None

    def test_each_start_has_a_reader_of_its_own(self) -> None:
        first, second = (self.engine.kv_reader(4) for _ in range(2))
        assert first is not second
        with pytest.raises(CodecError):
            first.read(b"\x90", 0.0)


class TestExternal:
    engine = catalog.get("external")

    def test_nothing_is_started(self) -> None:
        running = launch(self.engine)
        assert self.engine.commands(running) == ()
        assert running.ports == {}
        assert not self.engine.features.launches
        assert not self.engine.known_args("anything")

    def test_events_come_from_where_the_recipe_says(self) -> None:
        source = KvSource(("tcp://10.0.0.5:5557",), ())
        assert self.engine.kv_source(launch(self.engine, external_kv=source)) is source
        assert self.engine.kv_source(launch(self.engine)) is None

    def test_sound_events_of_both_dialects_are_read(self) -> None:
        for name in ("external", "vllm", "sglang", "mocker"):
            (batch,) = catalog.get(name).kv_reader(0).read(msgspec.msgpack.encode([1.0, [], 2]), 9.0)
            assert (batch.rank, batch.timestamp) == (2, 1.0)

    def test_fields_of_all_engines_are_kept_from_clients(self) -> None:
        assert {"kv_transfer_params", "bootstrap_room", "disaggregated_params"} <= self.engine.client_fields
