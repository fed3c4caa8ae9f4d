"""What is started on many hosts, or waited for by people, loads no recipe: that takes a quarter second."""

import subprocess
import sys

import pytest

LIGHT = (
    "deploy.receive",
    "controller.__main__",
    "agent.__main__",
    "cli.ps",
    "cli.down",
    "cli.elsewhere",
    "cli.attend",
)


@pytest.mark.parametrize("module", LIGHT)
def test_a_part_that_only_runs_what_was_planned_loads_no_recipe(module: str) -> None:
    code = f"import sys, dynctl.{module}; print(*sorted(m for m in sys.modules if m in ('pydantic', 'yaml')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
