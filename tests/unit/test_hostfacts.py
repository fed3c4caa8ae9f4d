"""The collector: what it reads from recorded outputs, and that nothing keeps it from telling it."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dynctl import hostfacts
from dynctl.errors import CodecError
from dynctl.protocol.hosts import HostQuestion, read_facts

SCRIPT = Path(hostfacts.__file__)
GPUS = """\
0, NVIDIA H100 80GB HBM3, 81559, 70123, 550.54.15, GPU-aaaa
1, NVIDIA H100 80GB HBM3, 81559, [N/A], 550.54.15, GPU-bbbb
"""
APPS = """\
GPU-aaaa, 4711, /opt/my, venv/bin/python3, 70000
GPU-aaaa, 4712, [Not Found], [N/A]
GPU-gone, 1, x, 1
"""
VLLM_HELP = """\
usage: vllm serve [model_tag] [options]

  Use `--help=all` to show all available flags at once.

options:
  --api-server-count API_SERVER_COUNT, -asc API_SERVER_COUNT
                        How many API server processes to run. See
                        --data-parallel-size and --middleware arguments.
  --enable-log-requests, --no-enable-log-requests
                        Enable logging request information. (default: False)
  --dtype {auto,bfloat16,float,float16,float32,half}
  --convert {auto,classify,embed,none}
  -h, --help            show this help message and exit

ParallelConfig:
  --tensor-parallel-size TENSOR_PARALLEL_SIZE, -tp TENSOR_PARALLEL_SIZE
"""
CLICK_HELP = """\
[TensorRT-LLM] TensorRT-LLM version: 1.2.0
Usage: trtllm-serve serve [OPTIONS] MODEL

Options:
  --tokenizer TEXT                Path | Name of the tokenizer. See --model.
  --tp_size, --tensor_parallel_size INTEGER
                                  Tensor parallelism size.
  --log_level [internal_error|error|warning|info|verbose|debug|trace]
  --enable_chunked_prefill / --no_chunked
  --help                          Show this message and exit.
