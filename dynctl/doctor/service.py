"""Asks all hosts at once, each with a deadline, and has what they told judged."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dynctl import hostfacts
from dynctl.doctor import across, slurm
from dynctl.doctor.checks import CHECKS, REACH, judge_host, judge_together, question
from dynctl.doctor.findings import ALL_HOSTS, Finding, findings_of, unknown
from dynctl.doctor.runners import LocalRunner, Runner
from dynctl.doctor.subject import Subject, Wanted
from dynctl.errors import CodecError, DeadlineExceeded, DynctlError, LaunchError
from dynctl.protocol.hosts import HostFacts, HostQuestion, read_facts
from dynctl.recipe.schema import Slurm
from dynctl.topology.inventory import Host

PLAIN_S = 20.0
"""For a host to answer what is quickly known."""
ENGINE_S = 2 * hostfacts.ENGINE_S + PLAIN_S
"""The same when its engine is asked for its version and its flags."""
_SLURM_S = 10.0
_NOT_FOUND = 127
_WRITE = "import sys; open(sys.argv[1], 'x').write(sys.argv[2])"
_REMOVE = "import os, sys; os.unlink(sys.argv[1])"


@dataclass(frozen=True, slots=True)
class Way:
    """How hosts are asked. `python` is a program there, `deadline_s` for all, 0 = as long as it takes.

    `dynctl_pythons` may have dynctl, on hosts whose inventory names none; they may begin with ~.
    """

    runner: Runner
    python: str = "python3"
    dynctl_pythons: tuple[str, ...] = ()
    deadline_s: float = 0.0
    parallel: int = 32


@dataclass(frozen=True, slots=True)
class Report:
    """What was found, in the order it is shown, and what the hosts told, by name."""

    findings: tuple[Finding, ...]
    facts: dict[str, HostFacts] = field(default_factory=dict)


async def examine(
    hosts: Sequence[Host], wanted: Wanted, way: Way, topics: Collection[str] = CHECKS
) -> Report:
    """Ask all hosts, `way.parallel` at a time, and judge them; one that cannot be asked is a finding."""
    gate = asyncio.Semaphore(way.parallel)
    ends = time.monotonic() + way.deadline_s if way.deadline_s else 0.0

    async def one(host: Host) -> Subject | Finding:
        asked = question(host, wanted, (host.python,) if host.python else way.dynctl_pythons, topics)
        async with gate:
            limit = ENGINE_S if asked.engine else PLAIN_S
            left = min(limit, ends - time.monotonic()) if ends else limit
            return await ask(host, asked, wanted, way, left)

    answers = await asyncio.gather(*(one(host) for host in hosts))
    return judged(answers, topics)


def judged(answers: Sequence[Subject | Finding], topics: Collection[str] = CHECKS) -> Report:
    """What all judges say of what hosts have told; a host that told nothing is a finding already."""
    subjects = [answer for answer in answers if isinstance(answer, Subject)]
    findings: list[Finding] = []
    for answer in answers:
        if isinstance(answer, Finding):
            findings.append(answer)
            continue
        if REACH in topics:
            told = f"answered in {answer.facts.took_s:.1f} s as {answer.facts.user}@{answer.facts.host}"
            findings.append(Finding(answer.host.name, REACH, "ok", told))
        findings += judge_host(answer, topics)
    findings += judge_together(subjects, topics)
    return Report(tuple(findings), {s.host.name: s.facts for s in subjects})


async def gpus_of(hosts: Sequence[Host], way: Way) -> dict[str, int]:
    """How many GPUs hosts have that are to be asked for it; those that do not answer are left out."""

    async def one(host: Host) -> tuple[str, int] | None:
        try:
            facts = await facts_of(host, HostQuestion(), way, PLAIN_S)
        except DynctlError:
            return None  # it is asked again, and then told
        return host.name, len(facts.gpus)

    told = await asyncio.gather(*(one(host) for host in hosts if host.discover))
    return dict(pair for pair in told if pair is not None)


async def ask(
    host: Host, asked: HostQuestion, wanted: Wanted, way: Way, timeout_s: float
) -> Subject | Finding:
    """One host's facts, or the finding that it did not tell them."""
    before = time.time()
    try:
        facts = await facts_of(host, asked, way, timeout_s)
    except DynctlError as error:
        return Finding(host.name, REACH, "fail", error.message, error.hint or _remedy(host, way))
    # Its clock was read at its start: after ours stood at `before`, and `took_s` before the answer came.
    slack = max(0.0, time.time() - before - facts.took_s) / 2
    return Subject(host, facts, wanted, before + slack, slack)


