"""dynctl's command lines against the engines' own argument parsers, run in their environments."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dynctl.engines import catalog
from dynctl.engines.base import ArgValue, EngineLaunch, ModelRef, Parallel, Rank
from dynctl.protocol.instances import Role
from tests.engines import environment

SCRIPT = Path(__file__).with_name("engine_parsers.py")
RANKS = (Rank("n1", "10.0.0.1", (0, 1, 2, 3)), Rank("n2", "10.0.0.2", (0, 1, 2, 3)))
TEMPLATE = environment.tiny_model_folder() / "chat_template.jinja"
FULL = ModelRef("org/m", "m", revision="main", tokenizer="org/t", chat_template=str(TEMPLATE))
PLAIN = ModelRef("org/m", "m")


def launches(engine: str, args: dict[str, ArgValue]) -> list[EngineLaunch]:
    """One of each kind: small, sized, over nodes, prefill, decode."""

    def one(role: Role, parallel: Parallel, nodes: int = 1, **changes: Any) -> EngineLaunch:
        apart = role != "aggregated"
        needs = catalog.get(engine).port_needs(role, parallel, disaggregated=apart)
        base = EngineLaunch(
            model=PLAIN,
            role=role,
            index=0,
            parallel=parallel,
            ranks=RANKS[:nodes],
            ports={name: 7000 + 100 * number for number, name in enumerate(needs)},
            disaggregated=apart,
        )
        return replace(base, **changes)

    return [
        one("aggregated", Parallel()),
        one("aggregated", Parallel(tensor=2, pipeline=2), model=FULL, args=args),
        one("aggregated", Parallel(tensor=8, expert=8), nodes=2),
        one("aggregated", Parallel(data=4, tensor=2), nodes=2 if engine == "vllm" else 1),
        one("prefill", Parallel(tensor=4)),
        one("decode", Parallel(data=2), kv_events=False),
    ]


VLLM_ARGS: dict[str, ArgValue] = {
    "max_model_len": 16384,
    "enforce-eager": True,
    "gpu-memory-utilization": 0.9,
    "speculative-config": {"method": "ngram", "num_speculative_tokens": 2},
    "enable-lora": True,
    "lora-modules": ["one=/lora/one", "two=/lora/two"],
}
SGLANG_ARGS: dict[str, ArgValue] = {
    "context_length": 16384,
    "mem-fraction-static": 0.8,
    "disable-radix-cache": True,
    "page-size": 32,
}


def command_lines(engine: str, args: dict[str, ArgValue]) -> list[list[str]]:
    commands = [
        command.argv for launch in launches(engine, args) for command in catalog.get(engine).commands(launch)
    ]
    return [list(argv[2:]) for argv in commands]


@cache
def answer(engine: str) -> dict[str, Any]:
    """The parser's verdict on all command lines, and on two that are wrong; it runs once."""
    venv = environment.vllm_venv() if engine == "vllm" else environment.sglang_venv()
    args = VLLM_ARGS if engine == "vllm" else SGLANG_ARGS
    lists = [
        *command_lines(engine, args),
        ["--model", "m", "--no-such-flag"],
        ["--model", "m", "--port", "many"],
    ]
    done = subprocess.run(
        [str(venv / "bin" / "python"), str(SCRIPT), engine],
        input=json.dumps(lists),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert found, (done.stdout + done.stderr)[-3000:]
    parsed: dict[str, Any] = json.loads(found[0].removeprefix("ANSWER "))
    return parsed


def owned_spellings(engine: str) -> set[str]:
    return {name.replace("_", "-") for name in catalog.get(engine).owned_args}


def spellings(options: Iterable[str]) -> set[str]:
    return {option.lstrip("-").replace("_", "-") for option in options}


def missing_aliases(engine: str) -> list[set[str]]:
    """Options of which dynctl owns one spelling but not all."""
    owned = owned_spellings(engine)
    groups = [spellings(group) for group in answer(engine)["options"]]
    return [group - owned for group in groups if group & owned and group - owned]


def not_options(engine: str) -> set[str]:
    """Owned names that the parser does not know: typing errors, or flags of another release."""
    known = set().union(*(spellings(group) for group in answer(engine)["options"]))
    return owned_spellings(engine) - known


@pytest.mark.vllm
@pytest.mark.timeout(300)
class TestVllm:
    def test_parser_takes_every_command_line(self) -> None:
        *good, unknown, wrong = answer("vllm")["parsed"]
        assert [found["error"] for found in good if "error" in found] == []
        assert "--no-such-flag" in unknown["error"]
        assert "error" in wrong

    def test_values_arrive(self) -> None:
        single, sized, head, follower, *_ = answer("vllm")["parsed"]
        assert single["model_tag"] == "org/m"
        assert "'ipc://sockets/7000.kv'" in single["kv_events_config"]
        assert (sized["tensor_parallel_size"], sized["max_model_len"]) == ("2", "16384")
        assert (head["nnodes"], follower["node_rank"], follower["headless"]) == ("2", "1", "True")

    def test_owned_arguments_are_owned_under_every_spelling(self) -> None:
        assert missing_aliases("vllm") == []
        assert not_options("vllm") == {"model-tag"}  # its positional argument


@pytest.mark.sglang
@pytest.mark.timeout(300)
class TestSglang:
    def test_parser_takes_every_command_line(self) -> None:
        *good, unknown, wrong = answer("sglang")["parsed"]
        assert [found["error"] for found in good if "error" in found] == []
        assert "--no-such-flag" in unknown["error"]
        assert "error" in wrong

    def test_values_arrive(self) -> None:
        single, sized, *_ = answer("sglang")["parsed"]
        assert (single["model_path"], single["page_size"]) == ("org/m", "64")
        assert (sized["tp_size"], sized["context_length"], sized["page_size"]) == ("2", "16384", "32")

    def test_owned_arguments_are_owned_under_every_spelling(self) -> None:
        assert missing_aliases("sglang") == []
        assert not_options("sglang") == {"tp", "pp", "dp"}  # short forms that people write