"""


def collect(question: HostQuestion, *prefix: str, python: str = sys.executable, **environ: str) -> Any:
    """What the script prints, as another host would be asked."""
    done = subprocess.run(
        [*prefix, python, "-", question.to_json()],
        input=SCRIPT.read_bytes(),
        capture_output=True,
        timeout=90,
        check=True,
        env={**os.environ, **environ},
    )
    assert done.stdout.count(b"\n") == 1, done.stdout
    assert done.stderr == b""
    return read_facts(done.stdout)


def test_gpus_and_who_is_on_them() -> None:
    first, second = hostfacts.gpus_in(GPUS, APPS)
    assert (first["name"], first["memory_mib"], first["used_mib"]) == ("NVIDIA H100 80GB HBM3", 81559, 70123)
    assert first["processes"] == [
        {"pid": 4711, "name": "/opt/my, venv/bin/python3", "used_mib": 70000},
        {"pid": 4712, "name": "[Not Found]", "used_mib": 0},
    ]
    assert (second["used_mib"], second["processes"]) == (0, [])
    assert hostfacts.gpus_in("No devices were found\n", "") == []


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        (
            VLLM_HELP,
            "--api-server-count --convert --dtype --enable-log-requests --help --no-enable-log-requests"
            " --tensor-parallel-size",
        ),
        (
            CLICK_HELP,
            "--enable_chunked_prefill --help --log_level --no_chunked --tensor_parallel_size --tokenizer"
            " --tp_size",
        ),
        ("  --[no-]daemon  run apart", "--daemon --no-daemon"),
        ("\x1b[1m  --bold\x1b[0m TEXT", "--bold"),
        ("nothing --here\n", ""),
    ],
)
def test_flags_are_those_that_help_defines_not_those_it_mentions(text: str, flags: str) -> None:
    assert hostfacts.flags_in(text, hostfacts.FLAGS) == flags.split()


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("0.33.0\n", "0.33.0"),
        ("banner 9.9\nvllm 0.32.0+cpu\n", "0.32.0+cpu"),
        ("apptainer version 1.3.1-1.el9", "1.3.1-1.el9"),
        ("slurm-wlm 22.05.8", "22.05.8"),
        ("what?", ""),
    ],
)
def test_versions(text: str, version: str) -> None:
    assert hostfacts.version_in(text) == version


def test_rdma_ports(tmp_path: Path) -> None:
    for device, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        port = tmp_path / device / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    first, second = hostfacts.infiniband(str(tmp_path))
    assert first == {
        "device": "mlx5_0",
        "port": 1,
        "state": "ACTIVE",
        "rate": "400 Gb/sec (4X NDR)",
        "link_layer": "",
    }
    assert second["state"] == "DOWN"


def test_the_innermost_file_system_counts() -> None:
    mounts = ["/dev/a / ext4 rw 0 0", "s:/x /data nfs4 rw 0 0", "/dev/b /data\\040two xfs rw 0 0", "bad"]
    types = [hostfacts.fstype_of(path, mounts) for path in ("/data/m", "/data two/m", "/database", "/data")]
    assert types == ["nfs4", "xfs", "ext4", "nfs4"]


def test_a_fingerprint_changes_with_names_sizes_and_the_config(tmp_path: Path) -> None:
    def model(name: str, weights: bytes = b"12", config: str = "{}") -> str:
        folder = tmp_path / name
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "w.safetensors").write_bytes(weights)
        (folder / "config.json").write_text(config)
        return hostfacts.fingerprint(str(folder))

    same = model("a")
    assert model("b") == same
    assert model("c", weights=b"123") != same
    assert model("d", config="[]") != same
    (tmp_path / "b" / "sub" / "w.safetensors").rename(tmp_path / "b" / "w.safetensors")
    assert hostfacts.fingerprint(str(tmp_path / "b")) != same
    file = tmp_path / "a" / "config.json"
    assert hostfacts.fingerprint(str(file)) == hashlib.sha256(b"{}").hexdigest()


def test_a_file_of_a_model_that_cannot_be_read_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").symlink_to("gone")  # no engine reads it
    assert hostfacts.path_facts(str(tmp_path))["readable"]
    weights = tmp_path / "sub" / "w.safetensors"
    weights.symlink_to("gone")
    told = hostfacts.path_facts(str(tmp_path))
    assert (told["exists"], told["readable"], told["unread"]) == (True, False, str(weights))


def test_an_engine_that_comes_with_dynctl_is_asked_by_the_python_that_has_it() -> None:
    asked = {"argv0": hostfacts.OWN, "version_argv": [hostfacts.OWN, "-c", "print('1.2.3')"]}
    told = hostfacts.engine_of(asked, ["/nowhere/python", sys.executable])
    assert (told["found"], told["version"]) == (sys.executable, "1.2.3")
    assert hostfacts.engine_of(asked, ["/nowhere/python"])["found"] == ""


def test_a_model_of_the_hub_is_found_in_its_cache(tmp_path: Path) -> None:
    folder = tmp_path / "models--org--m"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    facts = collect(HostQuestion(model="org/m"), HF_HUB_CACHE=str(tmp_path))
    assert facts.model_at == str(folder / "snapshots" / "abc")
    assert facts.paths[facts.model_at].is_dir
    assert collect(HostQuestion(model="org/m@v2"), HF_HUB_CACHE=str(tmp_path)).model_at == ""


def test_ports_and_their_holders() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        facts = collect(HostQuestion(ports=(port,)))
    assert port in facts.listening
    assert f"(pid {os.getpid()})" in facts.holders[str(port)]


def test_a_path_below_what_may_not_be_entered_is_not_called_missing(tmp_path: Path) -> None:
    facts = hostfacts.path_facts(str(tmp_path / "none"))
    assert not facts["exists"]
    (tmp_path / "link").symlink_to(tmp_path / "none")
    assert hostfacts.path_facts(str(tmp_path / "link"))["exists"]
    assert not hostfacts.path_facts(str(tmp_path / "link"))["readable"]


@pytest.mark.root
def test_it_runs_for_another_user_with_the_systems_python() -> None:
    question = HostQuestion(paths=("/root/x", "/etc"), model="/root", dynctl=("/nope",), scratch="~/d")
    facts = collect(
        question, "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", python="/usr/bin/python3"
    )
    assert facts.uid == 65534
    assert facts.paths["/root/x"].exists
    assert not facts.paths["/root"].readable
    assert facts.paths["/etc"].readable
    assert facts.dynctl[0].version == ""
    assert facts.disk["~/d"].total > 0
    assert facts.shm is not None


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def engine(argv: Sequence[str], **changes: Any) -> dict[str, Any]:
    return hostfacts.engine_of({"argv0": argv[0], "version_argv": list(argv), **changes})


def test_an_engine_tells_its_version_and_flags(tmp_path: Path) -> None:
    program = script(tmp_path / "e", 'echo "noise" >&2; [ "$1" = -v ] && echo "$SAID" || printf "  --x N\\n"')
    asked = {
        "argv0": program,
        "version_argv": [program, "-v"],
        "help_argv": [program],
        "env": {"SAID": "v1.2"},
    }
    told = hostfacts.engine_of(asked)
    assert told == {"found": program, "version": "1.2", "flags": ["--x"], "note": ""}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("echo lib missing >&2; exit 3", "exit code 3: lib missing"),
        ("exec sleep 60", "no end after 0.3 s"),
        ("echo hello", "tells no version"),
    ],
)
def test_an_engine_that_cannot_be_asked_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, told: str
) -> None:
    monkeypatch.setattr(hostfacts, "ENGINE_S", 0.3)
    found = engine([script(tmp_path / "e", text)])
    assert told in found["note"]
    assert found["flags"] is None


def test_an_engine_that_is_not_there(tmp_path: Path) -> None:
    assert engine([str(tmp_path / "none")])["found"] == ""
    broken = script(tmp_path / "e", "")
    Path(broken).write_text("#!/nowhere/python\n")
    assert "No such file" in engine([broken])["note"]


def test_what_a_hanging_engine_has_started_is_killed(tmp_path: Path) -> None:
    program = script(tmp_path / "e", f"sleep 600 & echo $! > {tmp_path}/pid; wait")
    with pytest.raises(subprocess.TimeoutExpired):
        hostfacts.run([program], 0.5)
    pid = int((tmp_path / "pid").read_text())
    ends = time.monotonic() + 10
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_a_probe_that_fails_or_hangs_is_a_note_and_the_rest_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("no such device")

    monkeypatch.setattr(hostfacts, "PROBE_S", 0.5)
    monkeypatch.setattr(hostfacts, "infiniband", broken)
    monkeypatch.setattr(hostfacts, "modules", lambda: time.sleep(3))
    facts = hostfacts.collect({"paths": ["/etc"]})
    assert "ib: OSError: no such device" in facts["notes"]
    assert any(note.startswith("modules: no answer after") for note in facts["notes"])
    assert facts["limits"]["nofile"]
    assert facts["modules"] == {"nvidia_peermem": None, "gdrdrv": None}


def test_a_file_that_nobody_has_open_is_a_leftover(tmp_path: Path) -> None:
    (tmp_path / "left").write_bytes(b"x" * 10_000)
    with (tmp_path / "used").open("wb") as file:
        file.write(b"x" * 10_000)
        file.flush()
        told = hostfacts.shared_memory(str(tmp_path))
    assert [left["name"] for left in told["leftovers"]] == ["left"]
    assert told["leftovers"][0]["bytes"] >= 10_000


def test_it_is_python_3_8_and_the_standard_library() -> None:
    """Newer syntax, or a class that is subscripted while it runs, would end it on an old host."""
    tree = ast.parse(SCRIPT.read_text(), feature_version=(3, 8))
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= set(sys.stdlib_module_names)
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert not used & {"removeprefix", "removesuffix", "to_thread", "is_relative_to", "readlink_to"}
    checked = [n for n in tree.body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    for node in [n for n in tree.body if isinstance(n, ast.Assign)]:
        made = [n for n in ast.walk(node.value) if isinstance(n, ast.Subscript | ast.BinOp)]
        assert not made, ast.unparse(node)
    assert len(checked) == 1


def test_what_a_login_shell_says_before_is_passed_over() -> None:
    line = json.dumps({"v": 1, "host": "n1"}).encode()
    assert read_facts(b"Welcome to n1!\n" + line + b"\n").host == "n1"


@pytest.mark.parametrize(
    "printed", [b"", b"Welcome\n", b"{broken\n", b'{"v": 2, "host": "x"}\n', b'{"v": 1}\n']
)
def test_what_is_no_facts_is_refused(printed: bytes) -> None:
    with pytest.raises(CodecError):
        read_facts(printed)


def test_every_field_that_is_printed_is_read() -> None:
    """Both sides of the wire name the same fields."""
    facts = hostfacts.base()
    assert set(facts) | {"took_s"} == set(read_facts(json.dumps(facts).encode()).__struct_fields__)
