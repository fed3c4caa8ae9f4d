"""Small decisions of the sidecar, and its log lines."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from dynctl.engines.base import EngineInfo
from dynctl.errors import LaunchError, UsageError
from dynctl.observability import logs
from dynctl.protocol.instances import ModelCard
from dynctl.protocol.specs import WorkerSpec
from dynctl.worker.__main__ import main, read_incarnation, read_spec
from dynctl.worker.planes import card_of, reachable, sources_of
from dynctl.worker.process import find_program
from dynctl.worker.readiness import Ready


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def spec(**changes: object) -> WorkerSpec:
    plain = WorkerSpec(
        id="decode-0",
        role="decode",
        index=0,
        node="n",
        backend="external",
        model=ModelCard(name="m"),
        url="http://a:1",
        registry="tcp://a:2",
        keys_file="keys.json",
        bind_host="0.0.0.0",
        events_port=3,
        control_port=4,
    )
    return msgspec.structs.replace(plain, **changes)


@pytest.mark.parametrize(
    ("bound", "seen"),
    [
        ("tcp://0.0.0.0:5", "tcp://10.0.0.1:5"),
        ("tcp://[::]:5", "tcp://10.0.0.1:5"),
        ("tcp://10.0.0.9:5", "tcp://10.0.0.9:5"),
    ],
)
def test_wildcard_endpoint_is_told_by_its_host(bound: str, seen: str) -> None:
    assert reachable(bound, "10.0.0.1") == seen


def test_engine_says_more_than_the_recipe() -> None:
    card = ModelCard(name="m", block_size=8, max_model_len=100, adapters=["x"])
    silent = card_of(card, Ready(EngineInfo(), ("x",)))
    assert silent == card
    told = card_of(card, Ready(EngineInfo(block_size=16, max_model_len=200), ("x", "y")))
    assert (told.block_size, told.max_model_len, told.adapters) == (16, 200, ["x", "y"])


def test_ranks_without_a_replay_socket_have_none() -> None:
    sources = sources_of(spec(kv_endpoints=["a", "b"], kv_replay_endpoints=["c"], kv_topic="t"))
    assert [(s.endpoint, s.replay, s.topic) for s in sources] == [("a", "c", "t"), ("b", "", "t")]


@pytest.mark.parametrize("content", [b"", b"{}", b'{"deployment": 3}'])
def test_broken_spec_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "s.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="not a worker's spec") as caught:
        read_spec(path)
    assert caught.value.where == str(path)


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5"])
def test_incarnation_must_be_a_whole_number(text: str) -> None:
    with pytest.raises(UsageError, match="DYNCTL_INCARNATION"):
        read_incarnation(text)


def test_wrong_call_ends_with_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["worker", "--spec", str(tmp_path / "none.json")])
    assert main() == 2
    assert "cannot read the spec" in capsys.readouterr().err


def test_program_is_found_on_the_engines_own_path(tmp_path: Path) -> None:
    program = tmp_path / "engine"
    program.write_text("")
    with pytest.raises(LaunchError, match="'engine' does not exist"):
        find_program("engine", "/", str(tmp_path))
    program.chmod(0o755)
    assert find_program("engine", "/", str(tmp_path)) == str(program)
    assert find_program("./engine", str(tmp_path), "") == f"{tmp_path}/./engine"


def emit(monkeypatch: pytest.MonkeyPatch, form: str, level: str = "INFO") -> list[str]:
    monkeypatch.setenv(logs.ENV_FORMAT, form)
    monkeypatch.setenv(logs.ENV_LEVEL, level)
    stream = io.StringIO()
    logs.setup("decode-0", stream)
    logger = logging.getLogger("dynctl.part")
    logger.debug("quiet")
    logger.info("lease.taken id=%s", "x")
    try:
        raise ValueError("why")
    except ValueError:
        logger.exception("it.broke")
    return stream.getvalue().splitlines()


def test_plain_log_line_has_time_level_process_and_event(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = emit(monkeypatch, "plain", "nonsense")
    time, level, process, name, *event = lines[0].split()
    assert time.endswith("Z")
    assert len(time) == 24
    assert (level, process, name, event) == ("INFO", "decode-0", "dynctl.part", ["lease.taken", "id=x"])
    assert lines[-1] == "ValueError: why"


def test_json_log_line_is_one_object(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = emit(monkeypatch, "json", "debug")
    assert [json.loads(line)["event"] for line in lines] == ["quiet", "lease.taken id=x", "it.broke"]
    assert "ValueError: why" in json.loads(lines[-1])["traceback"]
    assert json.loads(lines[0])["process"] == "decode-0"


def test_timestamp_is_utc_with_milliseconds() -> None:
    assert logs.timestamp(0.9996) == "1970-01-01T00:00:00.999Z"