async def facts_of(host: Host, asked: HostQuestion, way: Way, timeout_s: float) -> HostFacts:
    """What a host tells. Raises DynctlError: it cannot be reached, has no fitting Python, or is silent."""
    if timeout_s <= 0:
        raise DeadlineExceeded("not asked: the time is up")
    script = await asyncio.to_thread(Path(hostfacts.__file__).read_bytes)
    argv = (way.python, "-", asked.to_json())
    try:
        async with asyncio.timeout(timeout_s + 1.0):
            code, out, err = await way.runner.run(host, argv, script, timeout_s)
    except TimeoutError as error:
        raise DeadlineExceeded(f"no answer after {timeout_s:.0f} s") from error
    if code:
        raise _no_facts(host, way.python, code, err)
    try:
        return read_facts(out)
    except CodecError as error:
        said = out.decode(errors="replace").strip()[:100]
        raise LaunchError(error.message, hint=f"it said: {said}" if said else "") from error


def _no_facts(host: Host, python: str, code: int, err: bytes) -> LaunchError:
    """Why the collector did not run, from what the host's shell or Python said."""
    lines = [line.strip() for line in err.decode(errors="replace").splitlines() if line.strip()]
    last = lines[-1][:200] if lines else f"exit code {code}"
    if code == _NOT_FOUND or (code != 1 and "not found" in last):
        return LaunchError(f"there is no {python}", hint=f"install Python 3.11 or newer on {host.name}")
    if "SyntaxError" in last or "future feature" in last:
        return LaunchError(f"its {python} is older than 3.8", hint=f"install a newer one on {host.name}")
    return LaunchError(f"{python} failed there: {last}")


def _remedy(host: Host, way: Way) -> str:
    if isinstance(way.runner, LocalRunner):
        return ""
    return f"see that {host.address} is on, that its name and key are right, and that you can log in by hand"


def cannot_be_asked(hosts: Sequence[Host], why: str) -> list[Finding]:
    """For hosts to which there is no way yet."""
    remedy = "run dynctl doctor on the host itself"
    return [Finding(host.name, REACH, "unknown", f"not asked: {why}", remedy) for host in hosts]


async def examine_slurm(parts: Mapping[str, Slurm], runner: Runner, host: Host) -> list[Finding]:
    """What each part of the recipe's job asks for against what Slurm's own programs on `host` tell. A job of
    one part has it under "".
    """
    if isinstance(runner, LocalRunner) and shutil.which(slurm.PARTITIONS[0]) is None:
        verdict = unknown("Slurm's programs are not here", "run doctor on a login node")
        return findings_of(ALL_HOSTS, "slurm", [verdict])
    texts = []
    for argv in (slurm.PARTITIONS, slurm.NODES):
        try:
            code, out, err = await runner.run(host, argv, b"", _SLURM_S)
        except DynctlError as error:
            return findings_of(ALL_HOSTS, "slurm", [unknown(f"{argv[0]}: {error.message}", error.hint)])
        if code:
            said = err.decode(errors="replace").strip().splitlines()[-1:]
            remedy = "see that slurmctld runs: scontrol ping"
            verdict = unknown(f"{argv[0]}: {''.join(said) or f'exit code {code}'}", remedy)
            return findings_of(ALL_HOSTS, "slurm", [verdict])
        texts.append(out.decode(errors="replace"))
    return findings_of(ALL_HOSTS, "slurm", slurm.judge_parts(parts, *texts))


async def try_shared(directory: str, hosts: Sequence[Host], way: Way) -> list[Finding]:
    """Whether a file written on the first host is seen on all: written, looked for, removed."""
    token, writer = secrets.token_hex(16), hosts[0]
    path = f"{directory.rstrip('/')}/.dynctl-doctor-{token[:12]}"
    try:
        code, _, err = await way.runner.run(writer, (way.python, "-c", _WRITE, path, token), b"", PLAIN_S)
    except DynctlError as error:
        return [Finding(writer.name, "shared", "unknown", f"{directory}: {error.message}", error.hint)]
    if code:
        said = err.decode(errors="replace").strip().splitlines()[-1:]
        told = f"nothing can be written in {directory}: {''.join(said)}"
        return [Finding(writer.name, "shared", "fail", told, "name a directory that this user may write")]
    try:
        asked = HostQuestion(paths=(path,))
        seen = await asyncio.gather(*(_digest(host, asked, path, way) for host in hosts))
    finally:
        await way.runner.run(writer, (way.python, "-c", _REMOVE, path), b"", PLAIN_S)
    digest = hashlib.sha256(token.encode()).hexdigest()
    told_by = {host.name: found for host, found in zip(hosts, seen, strict=True) if found is not None}
    return findings_of(ALL_HOSTS, "shared", across.token_seen(directory, writer.name, told_by, digest))


async def _digest(host: Host, asked: HostQuestion, path: str, way: Way) -> str | None:
    """What the host sees there, "" = nothing; None = it did not say, which is told elsewhere."""
    try:
        facts = await facts_of(host, asked, way, PLAIN_S)
    except DynctlError:
        return None
    return facts.paths[path].fingerprint if path in facts.paths else None
