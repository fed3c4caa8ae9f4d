"""Judges of all hosts together: what must be the same everywhere. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from dynctl.doctor.findings import Verdict, fail, note, ok, unknown, warn
from dynctl.doctor.machine import SKEW_WARN_S, SYNC
from dynctl.doctor.subject import Subject

SHARED_TYPES = frozenset(
    {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "wekafs", "pvfs2", "orangefs", "panfs", "afs", "cifs"}
    | {"smb3", "9p", "virtiofs", "glusterfs", "fuse.glusterfs", "fuse.juicefs", "fuse.sshfs", "fuse.beegfs"}
)
"""File systems that several hosts see alike. Others may be as well, but that shows only by trying."""


def by_value(subjects: Iterable[Subject], value: Callable[[Subject], str]) -> dict[str, list[str]]:
    """Value → names of the hosts that have it; hosts without one ("") are left out."""
    found: dict[str, list[str]] = {}
    for subject in subjects:
        if told := value(subject):
            found.setdefault(told, []).append(subject.host.name)
    return found


def _told(values: Mapping[str, Sequence[str]]) -> str:
    """Most hosts first: "535.1 on n1 and n2, 550.2 on n3"."""
    ordered = sorted(values.items(), key=lambda item: -len(item[1]))
    return ", ".join(f"{value} on {' and '.join(hosts)}" for value, hosts in ordered)


def clocks(subjects: Sequence[Subject]) -> list[Verdict]:
    """How far the hosts' clocks are from each other, whatever ours shows."""
    timed = [s for s in subjects if s.facts.now and s.asked_at]
    told = sorted(((s.facts.now - s.asked_at, s) for s in timed), key=lambda pair: pair[0])
    if len(told) < 2:
        return []
    (least, behind), (most, ahead) = told[0], told[-1]
    sure = most - least - behind.within_s - ahead.within_s
    if sure > SKEW_WARN_S:
        text = f"the clocks of {behind.host.name} and {ahead.host.name} are {most - least:.1f} s apart"
        return [warn(text, SYNC)]
    return [ok(f"within {max(0.1, most - least):.1f} s of each other")]


def versions(subjects: Sequence[Subject]) -> list[Verdict]:
    """Engines of one version, drivers of one version: KV blocks and collectives cross hosts."""
    with_engine = [subject for subject in subjects if subject.has_engine]
    engines = by_value(with_engine, lambda s: s.facts.engine.version if s.facts.engine else "")
    drivers = by_value(subjects, lambda s: s.facts.gpus[0].driver if s.facts.gpus else "")
    found = []
    if len(engines) > 1:
        remedy = "install one version everywhere: the KV cache's layout differs between versions"
        judge = fail if any(subject.wanted.spread for subject in subjects) else warn
        found.append(judge(f"different engines: {_told(engines)}", remedy))
    if len(drivers) > 1:
        found.append(warn(f"different drivers: {_told(drivers)}", "install one driver everywhere"))
    if not found and (engines or drivers):
        found.append(ok("engine and driver are the same on all hosts"))
    return found


def gpu_types(subjects: Sequence[Subject]) -> list[Verdict]:
    """GPUs of one type: replicas that are not alike get requests as if they were."""
    types = by_value(subjects, lambda s: " and ".join(sorted({gpu.name for gpu in s.facts.gpus})))
    if len(types) > 1:
        remedy = "give unlike hosts deployments of their own"
        return [warn(f"different GPUs: {_told(types)}", remedy)]
    return [ok(f"{next(iter(types))} on all hosts")] if types else []


def same_model(subjects: Sequence[Subject]) -> list[Verdict]:
    """The model's files are the same wherever an engine reads them."""
    engines = [s for s in subjects if s.has_engine and s.facts.model_at]
    prints = by_value(engines, _fingerprint)
    if len(prints) > 1:
        groups = sorted(prints.values(), key=len)
        odd = " and ".join(groups[0])
        most = " and ".join(groups[-1])
        told = f"the model on {odd} is not the one on {most}: names, sizes or config.json differ"
        path = engines[0].facts.model_at
        return [fail(told, f"rsync -a --delete {groups[-1][0]}:{path}/ {odd.split(' ')[0]}:{path}/")]
    missing = [s.host.name for s in engines if not _fingerprint(s)]
    if missing and len(engines) > 1:
        return [unknown(f"the model's files on {' and '.join(missing)} were not compared")]
    return [ok("the same files on all hosts")] if len(engines) > 1 else []


def _fingerprint(subject: Subject) -> str:
    at = subject.facts.paths.get(subject.facts.model_at)
    return at.fingerprint if at else ""


def shared(subjects: Sequence[Subject]) -> list[Verdict]:
    """Whether the directory of runs looks shared, by the type of its file system alone."""
    home = subjects[0].home
    types = by_value(subjects, lambda s: s.facts.disk[s.home].fstype if s.home in s.facts.disk else "")
    if not types:
        return [unknown(f"{home}: on which file system it is was not told")]
    if len(types) == 1 and next(iter(types)) in SHARED_TYPES:
        return [ok(f"{home} is on {next(iter(types))}, which hosts share")]
    return [note(f"{home} is on {_told(types)}: not shared, or it does not show; --shared DIR tries it")]


def token_seen(directory: str, writer: str, seen: Mapping[str, str], token: str) -> list[Verdict]:
    """What of the token that `writer` left in `directory` the others found: host → digest, "" = nothing."""
    blind = [host for host, digest in seen.items() if digest != token]
    if blind:
        told = f"a file written in {directory} on {writer} is not seen on {' and '.join(blind)}"
        return [fail(told, "mount the same file system there, or name a directory that is shared")]
    return [ok(f"a file written in {directory} on {writer} is seen on all hosts")]
