"""What engines are known to refuse, found before anything starts: each with its reason and recipe field."""

from __future__ import annotations

from typing import Any

import pytest

from dynctl.engines import catalog
from dynctl.engines.base import ArgValue, Finding, ModelFacts, Parallel, RoleSettings
from dynctl.engines.checks import Setting, check_pair
from dynctl.protocol.instances import Role

FACTS = ModelFacts(kv_heads=8, attention_heads=64, layers=80, max_position=8192)


def role(name: Role = "aggregated", args: dict[str, ArgValue] | None = None, **changes: Any) -> RoleSettings:
    settings: dict[str, Any] = {
        "role": name,
        "replicas": 1,
        "parallel": Parallel(),
        "args": args or {},
        "env": {},
        "model": "org/m",
    }
    return RoleSettings(**{**settings, **changes})


def pair(
    prefill: dict[str, ArgValue] | None = None, decode: dict[str, ArgValue] | None = None, **changes: Any
) -> list[RoleSettings]:
    return [role("prefill", prefill, **changes), role("decode", decode, **changes)]


def found(engine: str, roles: list[RoleSettings], facts: ModelFacts | None = None) -> list[Finding]:
    return catalog.get(engine).check(roles, facts)


def fields(engine: str, roles: list[RoleSettings], facts: ModelFacts | None = None) -> list[tuple[str, str]]:
    return [(finding.level, finding.field) for finding in found(engine, roles, facts)]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_sound_recipes_give_no_finding(engine: str) -> None:
    assert fields(engine, [role(parallel=Parallel(tensor=8))], FACTS) == []
    assert fields(engine, pair({"dtype": "bfloat16"}, {"dtype": "bfloat16"}), FACTS) == []


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
class TestEveryEngine:
    def test_different_model_strings(self, engine: str) -> None:
        roles = [role("prefill", {"max_seq_len": 1}), role("decode", {"max_seq_len": 1}, model="/models/m")]
        (finding,) = [f for f in found(engine, roles) if f.field == "roles.decode.model"]
        assert finding.level == "error"
        assert "'org/m'" in finding.message
        assert "'/models/m'" in finding.message

    def test_different_dtypes(self, engine: str) -> None:
        roles = pair({"dtype": "float16"}, {"dtype": "bfloat16"})
        assert ("error", "roles.decode.args.dtype") in fields(engine, roles)
        assert ("error", "roles.prefill.args.dtype") in fields(engine, pair({"dtype": "float16"}))
        same = fields(engine, pair({"dtype": "auto"}))
        assert not [path for _, path in same if path.endswith("dtype")]

    @pytest.mark.parametrize(
        ("tensor", "level"),
        [(3, "error"), (8, None), (16, "warning"), (5, "error"), (128, "error")],
    )
    def test_tensor_size_against_heads(self, engine: str, tensor: int, level: str | None) -> None:
        levels = [f.level for f in found(engine, [role(parallel=Parallel(tensor=tensor))], FACTS)]
        assert levels == ([level] if level else [])

    def test_tensor_size_against_kv_heads_that_it_does_not_divide(self, engine: str) -> None:
        facts = ModelFacts(kv_heads=8, attention_heads=24)
        (finding,) = found(engine, [role(parallel=Parallel(tensor=12))], facts)
        assert (finding.level, finding.field) == ("error", "roles.aggregated.tensor_parallel")
        assert "8 KV heads" in finding.message

    def test_more_stages_than_layers(self, engine: str) -> None:
        roles = [role(parallel=Parallel(pipeline=4))]
        assert fields(engine, roles, ModelFacts(layers=2)) == [
            ("error", "roles.aggregated.pipeline_parallel")
        ]

    def test_one_argument_in_two_spellings(self, engine: str) -> None:
        roles = [role(args={"log-level": "info", "log_level": "debug"})]
        assert fields(engine, roles) == [("error", "roles.aggregated.args.log_level")]

    def test_short_form_of_an_owned_argument(self, engine: str) -> None:
        (finding,) = found(engine, [role(args={"served-model": "x"})])
        assert "short form of served-model-name" in finding.message

    def test_environment_that_dynctl_sets(self, engine: str) -> None:
        roles = [role(env={"CUDA_VISIBLE_DEVICES": "0", "HF_HOME": "/x"})]
        assert fields(engine, roles) == [("error", "roles.aggregated.env.CUDA_VISIBLE_DEVICES")]


