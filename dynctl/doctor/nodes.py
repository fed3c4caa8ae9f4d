"""Asks compute nodes: one `srun` for each part of the job, over as many nodes as can be had in time."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from dynctl import hostfacts
from dynctl.deploy.slurm_look import Limits, by_node, look_argv
from dynctl.deploy.slurm_size import Part
from dynctl.doctor.checks import REACH
from dynctl.doctor.findings import ALL_HOSTS, Finding
from dynctl.doctor.runners import LocalRunner
from dynctl.doctor.subject import Subject, Wanted
from dynctl.errors import CodecError, LaunchError
from dynctl.launchers.slurm_step import of_our_job
from dynctl.protocol.hosts import HostFacts, HostQuestion, read_facts
from dynctl.recipe.load import LoadedRecipe
from dynctl.topology.inventory import LOCAL, Host, Inventory

_GIVE_BACK_S = 10.0
"""For `srun` to end its job when it is told to."""
_HERE = Host(LOCAL, "127.0.0.1")
_ERROR = "srun: error: "


@dataclass(frozen=True, slots=True)
class Seen:
    """What the nodes told, and when the first was asked and the last had answered (seconds since 1970)."""

    facts: dict[str, HostFacts] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    silent: tuple[str, ...] = ()
    began: float = 0.0
    ended: float = 0.0


async def look_at(loaded: LoadedRecipe, part: Part, asked: HostQuestion, limits: Limits) -> Seen:
    """Ask the nodes of a part; of those that are not had, or say nothing, that they are not checked."""
    name = f"dynctl-doctor-{secrets.token_hex(4)}"
    argv = look_argv(loaded, part, name, limits, ("python3", "-", asked.to_json()))
    script = await asyncio.to_thread(Path(hostfacts.__file__).read_bytes)
    began = time.time()
    try:
        out, err = await _run(argv, script, limits.wait_s + limits.run_s, name)
    except OSError as error:
        why = f"srun cannot be run: {error.strerror or error}"
        return Seen(findings=(_not_checked(part.size.nodes, part.size.nodes, why),), began=began)
    ended = time.time()
    late = ended - began >= limits.wait_s + limits.run_s
    told, complaints = by_node(out), {} if late else by_node(err)
    facts: dict[str, HostFacts] = {}
    findings: list[Finding] = []
    for node, text in sorted(told.items()):
        try:
            facts[node] = read_facts(text)
        except CodecError:
            findings.append(_no_facts(node, complaints.get(node, b"")))
    missing = part.size.nodes - len(told)
    if missing > 0:
        findings.append(_not_checked(missing, part.size.nodes, _why(err, limits)))
    return Seen(facts, tuple(findings), tuple(f.host for f in findings if f.host), began, ended)


def nodes_of(parts: Sequence[Part], seen: Sequence[Seen]) -> Inventory:
    """The nodes that have told of themselves, with the GPUs that Slurm gives of each."""
    hosts = (
        Host(node, node, part.size.gpus, labels=(part.role,) if part.role is not None else ())
        for part, one in zip(parts, seen, strict=True)
        for node in one.facts
    )
    return Inventory(tuple(hosts), "nodes that Slurm gave")


def answers(seen: Seen, there: Inventory, wanted: Wanted) -> list[Subject | Finding]:
    """What is judged: nodes of `there` with what they told, and what is known of the others."""
    subjects: list[Subject] = []
    for host in there.hosts:
        if host.name in seen.facts:
            facts = seen.facts[host.name]
            # Its clock was read at some time while all were asked.
            slack = max(0.0, seen.ended - seen.began - facts.took_s) / 2
            subjects.append(Subject(host, facts, wanted, seen.began + slack, slack))
    return [*subjects, *seen.findings]


def _no_facts(node: str, said: bytes) -> Finding:
    words = said.decode(errors="replace").strip()[-200:]
    if words:
        return Finding(node, REACH, "fail", f"python3 failed there: {words}", f"see to python3 on {node}")
    return Finding(node, REACH, "unknown", "not checked: it said nothing in time", "look at it by hand: srun")


def _not_checked(missing: int, wanted: int, why: str) -> Finding:
    told = f"{missing} of {wanted} node{'s' if wanted > 1 else ''} not checked: {why}"
    return Finding(ALL_HOSTS, REACH, "unknown", told, "sinfo shows what they do; try again, or wait longer")


def _why(err: bytes, limits: Limits) -> str:
    """Slurm's own last words, if it has said why."""
    lines = [line.strip() for line in err.decode(errors="replace").splitlines()]
    said = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)]
    return said[-1] if said else f"Slurm had no more within {limits.wait_s:.0f} s"


async def _run(argv: Sequence[str], stdin: bytes, limit_s: float, name: str) -> tuple[bytes, bytes]:
    """`srun` to its end, or to the limit, and what was said by then; its job ends in any case.

    Raises OSError, and a DynctlError when `srun` does not end.
    """
    hidden = of_our_job()
    child = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
        env={name: value for name, value in os.environ.items() if name not in hidden},
    )
    talk = asyncio.ensure_future(child.communicate(stdin))
    try:
        await asyncio.wait({talk}, timeout=limit_s)
    finally:
        # Told to end it gives its nodes back; killed it would leave them taken until the job's limit.
        if child.returncode is None:
            with suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(_GIVE_BACK_S):
            return await talk
    except TimeoutError as error:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        await child.wait()
        cancel = ("scancel", f"--name={name}")
        code, _, _ = await LocalRunner().run(_HERE, cancel, b"", _GIVE_BACK_S)
        left = f"its job may be left: {' '.join(cancel)}" if code else "its job was cancelled"
        raise LaunchError(f"srun did not end and was killed; {left}", where=name) from error
