"""slurm/serve.sbatch, run by hand as its head says it can be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deployment import RECIPES, ROOT, end_all, get, owned

STARTED_S = 60.0


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "home"
    end_all(tmp_path / "home")


def test_script_serves_until_it_is_told_to_stop_and_leaves_nothing(tmp_path: Path, home: Path) -> None:
    dynctl = tmp_path / "dynctl"
    dynctl.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dynctl.cli.main "$@"\n')
    dynctl.chmod(0o755)
    told = tmp_path / "dynctl-77.json"
    argv = ["bash", str(ROOT / "slurm/serve.sbatch"), str(RECIPES / "quickstart.yaml")]
    env = {**os.environ, "DYNCTL": str(dynctl), "DYNCTL_HOME": str(home), "SLURM_JOB_ID": "77"}
    with (tmp_path / "out").open("wb") as out:
        script = subprocess.Popen(
            [*argv, "--set", "frontend.port=0"], env=env, cwd=tmp_path, stdout=out, stderr=out
        )
    try:
        deadline = time.monotonic() + STARTED_S
        while not (told.exists() and told.read_text().strip()):
            assert script.poll() is None, (tmp_path / "out").read_text()
            assert time.monotonic() < deadline, (tmp_path / "out").read_text()
            time.sleep(0.1)
        run = json.loads(told.read_text())
        assert '"ready"' in get(run["url"] + "/health")
    finally:
        script.send_signal(signal.SIGTERM)
        script.wait(60)
    assert script.returncode == 0
    assert not owned(Path(run["run_dir"]).resolve().name)
