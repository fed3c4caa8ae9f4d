"""Faults of a machine itself: each is found, told with what would help, and a healthy host has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dynctl.doctor import machine
from dynctl.doctor.checks import CHECKS, JUDGES, judge_host, question
from dynctl.doctor.subject import Wanted
from dynctl.protocol.hosts import DiskFacts, DynctlFacts, Leftover, PythonFacts, ShmFacts
from tests.unit.host_samples import HOME, HOSTS, MODEL, VERSION, levels, loaded, only, subject, wanted


@pytest.fixture
def want(tmp_path: Path) -> Wanted:
    return wanted(loaded(tmp_path))


def test_a_healthy_host_passes_all_checks(want: Wanted) -> None:
    found = judge_host(subject(want), CHECKS)
    assert {finding.level for finding in found} == {"ok"}, [f for f in found if f.level != "ok"]
    assert {f.check for f in found} == set(JUDGES) - {"container", "probes"}


@pytest.mark.parametrize(
    ("now", "level", "told"),
    [
        (1000.4, "ok", "within 0.5 s"),
        (1002.5, "warn", "2.5 s ahead of"),
        (998.0, "warn", "2.0 s behind"),
        (1400.0, "fail", "munge"),
    ],
)
def test_clock_skew(want: Wanted, now: float, level: Any, told: str) -> None:
    assert told in only(machine.clock(subject(want, now=now)), level).message


def test_a_slow_way_is_not_taken_for_a_wrong_clock(want: Wanted) -> None:
    assert levels(machine.clock(subject(want, now=1003.0, within_s=2.5))) == ["ok"]


def test_a_time_that_was_not_told_is_no_pass(want: Wanted) -> None:
    assert levels(machine.clock(subject(want, now=0.0))) == ["unknown"]


def test_no_dynctl_says_where_was_looked_and_why_its_python_is_of_no_use(want: Wanted) -> None:
    told = only(
        machine.dynctl(
            subject(want, dynctl=[DynctlFacts(python="/opt/py")], python=PythonFacts(version="3.9.1"))
        ),
        "fail",
    )
    assert "/opt/py" in told.message
    assert "3.9.1" in told.message
    assert f"dynctl up --bootstrap brings {VERSION} there" in told.remedy


@pytest.mark.parametrize(("version", "word"), [("0.0.9", "too old"), ("0.2.0", "newer")])
def test_another_dynctl_than_ours_is_refused(want: Wanted, version: str, word: str) -> None:
    other = DynctlFacts(python="/opt/py", version=version)
    assert word in only(machine.dynctl(subject(want, dynctl=[other])), "fail").message


def test_of_several_dynctl_the_fitting_one_counts(want: Wanted) -> None:
    both = [DynctlFacts(python="/a", version="0.0.9"), DynctlFacts(python="/b", version=VERSION)]
    assert "/b" in only(machine.dynctl(subject(want, dynctl=both)), "ok").message


def test_a_dynctl_whose_version_is_not_told_is_no_pass(want: Wanted) -> None:
    assert levels(machine.dynctl(subject(want, dynctl=[], path_dynctl="/bin/dynctl"))) == ["unknown"]


def test_a_taken_port_names_who_has_it(want: Wanted) -> None:
    told = only(machine.ports(subject(want, listening=[8000], holders={"8000": "nginx (pid 7)"})), "fail")
    assert told.message == "port 8000 is taken by nginx (pid 7)"
    assert "frontend.port" in told.remedy


def test_a_taken_port_of_somebody_unseen_says_how_to_see(want: Wanted) -> None:
    assert "ss -ltnp" in only(machine.ports(subject(want, listening=[8000])), "fail").remedy


def test_the_frontends_port_is_free_to_be_used_on_other_hosts(want: Wanted) -> None:
    assert "fail" not in levels(machine.ports(subject(want, HOSTS[1], listening=[8000])))


def test_after_a_failed_start_the_ports_it_had_are_judged(tmp_path: Path) -> None:
    recipe = loaded(tmp_path)
    plan = wanted(recipe).plan
    assert plan is not None
    engine = plan.process("decode-0/engine")
    node = next(host for host in HOSTS if host.name == engine.node)
    tried = wanted(recipe, tried=frozenset({engine.id}))
    port = engine.ports["http"]
    assert (
        f"port {port} is taken" in only(machine.ports(subject(tried, node, listening=[port])), "fail").message
    )


def test_ports_of_outgoing_connections_in_dynctls_range(want: Wanted) -> None:
    told = only(machine.ports(subject(want, ephemeral=[15000, 60999])), "warn")
    assert "15000 to 60999" in told.message


def test_listeners_that_could_not_be_read_are_no_pass(want: Wanted) -> None:
    assert levels(machine.ports(subject(want, notes=["ports: OSError: no"]))) == ["unknown"]


@pytest.mark.parametrize(
    ("soft", "hard", "level", "remedy"),
    [
        (256, 65536, "fail", "ulimit -n"),
        (1024, 4096, "warn", "/etc/security/limits.conf"),
        (8192, -1, "warn", "ulimit -n"),
        (-1, -1, "ok", ""),
    ],
)
def test_open_files(want: Wanted, soft: int, hard: int, level: Any, remedy: str) -> None:
    told = only(machine.limits(subject(want, limits={"nofile": [soft, hard]})), level)
    assert remedy in told.remedy


def test_limits_that_were_not_told_are_no_pass(want: Wanted) -> None:
    assert levels(machine.limits(subject(want, limits={}))) == ["unknown"]


@pytest.mark.parametrize(("free", "level"), [(10**8, "fail"), (3 * 10**9, "warn"), (10**10, "ok")])
def test_disk_space(want: Wanted, free: int, level: Any) -> None:
    told = only(machine.disk(subject(want, disk={HOME: DiskFacts(free=free, total=10**12)})), level)
    assert HOME in told.message


def test_a_disk_that_does_not_answer_is_no_pass(want: Wanted) -> None:
    hung = subject(want, disk={}, notes=[f"disk {HOME}: no answer after 5 s"])
    assert "no answer after 5 s" in only(machine.disk(hung), "unknown").message


def test_little_shared_memory_fails_engines_of_several_ranks(want: Wanted) -> None:
    small = ShmFacts(free=64 << 20, total=64 << 20)
    assert "exchange data" in only(machine.shm(subject(want, shm=small)), "fail").message
    assert levels(machine.shm(subject(Wanted(VERSION, HOME), shm=small))) == ["warn"]


def test_leftovers_in_shared_memory_are_named(want: Wanted) -> None:
    left = [Leftover(name="nccl-x", bytes=2 * 10**9, age_s=9.0, owner="eve")]
    told = only(machine.shm(subject(want, shm=ShmFacts(free=10**10, total=10**10, leftovers=left))), "warn")
    assert "nccl-x (2.0 GB, eve)" in told.message
    assert "rm /dev/shm/nccl-x" in told.remedy


def test_leftovers_that_fill_little_of_it_are_told_by_their_size() -> None:
    left = [Leftover(name="psm-y", bytes=3 * 10**8, age_s=9.0, owner="eve")]
    roomy = ShmFacts(free=10**10, total=10**10, leftovers=left)
    told = only(machine.shm(subject(Wanted(VERSION, HOME), shm=roomy)), "note").message
    assert told == "300 MB in 1 file there that no process has open, the largest: psm-y"


def test_shared_memory_that_was_not_told_is_no_pass(want: Wanted) -> None:
    assert levels(machine.shm(subject(want, shm=None, notes=["shm: OSError: no"]))) == ["unknown"]


def test_what_no_judge_speaks_of_is_said(want: Wanted) -> None:
    found = judge_host(subject(want, notes=["ib: OSError: no", "shm: told elsewhere"]), ("probes",))
    assert [(f.level, f.message) for f in found] == [("unknown", "ib: OSError: no")]


def test_every_fault_of_a_host_that_tells_nothing_is_unknown_or_worse(want: Wanted) -> None:
    """A judge that passes what it could not see would hide the very host that is ill."""
    blind: dict[str, Any] = {"limits": {}, "disk": {}, "shm": None, "now": 0.0, "python": PythonFacts()}
    blind |= {"dynctl": [], "gpus": [], "gpu_devices": 4, "engine": None, "paths": {}, "model_at": ""}
    blind |= {"modules": {}, "notes": ["ports: OSError: no"]}
    told = {f.check: f.level for f in judge_host(subject(want, **blind), CHECKS)}
    seen = {check for check, level in told.items() if level == "ok"}
    assert seen <= {"rdma", "transfer"}, told


def test_only_what_is_needed_is_asked(tmp_path: Path) -> None:
    want = wanted(loaded(tmp_path))
    asked = question(HOSTS[0], want, ("/py",), CHECKS)
    assert (asked.model, asked.ports, asked.dynctl, asked.scratch) == (MODEL, (8000,), ("/py",), HOME)
    assert asked.engine is not None
    assert asked.engine.help_argv
    quick = question(HOSTS[0], want, ("/py",), ("engine",))
    assert quick.engine is not None
    assert (quick.engine.help_argv, quick.model, quick.dynctl) == ((), "", ())
    assert question(HOSTS[0], want, ("/py",), ("disk",)).engine is None


def test_no_secret_of_the_recipe_gets_into_the_question(tmp_path: Path) -> None:
    """It is an argument: everybody on the host can read it."""
    want = wanted(loaded(tmp_path, "engine.env.HF_TOKEN=hush", "engine.env.PATH=/opt/bin"))
    text = question(HOSTS[0], want, ("/py",), CHECKS).to_json()
    assert "hush" not in text
    assert "/opt/bin" in text
