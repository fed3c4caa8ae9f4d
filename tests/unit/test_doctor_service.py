"""Hosts that cannot be asked: each ends in one finding with host and remedy, beside what the others tell."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dynctl.doctor import service
from dynctl.doctor.findings import Finding
from dynctl.doctor.runners import LocalRunner
from dynctl.doctor.service import Way, examine, examine_slurm, try_shared
from dynctl.doctor.subject import Wanted
from dynctl.errors import DeadlineExceeded, LaunchError
from dynctl.recipe.schema import Slurm
from dynctl.topology.inventory import LOCAL, Host

Answer = tuple[int, bytes, bytes]
N1, N2, N3 = Host("n1", "10.0.0.1"), Host("n2", "10.0.0.2"), Host("n3", "10.0.0.3")
FACTS = json.dumps({"v": 1, "host": "n1", "user": "u", "now": 5.0}).encode() + b"\n"
REACH = ("reach",)
WANTED = Wanted("0.1.0", "/home", here=False)


class Scripted:
    """Answers by host: bytes are facts, an exception is raised, a function is called."""

    def __init__(self, **answers: Answer | Exception | Callable[[], Answer]) -> None:
        self.answers = answers
        self.running = self.most = 0

    async def run(self, host: Host, argv: Sequence[str], stdin: bytes, timeout_s: float) -> Answer:
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0.01)
        self.running -= 1
        answer = self.answers[host.name]
        if isinstance(answer, Exception):
            raise answer
        return answer() if callable(answer) else answer


async def found(runner: Scripted, *hosts: Host, parallel: int = 32) -> list[Finding]:
    return list((await examine(hosts, WANTED, Way(runner, parallel=parallel), REACH)).findings)


async def test_an_unreachable_host_does_not_hide_the_others() -> None:
    runner = Scripted(n1=(0, FACTS, b""), n2=LaunchError("No route to host"))
    well, ill = await found(runner, N1, N2)
    assert (well.host, well.level) == ("n1", "ok")
    assert (ill.host, ill.check, ill.level, ill.message) == ("n2", "reach", "fail", "No route to host")
    assert "10.0.0.2" in ill.remedy


async def test_the_runners_own_remedy_is_kept() -> None:
    runner = Scripted(n1=LaunchError("host key changed", hint="ssh-keygen -R n1"))
    (ill,) = await found(runner, N1)
    assert ill.remedy == "ssh-keygen -R n1"


@pytest.mark.parametrize(
    ("answer", "told", "remedy"),
    [
        ((127, b"", b"bash: line 1: python3: command not found\n"), "there is no python3", "on n1"),
        ((1, b"", b"  File\nSyntaxError: invalid syntax\n"), "older than 3.8", "on n1"),
        ((1, b"", b"SyntaxError: future feature annotations is not defined\n"), "older than 3.8", "on n1"),
        ((1, b"", b"Traceback\nKeyError: 'x'\n"), "python3 failed there: KeyError: 'x'", "10.0.0.1"),
        ((255, b"", b""), "exit code 255", "10.0.0.1"),
        ((0, b"This account is disabled.\n", b""), "printed no facts", "This account is disabled."),
    ],
)
async def test_a_host_whose_python_does_not_run_it(answer: Answer, told: str, remedy: str) -> None:
    (ill,) = await found(Scripted(n1=answer), N1)
    assert ill.level == "fail"
    assert told in ill.message
    assert remedy in ill.remedy


async def test_a_runner_that_forgets_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck:
        async def run(self, host: Host, argv: Sequence[str], stdin: bytes, timeout_s: float) -> Answer:
            await asyncio.sleep(600)
            return 0, b"", b""

    monkeypatch.setattr(service, "PLAIN_S", 0.01)
    report = await examine((N1,), WANTED, Way(Stuck()), REACH)
    assert "no answer after" in report.findings[0].message


async def test_hosts_that_the_deadline_leaves_no_time_for_are_not_passed() -> None:
    way = Way(Scripted(n1=(0, FACTS, b"")), deadline_s=1e-9)
    (late,) = (await examine((N1,), WANTED, way, REACH)).findings
    assert (late.level, late.message) == ("fail", "not asked: the time is up")


async def test_so_many_hosts_at_a_time() -> None:
    hosts = [Host(f"n{i}", f"10.0.1.{i}") for i in range(9)]
    runner = Scripted(**{host.name: (0, FACTS, b"") for host in hosts})
    assert len(await found(runner, *hosts, parallel=3)) == 9
    assert runner.most == 3


async def test_gpus_are_counted_where_the_inventory_says_auto() -> None:
    two = json.dumps({"v": 1, "host": "x", "gpus": [{"index": 0}, {"index": 1}]}).encode()
    runner = Scripted(n1=(0, two, b""), n2=LaunchError("No route to host"), n3=(0, FACTS, b""))
    hosts = [Host("n1", "a", discover=True), Host("n2", "b", discover=True), N3]
    assert await service.gpus_of(hosts, Way(runner)) == {"n1": 2}


async def test_slurm_that_does_not_answer_is_no_pass() -> None:
    silent = Scripted(n1=DeadlineExceeded("no answer after 10 s"))
    (told,) = await examine_slurm({"": Slurm()}, silent, N1)
    assert (told.level, told.message) == ("unknown", "scontrol: no answer after 10 s")
    broken = Scripted(n1=(1, b"", b"slurm_load_partitions: Unable to contact slurm controller\n"))
    (told,) = await examine_slurm({"": Slurm()}, broken, N1)
    assert (told.level, told.remedy) == ("unknown", "see that slurmctld runs: scontrol ping")


async def test_slurm_without_its_programs_is_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    (told,) = await examine_slurm({"": Slurm()}, LocalRunner(), Host(LOCAL, "127.0.0.1"))
    assert told.level == "unknown"
    assert "login node" in told.remedy


class Apart(LocalRunner):
    """Local, but a host named n2 sees another directory under the same name."""

    def __init__(self, shared: Path, other: Path) -> None:
        self.shared, self.other = str(shared), str(other)

    async def run(self, host: Host, argv: Sequence[str], stdin: bytes, timeout_s: float) -> Answer:
        seen = [arg.replace(self.shared, self.other) if host.name == "n2" else arg for arg in argv]
        code, out, err = await super().run(host, seen, stdin, timeout_s)
        return code, out.replace(self.other.encode(), self.shared.encode()), err


@pytest.mark.parametrize(("hosts", "level"), [((N1, N3), "ok"), ((N1, N2, N3), "fail")])
async def test_a_file_system_that_is_not_shared(tmp_path: Path, hosts: tuple[Host, ...], level: str) -> None:
    shared, other = tmp_path / "shared", tmp_path / "other"
    shared.mkdir()
    other.mkdir()
    (told,) = await try_shared(str(shared), hosts, Way(Apart(shared, other), sys.executable))
    assert told.level == level
    assert ("n2" in told.message) == (level == "fail")
    assert list(shared.iterdir()) == []


async def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (told,) = await try_shared(str(tmp_path / "none"), (N1, N3), Way(LocalRunner(), sys.executable))
    assert (told.level, told.host) == ("fail", "n1")
    assert "No such file" in told.message


async def test_this_machine_is_examined_for_real() -> None:
    wanted = Wanted("0.1.0", "/tmp")
    report = await examine((Host(LOCAL, "127.0.0.1"),), wanted, Way(LocalRunner(), sys.executable))
    assert report.facts[LOCAL].uid == os.getuid()
    assert {"reach", "python", "disk", "shm", "ports"} <= {finding.check for finding in report.findings}


async def test_a_local_program_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    code = f"echo $$ > {tmp_path}/pid; sleep 600"
    with pytest.raises(DeadlineExceeded, match="no answer after"):
        await LocalRunner().run(N1, ("sh", "-c", code), b"", 0.5)
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_local_program_that_is_not_there() -> None:
    with pytest.raises(LaunchError, match="cannot be run"):
        await LocalRunner().run(N1, ("/nowhere/x",), b"", 1.0)