class TestVllm:
    @pytest.mark.parametrize(
        ("args", "env", "wrong"),
        [
            ({"block-size": 16}, {}, False),
            ({"block_size": 128}, {}, False),
            ({"block-size": None}, {}, False),
            ({"block-size": 24}, {}, True),
            ({"block-size": 0}, {}, True),
            ({"block-size": True}, {}, True),
            ({"block-size": "x"}, {}, True),
            ({"block-size": "32"}, {"VLLM_CPU_KVCACHE_SPACE": "1"}, False),
            ({"block-size": 16}, {"VLLM_CPU_KVCACHE_SPACE": "1"}, True),
        ],
    )
    def test_block_sizes(self, args: dict[str, ArgValue], env: dict[str, str], wrong: bool) -> None:
        assert bool(found("vllm", [role(args=args, env=env)])) is wrong

    def test_cache_smaller_than_one_request(self) -> None:
        args: dict[str, ArgValue] = {"num-gpu-blocks-override": 10, "block-size": 32, "max-model-len": 321}
        assert fields("vllm", [role(args=args)]) == [
            ("error", "roles.aggregated.args.num-gpu-blocks-override")
        ]
        assert fields("vllm", [role(args={**args, "max-model-len": 320})]) == []

    def test_context_above_the_models(self) -> None:
        roles = [role(args={"max-model-len": 16384})]
        assert fields("vllm", roles, FACTS) == [("warning", "roles.aggregated.args.max-model-len")]

    @pytest.mark.parametrize("name", ["data-parallel-rank", "data_parallel_external_lb"])
    def test_external_balancing(self, name: str) -> None:
        (finding,) = found("vllm", [role(args={name: 1})])
        assert finding.field == f"roles.aggregated.args.{name}"
        assert "dense models" in finding.message

    @pytest.mark.parametrize(
        ("algorithm", "env", "wrong"),
        [
            ("sha256_cbor", {}, False),
            ("md5", {}, True),
            ("xxhash", {}, True),
            ("xxhash", {"PYTHONHASHSEED": "0"}, False),
        ],
    )
    def test_hash_algorithms(self, algorithm: str, env: dict[str, str], wrong: bool) -> None:
        roles = [role(args={"prefix-caching-hash-algo": algorithm}, env=env)]
        assert bool(found("vllm", roles)) is wrong

    @pytest.mark.parametrize(
        ("args", "level"),
        [
            ({"block-size": 32}, "error"),
            ({"kv-cache-dtype": "fp8"}, "error"),
            ({"quantization": "awq"}, "error"),
            ({"prefix_caching_hash_algo": "sha256_cbor"}, "warning"),
        ],
    )
    def test_prefill_and_decode_differ(self, args: dict[str, ArgValue], level: str) -> None:
        (name,) = args
        assert fields("vllm", pair(None, args)) == [(level, f"roles.decode.args.{name}")]
        assert fields("vllm", pair(args, args)) == []

    @pytest.mark.parametrize(
        ("prefill", "decode", "facts", "args", "field"),
        [
            (4, 8, FACTS, {}, None),
            (8, 4, FACTS, {}, None),
            (2, 3, None, {}, "roles.decode.tensor_parallel"),
            (4, 2, ModelFacts(kv_heads=2, attention_heads=64), {}, "roles.prefill.tensor_parallel"),
            (4, 8, None, {"kv-cache-dtype": "nvfp4"}, "roles.decode.tensor_parallel"),
        ],
    )
    def test_hand_over_between_sizes(
        self,
        prefill: int,
        decode: int,
        facts: ModelFacts | None,
        args: dict[str, ArgValue],
        field: str | None,
    ) -> None:
        roles = [
            role("prefill", args, parallel=Parallel(tensor=prefill)),
            role("decode", args, parallel=Parallel(tensor=decode)),
        ]
        errors = [f.field for f in found("vllm", roles, facts) if f.level == "error"]
        assert errors == ([field] if field else [])


