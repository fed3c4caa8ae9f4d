"""What must be the same on several hosts."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynctl.doctor import across
from dynctl.doctor.checks import CHECKS, judge_together
from dynctl.doctor.subject import Wanted
from dynctl.protocol.hosts import DiskFacts, EngineFacts, PathFacts
from tests.unit.host_samples import HOME, HOSTS, MODEL, gpu, levels, loaded, only, subject, wanted


@pytest.fixture
def want(tmp_path: Path) -> Wanted:
    return wanted(loaded(tmp_path))


def test_hosts_that_are_alike_pass(want: Wanted) -> None:
    both = [subject(want, host) for host in HOSTS]
    assert {finding.level for finding in judge_together(both, CHECKS)} == {"ok"}
    assert judge_together(both[:1], CHECKS) == []


def test_clocks_that_are_apart(want: Wanted) -> None:
    """This machine's clock may be the wrong one: both hosts are off it, and together."""
    n1, n2 = subject(want, now=1010.0), subject(want, HOSTS[1], now=1010.3)
    assert levels(across.clocks([n1, n2])) == ["ok"]
    late = subject(want, HOSTS[1], now=995.0)
    assert "n2 and n1 are 15.0 s apart" in only(across.clocks([n1, late]), "warn").message
    assert across.clocks([n1, subject(want, HOSTS[1], now=0.0)]) == []


def test_another_engine_on_one_host(want: Wanted) -> None:
    other = subject(want, HOSTS[1], engine=EngineFacts(found="/x", version="0.31.0"))
    told = only(across.versions([subject(want), other]), "fail")
    assert told.message == "different engines: 0.33.0 on n1, 0.31.0 on n2"


def test_another_driver_on_one_host(want: Wanted) -> None:
    other = subject(want, HOSTS[1], gpus=[gpu(0, driver="535.1")])
    assert "550.54 on n1, 535.1 on n2" in only(across.versions([subject(want), other]), "warn").message


def test_other_gpus_on_one_host(want: Wanted) -> None:
    other = subject(want, HOSTS[1], gpus=[gpu(0, name="NVIDIA A100")])
    assert "NVIDIA A100 on n2" in only(across.gpu_types([subject(want), other]), "warn").message


def test_another_model_under_the_same_path(want: Wanted) -> None:
    there = {MODEL: PathFacts(exists=True, readable=True, is_dir=True, fingerprint="other")}
    told = only(across.same_model([subject(want), subject(want, HOSTS[1], paths=there)]), "fail")
    assert "n1" in told.message
    assert "n2" in told.message
    assert f":{MODEL}/" in told.remedy


def test_a_model_that_was_not_compared_is_no_pass(want: Wanted) -> None:
    there = {MODEL: PathFacts(exists=True, readable=True, is_dir=True)}
    found = across.same_model([subject(want), subject(want, HOSTS[1], paths=there)])
    assert "n2" in only(found, "unknown").message


def test_a_local_file_system_is_not_taken_for_a_shared_one(want: Wanted) -> None:
    local = {HOME: DiskFacts(free=10**11, total=10**12, fstype="ext4")}
    assert levels(across.shared([subject(want, host, disk=local) for host in HOSTS])) == ["note"]
    assert levels(across.shared([subject(want, host, disk={}) for host in HOSTS])) == ["unknown"]


def test_a_token_that_one_host_does_not_see() -> None:
    told = only(across.token_seen("/shared", "n1", {"n1": "t", "n2": "", "n3": "t"}, "t"), "fail")
    assert told.message == "a file written in /shared on n1 is not seen on n2"
    assert levels(across.token_seen("/shared", "n1", {"n1": "t", "n2": "t"}, "t")) == ["ok"]
