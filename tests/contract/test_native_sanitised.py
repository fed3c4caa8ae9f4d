"""The compiled hot path under AddressSanitizer and UndefinedBehaviorSanitizer: its tests, memory watched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dynctl.native import load
from dynctl.native.build import build

ROOT = Path(__file__).resolve().parents[2]
SANITISED = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
SUITES = (
    "tests/contract/test_native_relay.py",
    "tests/contract/test_relay_attacked.py",
    "tests/contract/test_http_direct.py",
    "tests/contract/test_http_relay.py",
    "tests/unit/test_frontend_stream.py",
    "tests/unit/test_frontend_words.py",
    "tests/unit/test_kv_walk.py",
    "tests/unit/test_kv_holders.py",
    "tests/unit/test_kv_index.py",
)
DEADLINE_S = 240.0


def runtime() -> Path:
    """The sanitizer's library, which must be loaded before all else. gcc brings it along."""
    argv = [*os.environ.get("CC", "cc").split(), "-print-file-name=libasan.so"]
    return Path(subprocess.run(argv, capture_output=True, text=True, check=True, timeout=30).stdout.strip())


@pytest.mark.compiled
@pytest.mark.timeout(DEADLINE_S + 30)
def test_no_memory_is_misused(tmp_path: Path) -> None:
    for name in ("dynctl", "tests"):
        left_out = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=left_out)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    assert build(load.FOLDER, tmp_path / "dynctl" / "native" / load.MODULE, SANITISED) == ""
    env = {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "LD_PRELOAD": str(runtime().resolve()),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "PYTHONMALLOC": "malloc",
        "DYNCTL_TESTS_REQUIRE": "all",
    }
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *SUITES]
    done = subprocess.run(
        argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