class TestSglang:
    @pytest.mark.parametrize(
        ("size", "levels"),
        [(64, []), (None, []), (48, ["error"]), ("x", ["error"]), (1, ["warning"])],
    )
    def test_page_sizes(self, size: ArgValue, levels: list[str]) -> None:
        assert [f.level for f in found("sglang", [role(args={"page-size": size})])] == levels

    def test_pages_of_the_default_size_agree(self) -> None:
        assert fields("sglang", pair({"page-size": 64})) == []
        assert fields("sglang", pair({"page-size": 32})) == [("error", "roles.prefill.args.page-size")]

    def test_attention_data_parallelism(self) -> None:
        roles = [role(args={"enable-dp-attention": True})]
        assert fields("sglang", roles) == [("error", "roles.aggregated.args.enable-dp-attention")]

    def test_decode_cache_both_on_and_off(self) -> None:
        args: dict[str, ArgValue] = {
            "disable-radix-cache": True,
            "disaggregation-decode-enable-radix-cache": True,
        }
        assert fields("sglang", pair(None, args)) == [("error", "roles.decode.args.disable-radix-cache")]
        assert fields("sglang", pair(None, {**args, "disable-radix-cache": False})) == []


class TestTrtllm:
    def transceiver(self, tokens: ArgValue, **args: ArgValue) -> dict[str, ArgValue]:
        return {"cache_transceiver_config": {"max_tokens_in_buffer": tokens}, **args}

    @pytest.mark.parametrize(
        ("tokens", "length", "levels"),
        [
            (8192, 8192, []),
            (4096, 8192, ["error", "error"]),
            ("x", 8192, ["error", "error"]),
            (None, 8192, []),
            (None, None, ["warning", "warning"]),
        ],
    )
    def test_buffer_against_the_longest_input(
        self, tokens: ArgValue, length: ArgValue, levels: list[str]
    ) -> None:
        args = self.transceiver(tokens, max_seq_len=length)
        findings = found("trtllm", pair(args, args))
        assert [f.level for f in findings] == levels
        assert all(f.field.endswith("cache_transceiver_config.max_tokens_in_buffer") for f in findings)

    def test_longest_input_is_the_models_when_nothing_says(self) -> None:
        args = self.transceiver(4096)
        messages = [f.message for f in found("trtllm", pair(args, args), FACTS)]
        assert len(messages) == 2
        assert "8192 tokens" in messages[0]

    def test_an_input_limit_is_enough(self) -> None:
        args = self.transceiver(4096, max_seq_len=8192, max_input_len=4096)
        assert found("trtllm", pair(args, args)) == []

    @pytest.mark.parametrize("key", ["dtype", "tokens_per_block"])
    def test_caches_differ(self, key: str) -> None:
        args: dict[str, ArgValue] = {"max_seq_len": 1, "kv_cache_config": {key: 64}}
        path = f"roles.decode.args.kv_cache_config.{key}"
        assert fields("trtllm", pair({"max_seq_len": 1}, args)) == [("error", path)]

    def test_single_role_settings(self) -> None:
        args: dict[str, ArgValue] = {
            "enable_attention_dp": True,
            "kv_cache_config": {"tokens_per_block": 48},
        }
        roles = [role(args=args, parallel=Parallel(data=2))]
        assert fields("trtllm", roles) == [
            ("error", "roles.aggregated.data_parallel"),
            ("warning", "roles.aggregated.args.enable_attention_dp"),
            ("error", "roles.aggregated.args.kv_cache_config.tokens_per_block"),
        ]

    def test_beams_with_roles_apart(self) -> None:
        args: dict[str, ArgValue] = {"max_seq_len": 1, "max_beam_width": 2}
        assert ("error", "roles.decode.args.max_beam_width") in fields("trtllm", pair(args, args))


class TestExternal:
    @pytest.mark.parametrize("url", ["http://10.0.0.5:8000", "https://host/"])
    def test_sound_addresses(self, url: str) -> None:
        assert fields("external", [role(urls=(url,))]) == []

    @pytest.mark.parametrize(
        "url",
        ["10.0.0.5:8000", "ftp://h:1", "http://", "http://h:x", "http://h/v1", "http://u@h", "http://h:0"],
    )
    def test_unsound_addresses(self, url: str) -> None:
        (finding,) = found("external", [role(urls=("http://ok:1", url))])
        assert finding.field == "roles.aggregated.urls.1"
        assert "http://host:port" in finding.message

    def test_no_addresses_other_roles_and_settings_without_effect(self) -> None:
        roles = [role("decode", {"x": 1}, env={"Y": "1"})]
        assert [path for _, path in fields("external", roles)] == [
            *("roles.decode", "roles.decode.urls", "roles.decode.args", "roles.decode.env"),
        ]


def test_one_role_has_nothing_to_agree_on() -> None:
    assert check_pair([role()], (Setting(("dtype",), "auto", "reason"),)) == []
