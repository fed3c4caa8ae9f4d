"""How installed engines are asked for version and flags, and what their answers mean."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dynctl import hostfacts
from dynctl.engines import catalog
from dynctl.engines.base import EngineEnvironment, Inquiry
from dynctl.engines.inquiry import Doubt, doubts, version_of

PLAIN = EngineEnvironment()
VENV = EngineEnvironment(venv="/opt/e/")
IMAGE = EngineEnvironment(container="/i.sif")


def inquiry(engine: str, environment: EngineEnvironment = PLAIN) -> Inquiry:
    found = catalog.get(engine).inquiry(environment)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("engine", "environment", "program", "help_"),
    [
        ("vllm", EngineEnvironment(), "vllm", "vllm serve --help=all"),
        ("vllm", VENV, "/opt/e/bin/vllm", "/opt/e/bin/vllm serve --help=all"),
        ("sglang", VENV, "/opt/e/bin/sglang", "/opt/e/bin/sglang serve --help"),
        ("sglang", EngineEnvironment(python="/p"), "/p", "/p -m sglang.launch_server --help"),
        ("trtllm", VENV, "/opt/e/bin/trtllm-serve", "/opt/e/bin/trtllm-serve serve --help"),
        ("trtllm", IMAGE, "apptainer", "apptainer exec --nv /i.sif trtllm-serve serve --help"),
        ("mocker", EngineEnvironment(), sys.executable, f"{sys.executable} -m dynctl.mocker --help"),
    ],
)
def test_what_is_asked(engine: str, environment: EngineEnvironment, program: str, help_: str) -> None:
    asked = inquiry(engine, environment)
    assert (asked.program, " ".join(asked.help)) == (program, help_)


def test_the_version_comes_from_the_python_beside_the_engine() -> None:
    assert inquiry("vllm", VENV).version[:2] == ("/opt/e/bin/python", "-c")
    assert inquiry("vllm").version == ("vllm", "--version")
    assert inquiry("trtllm", IMAGE).version[:4] == ("apptainer", "exec", "/i.sif", "python3")


def test_an_engine_that_already_runs_is_not_asked() -> None:
    assert catalog.get("external").inquiry(EngineEnvironment()) is None
    assert catalog.get("external").command_flags({"x": 1}) == ()


def test_the_version_of_the_first_package_that_is_there() -> None:
    argv = version_of(EngineEnvironment(python=sys.executable), ("no-such-package", "dynctl"))
    told = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True).stdout
    assert hostfacts.version_in(told) == told.strip()


def test_the_mockers_own_help_lists_all_that_a_recipe_may_set() -> None:
    from dynctl.engines.mocker import ARGUMENTS

    asked = inquiry("mocker")
    text = subprocess.run(asked.help, capture_output=True, text=True, timeout=60, check=True).stdout
    listed = hostfacts.flags_in(text, hostfacts.FLAGS)
    given = catalog.get("mocker").command_flags({**dict.fromkeys(ARGUMENTS, 1), "fault-hang": False})
    assert "--no-fault-hang" in given
    assert doubts(given, listed) == []


@pytest.mark.parametrize(
    ("engine", "args", "flags"),
    [
        (
            "vllm",
            {"max_model_len": 1, "enforce-eager": True, "x": None, "y": False},
            "--enforce-eager --max-model-len",
        ),
        ("sglang", {"page_size": 1}, "--page-size"),
        ("trtllm", {"max-batch-size": 1, "kv_cache_config": {}, "moe_config": {}}, "--max_batch_size"),
        ("mocker", {"enable-prefix-caching": False}, "--no-enable-prefix-caching"),
    ],
)
def test_only_what_becomes_a_flag_must_be_listed(engine: str, args: dict[str, object], flags: str) -> None:
    assert catalog.get(engine).command_flags(args) == tuple(flags.split())  # type: ignore[arg-type]


def test_a_flag_that_is_not_listed_names_the_nearest() -> None:
    known = ["--max-model-len", "--block-size", "--max_num_seqs"]
    assert doubts(["--max_model_len", "--max-num-seqs"], known) == []
    assert doubts(["--max-model-lenght", "--qqq"], known) == [
        Doubt("--max-model-lenght", "--max-model-len"),
        Doubt("--qqq", ""),
    ]


def test_the_beginning_of_a_flag_counts_where_the_parser_takes_it() -> None:
    known = ["--max-model-len", "--max-num-seqs"]
    assert doubts(["--max-mo"], known, abbreviates=True) == [Doubt("--max-mo", "--max-model-len", "short")]
    assert doubts(["--max"], known, abbreviates=True)[0].kind == "unknown"
    assert doubts(["--max-mo"], known)[0].kind == "unknown"
