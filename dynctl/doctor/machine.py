"""Judges of the machine itself: clock, dynctl, limits, disk, shared memory, ports. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dynctl.doctor.findings import Verdict, fail, note, ok, size, unknown, warn
from dynctl.doctor.subject import Subject
from dynctl.topology.ports import FIRST_PORT, LAST_PORT

SKEW_WARN_S = 1.0
SKEW_FAIL_S = 300.0
"""As much as munge (Slurm) and Kerberos take."""
LEAST_PYTHON = (3, 11)
FILES_WANTED = 16_384
LEAST_FILES = 512
"""Below it not even the processes of a deployment find each other."""
LEAST_DISK = 1e9
LITTLE_DISK = 5e9
LEAST_SHM = 512e6
_UNLIMITED = -1
SYNC = "let chrony or systemd-timesyncd set the clock: timedatectl set-ntp true"


def clock(subject: Subject) -> list[Verdict]:
    """How far its clock is from ours, beyond what the way there may account for."""
    facts = subject.facts
    if subject.wanted.here:
        return []
    if not facts.now or not subject.asked_at:
        return [unknown("its time was not told")]
    skew = facts.now - subject.asked_at
    sure = max(0.0, abs(skew) - subject.within_s)
    told = f"{abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} this machine's"
    if sure > SKEW_FAIL_S:
        return [fail(f"its clock is {told}: munge and certificates are refused", SYNC)]
    if sure > SKEW_WARN_S:
        return [warn(f"its clock is {told}: logs and events of the hosts cannot be put in order", SYNC)]
    return [ok(f"within {max(0.1, abs(skew) + subject.within_s):.1f} s of this machine's")]


def dynctl(subject: Subject) -> list[Verdict]:
    """Some Python there has this version of dynctl."""
    facts, ours = subject.facts, subject.wanted.version
    found = [candidate for candidate in facts.dynctl if candidate.version]
    install = f"dynctl up --bootstrap brings {ours} there, or `python:` of the inventory names where it is"
    if subject.wanted.here:
        install = f"pip install dynctl=={ours}"
    if not found:
        if facts.path_dynctl:
            return [unknown(f"{facts.path_dynctl} is there, its version was not told")]
        return [fail(f"no dynctl: {_looked(facts.dynctl)}{_python(facts.python.version)}", install)]
    best = next((candidate for candidate in found if candidate.version == ours), found[0])
    if best.version == ours:
        return [ok(f"{best.version} with {best.python}")]
    age = "too old" if _numbers(best.version) < _numbers(ours) else "newer"
    return [fail(f"dynctl {best.version} of {best.python} is {age}: this one is {ours}", install)]


def _looked(candidates: Sequence[object]) -> str:
    pythons = [str(getattr(candidate, "python", "")) for candidate in candidates]
    return f"none with {', '.join(pythons)}, none on PATH" if pythons else "none on PATH"


def _python(version: str) -> str:
    if not version or _numbers(version)[:2] >= LEAST_PYTHON:
        return ""
    return f"; its Python is {version}, dynctl needs {'.'.join(map(str, LEAST_PYTHON))}"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def python(subject: Subject) -> list[Verdict]:
    """Which Python answered; an old one does, as long as dynctl has another."""
    told = subject.facts.python
    if not told.version:
        return [unknown("its Python did not tell its version")]
    return [ok(f"{told.version} ({told.path or 'python3'})")]


def ports(subject: Subject) -> list[Verdict]:
    """The ports that the recipe fixes are free; dynctl's own range is apart from outgoing connections."""
    facts = subject.facts
    if why := facts.note("ports"):
        return [unknown(f"who listens could not be read: {why}")]
    found = []
    taken = [port for port in fixed_ports(subject) if port in facts.listening]
    for port in taken:
        holder = facts.holders.get(str(port))
        who = f" by {holder}" if holder else "; by whom is not ours to see"
        remedy = "end it, or --set frontend.port=PORT (0 takes a free one)"
        if not holder:
            remedy += f"; as root {subject.on}: ss -ltnp 'sport = :{port}'"
        found.append(fail(f"port {port} is taken{who}", remedy))
    fixed = [port for port in fixed_ports(subject) if port not in taken]
    if fixed:
        found.append(ok(f"{', '.join(map(str, fixed))} free"))
    if not subject.wanted.tried:
        found += _range(facts.ephemeral, facts.listening)
    return found


