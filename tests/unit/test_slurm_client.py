"""Slurm's programs: what is read of them, and what their refusals become. The programs are scripts here."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynctl.errors import SlurmError, SlurmRejected, SlurmUnreachable
from dynctl.launchers.slurm_client import (
    JobRow,
    NodeRow,
    SlurmClient,
    StepRow,
    failure,
    parse_job,
    parse_node,
)


def client(folder: Path, deadline_s: float = 10.0, **programs: str) -> SlurmClient:
    for name, script in programs.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    return SlurmClient({"PATH": f"{folder}:/usr/bin:/bin", "SBATCH_PARTITION": "other"}, deadline_s)


def test_warnings_on_standard_error_never_get_into_the_job_id(tmp_path: Path) -> None:
    slurm = client(tmp_path, sbatch="echo 'sbatch: warning: 99 nodes' >&2; echo '17;cluster'")
    assert slurm.submit("#!/bin/sh\n", str(tmp_path)) == "17"


def test_lines_of_a_job_submit_plugin_before_the_id_are_passed_over(tmp_path: Path) -> None:
    slurm = client(tmp_path, sbatch="echo 'your project has 5 h left'; echo 17")
    assert slurm.submit("#!/bin/sh\n", str(tmp_path)) == "17"


def test_an_answer_without_an_id_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SlurmError, match="without a job id"):
        client(tmp_path, sbatch="echo hello").submit("", str(tmp_path))


def test_options_in_the_environment_do_not_change_the_job(tmp_path: Path) -> None:
    slurm = client(tmp_path, sbatch='[ -z "$SBATCH_PARTITION" ] || exit 1; echo 3')
    assert slurm.submit("", str(tmp_path)) == "3"


def test_a_program_that_hangs_is_left_at_the_deadline(tmp_path: Path) -> None:
    with pytest.raises(SlurmUnreachable, match=r"squeue did not answer within 0\.2 s"):
        client(tmp_path, 0.2, squeue="exec sleep 30").jobs(["a"])


def test_no_slurm_here_says_where_to_run(tmp_path: Path) -> None:
    with pytest.raises(SlurmError, match=r"there is no squeue on PATH \(run this on a login node"):
        SlurmClient({"PATH": str(tmp_path)}).jobs(["a"])


def test_all_jobs_are_asked_for_in_one_call(tmp_path: Path) -> None:
    slurm = client(tmp_path, squeue=f'echo x >> {tmp_path}/calls; echo "$*" > {tmp_path}/args')
    assert slurm.jobs(["b", "a", "b"]) == []
    assert (tmp_path / "calls").read_text() == "x\n"
    assert "--name=a,b" in (tmp_path / "args").read_text()


def test_a_job_that_slurm_does_not_know_has_no_steps(tmp_path: Path) -> None:
    slurm = client(tmp_path, squeue="echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert slurm.steps("7") == []


def test_a_step_name_may_hold_bars(tmp_path: Path) -> None:
    assert client(tmp_path, squeue="echo '7.1|n1|a|b'").steps("7") == [StepRow("7.1", "n1", "a|b")]


def test_job_fields() -> None:
    line = "7|PENDING|Priority|2026-11-28T08:00:00|2026-11-28T07:00:00|N/A||n/a|gpu|UNLIMITED|42|a|b"
    assert parse_job(line) == JobRow(
        id="7",
        state="PENDING",
        reason="Priority",
        start="2026-11-28T08:00:00",
        submitted="2026-11-28T07:00:00",
        partition="gpu",
        limit="UNLIMITED",
        priority=42,
        name="a|b",
    )
    assert parse_job(line).pending
    assert not parse_job(line).active


def test_node_fields() -> None:
    line = "NodeName=n1 Arch=x86_64 NodeAddr=10.0.0.1 State=IDLE+DRAIN OS=Linux 5 x"
    assert parse_node(line) == NodeRow("n1", "10.0.0.1", "IDLE")


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        (
            "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed: x",
            "sinfo -s",
        ),
        ("sbatch: error: Batch job submission failed: Invalid account or account/partition", "sacctmgr"),
        ("sbatch: error: Batch job submission failed: Requested time limit is invalid", "slurm.time"),
        ("sbatch: error: Batch job submission failed: Invalid qos specification", "qos"),
        ("sbatch: error: Requested node configuration is not available", "fewer nodes"),
    ],
)
def test_a_refusal_keeps_slurms_words_and_says_what_would_help(said: str, remedy: str) -> None:
    error = failure("sbatch", said, 1)
    assert isinstance(error, SlurmRejected)
    assert remedy in error.hint
    assert "error:" not in error.message


@pytest.mark.parametrize(
    "said",
    [
        "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
        "sbatch: error: Batch job submission failed: Unexpected missing socket error",
        "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
        "scancel: error: Kill job error: Zero Bytes were transmitted or received",
    ],
)
def test_a_controller_that_does_not_answer_is_no_refusal(said: str) -> None:
    assert isinstance(failure("sbatch", said, 1), SlurmUnreachable)
