"""All judges in the order they are shown, and what has to be asked so that they can judge. Pure."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence

from dynctl.command import MASK, Command
from dynctl.doctor import across, devices, machine, programs
from dynctl.doctor.findings import ALL_HOSTS, Finding, Verdict, findings_of, unknown
from dynctl.doctor.subject import Subject, Wanted
from dynctl.hostfacts import OWN
from dynctl.hub import BUILTIN
from dynctl.protocol.hosts import EngineQuestion, HostFacts, HostQuestion
from dynctl.topology.inventory import Host

Judge = Callable[[Subject], list[Verdict]]
JointJudge = Callable[[Sequence[Subject]], list[Verdict]]

REACH = "reach"
PLACEMENT = "placement"
_TOLD_ELSEWHERE = ("gpus", "ports", "limits", "shm", "disk ", "engine", "model ", "containers", "dynctl ")
"""Probes whose failure a judge speaks of."""


def probes(subject: Subject) -> list[Verdict]:
    """What could not be looked at, of which no other judge speaks."""
    left = [note for note in subject.facts.notes if not note.startswith(_TOLD_ELSEWHERE)]
    return [unknown(note) for note in left]


JUDGES: dict[str, Judge] = {
    "clock": machine.clock,
    "python": machine.python,
    "dynctl": machine.dynctl,
    "gpus": devices.gpus,
    "gpu use": devices.gpu_use,
    "ports": machine.ports,
    "open files": machine.limits,
    "memlock": devices.memlock,
    "model": programs.model,
    "disk": machine.disk,
    "shm": machine.shm,
    "engine": programs.engine,
    "flags": programs.flags,
    "container": programs.container,
    "rdma": devices.infiniband,
    "transfer": devices.transfer,
    "peermem": devices.peermem,
    "probes": probes,
}
TOGETHER: dict[str, JointJudge] = {
    "clocks": across.clocks,
    "versions": across.versions,
    "gpu types": across.gpu_types,
    "same model": across.same_model,
    "shared": across.shared,
}
CHECKS = (REACH, PLACEMENT, *JUDGES, *TOGETHER, "slurm")
LOGIN = frozenset({REACH, "python", "dynctl", "model", "disk", "engine", "flags", "container", "probes"})
"""What a login node tells of the nodes behind it: what they share with it."""


def judge_host(subject: Subject, topics: Collection[str] = CHECKS) -> list[Finding]:
    """What all judges of `topics` say of one host."""
    return [
        finding
        for check, judge in JUDGES.items()
        if check in topics
        for finding in findings_of(subject.host.name, check, judge(subject))
    ]


def judge_together(subjects: Sequence[Subject], topics: Collection[str] = CHECKS) -> list[Finding]:
    """What must be the same on several hosts; [] for one."""
    if len(subjects) < 2:
        return []
    return [
        finding
        for check, judge in TOGETHER.items()
        if check in topics
        for finding in findings_of(ALL_HOSTS, check, judge(subjects))
    ]


def question(
    host: Host, wanted: Wanted, pythons: tuple[str, ...], topics: Collection[str] = CHECKS
) -> HostQuestion:
    """What to ask a host so that the judges of `topics` can judge it."""
    subject = Subject(host, HostFacts(v=0, host=host.name), wanted)
    recipe = wanted.recipe
    paths, model = [], ""
    if recipe is not None and subject.has_engine:
        given = (recipe.model.tokenizer, recipe.model.chat_template, recipe.engine.container or "")
        paths += [path for path in given if os.path.isabs(path)]
        if "model" in topics and not recipe.engine.container and not recipe.model.path.startswith(BUILTIN):
            at = f"@{recipe.model.revision}" if recipe.model.revision else ""
            model = recipe.model.path + ("" if os.path.isabs(recipe.model.path) else at)
    engine = _engine(subject, topics)
    asks_own = engine is not None and engine.argv0 == OWN
    return HostQuestion(
        paths=tuple(paths),
        model=model,
        ports=machine.fixed_ports(subject),
        engine=engine,
        scratch=subject.home,
        dynctl=pythons if "dynctl" in topics or asks_own else (),
    )


def _engine(subject: Subject, topics: Collection[str]) -> EngineQuestion | None:
    """How its engine is asked; None when it has none, or nobody wants to know."""
    inquiry = subject.wanted.inquiry
    if inquiry is None or not subject.has_engine or "engine" not in topics:
        return None
    # All of it is seen in the host's process list: not what would be masked in a plan.
    shown = Command((), subject.wanted.engine_env()).shown_env()
    return EngineQuestion(
        argv0=inquiry.program,
        version_argv=inquiry.version,
        help_argv=inquiry.help if "flags" in topics else (),
        flag_lines=inquiry.flag_lines,
        env={name: value for name, value in shown.items() if value != MASK},
    )