def _range(ephemeral: Sequence[int], listening: Sequence[int]) -> list[Verdict]:
    if len(ephemeral) == 2 and ephemeral[0] <= LAST_PORT and ephemeral[1] >= FIRST_PORT:
        told = f"outgoing connections use ports {ephemeral[0]} to {ephemeral[1]}, dynctl takes its own from"
        remedy = f"sysctl -w net.ipv4.ip_local_port_range='{LAST_PORT + 1} 60999'"
        return [warn(f"{told} {FIRST_PORT} to {LAST_PORT}: one may be gone when a process starts", remedy)]
    used = sum(FIRST_PORT <= port <= LAST_PORT for port in listening)
    whole = LAST_PORT - FIRST_PORT + 1
    return [ok(f"{whole - used} of {whole} free in dynctl's range ({FIRST_PORT} to {LAST_PORT})")]


def fixed_ports(subject: Subject) -> tuple[int, ...]:
    """The ports there that the recipe names: nothing goes round them. Of a failed start all it had."""
    recipe, tried = subject.wanted.recipe, subject.wanted.tried
    if tried:
        return tuple(sorted(port for p in subject.processes if p.id in tried for port in p.ports.values()))
    if recipe is None or not recipe.frontend.port:
        return ()
    doors = [p for p in subject.processes if p.kind == "frontend"]
    return (recipe.frontend.port,) if doors or subject.wanted.plan is None else ()


def limits(subject: Subject) -> list[Verdict]:
    """Open files are enough for the frontend's connections and the engines' sockets."""
    told = subject.facts.limits.get("nofile")
    if not told or len(told) != 2:
        return [unknown("the limit of open files was not told")]
    soft, hard = told
    recipe = subject.wanted.recipe
    wanted = max(FILES_WANTED, 2 * recipe.frontend.limits.max_connections if recipe else 0)
    if soft == _UNLIMITED or soft >= wanted:
        return [ok(f"{'unlimited' if soft == _UNLIMITED else soft} open files")]
    if hard == _UNLIMITED or hard >= wanted:
        remedy = f"ulimit -n {wanted} before starting, or in the shell's start file"
    else:
        remedy = f"'{subject.facts.user} - nofile {wanted}' in /etc/security/limits.conf, then log in again"
    if soft < LEAST_FILES:
        return [fail(f"{soft} open files are too few for a frontend and its engines", remedy)]
    return [warn(f"{soft} open files: {wanted} are needed for as many connections as allowed", remedy)]


def disk(subject: Subject) -> list[Verdict]:
    """There is room where runs are kept, for logs and compiled kernels."""
    home = subject.home
    told = subject.facts.disk.get(home)
    if told is None:
        return [unknown(f"{home}: {subject.facts.note(f'disk {home}') or 'not told'}")]
    free = f"{size(told.free)} of {size(told.total)} free for {home}"
    remedy = f"free some space {subject.on}, or let DYNCTL_HOME name a directory on another disk"
    if told.free < LEAST_DISK:
        return [fail(free, remedy)]
    return [warn(free, remedy) if told.free < LITTLE_DISK else ok(free)]


def shm(subject: Subject) -> list[Verdict]:
    """There is shared memory for ranks to exchange data, and nothing of dead processes fills it."""
    told = subject.facts.shm
    if told is None:
        return [unknown(f"/dev/shm: {subject.facts.note('shm') or 'not told'}")]
    found = []
    free = f"{size(told.free)} of {size(told.total)} free"
    if told.free < LEAST_SHM:
        remedy = "remove what was left there, or mount it larger: mount -o remount,size=50% /dev/shm"
        why = "the ranks of an engine exchange data there" if subject.wanted.shards else "engines use it"
        found.append((fail if subject.wanted.shards else warn)(f"{free}: {why}", remedy))
    else:
        found.append(ok(free))
    left = sum(file.bytes for file in told.leftovers)
    if told.leftovers and left > max(0.05 * told.total, 64e6):
        names = ", ".join(f"{file.name} ({size(file.bytes)}, {file.owner})" for file in told.leftovers[:3])
        first = told.leftovers[0]
        remedy = f"if nothing of {first.owner} needs them: rm /dev/shm/{first.name} ..."
        found.append(warn(f"{size(left)} that no process has open: {names}", remedy))
    elif told.leftovers:
        count = len(told.leftovers)
        named = f"{count} file{'s' if count > 1 else ''} there that no process has open"
        found.append(note(f"{size(left)} in {named}, the largest: {told.leftovers[0].name}"))
    return found
