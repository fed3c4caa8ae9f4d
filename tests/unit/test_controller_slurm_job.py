"""A controller inside a job: which of the run's hosts are still in a job of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from dynctl.controller import slurm_job
from dynctl.deploy.home import RunDir
from dynctl.deploy.run import INVENTORY
from dynctl.topology.inventory import Host, Inventory


def test_hosts_of_ended_follow_up_jobs_are_strays_and_kept_only_while_something_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = tuple(Host(name, name, 2) for name in ("n1", "n2", "n3", "n4"))
    (tmp_path / INVENTORY).write_bytes(msgspec.json.encode(Inventory(hosts, "the job")))
    plan = SimpleNamespace(processes=[SimpleNamespace(spots=[("n1", ()), ("n3", ())])])
    monkeypatch.setattr(slurm_job, "read_plan", lambda run: plan)
    for _ in range(2):
        assert slurm_job.strays(RunDir(tmp_path), {"n1", "n4"}) >= {"n3"}
        kept = msgspec.json.decode((tmp_path / INVENTORY).read_bytes(), type=Inventory)
        assert [host.name for host in kept.hosts] == ["n1", "n3", "n4"], "n2 may be given again"
