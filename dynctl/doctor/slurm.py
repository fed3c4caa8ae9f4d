"""Judges of a Slurm partition against the recipe, from what scontrol and sinfo print. Pure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dynctl.doctor.findings import Verdict, fail, note, ok, unknown, warn
from dynctl.recipe.schema import Slurm

PARTITIONS = ("scontrol", "-o", "show", "partition")
NODES = ("sinfo", "-h", "-N", "-o", "%N|%P|%t|%G|%f")
"""One line for each node and partition: `sinfo -t` would also list drained ones as idle."""
_UNUSABLE = ("down", "drain", "drng", "fail", "maint", "inval", "unk", "boot", "no_respond", "power", "futr")
DAY_S = 86400.0
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


@dataclass(frozen=True, slots=True)
class Node:
    """One node of a partition. `state` is Slurm's short word, with * when it does not answer."""

    name: str
    partition: str
    state: str
    gpus: int
    features: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether jobs are put on it, now or when others end."""
        return not self.state.endswith("*") and not self.state.startswith(_UNUSABLE)


def partitions_in(text: str) -> dict[str, dict[str, str]]:
    """`scontrol -o show partition` by name: what each says, by Slurm's own words."""
    found = {}
    for line in text.splitlines():
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if "PartitionName" in fields:
            found[fields["PartitionName"]] = fields
    return found


def nodes_in(text: str) -> list[Node]:
    """The lines of `NODES`; the default partition's name comes with an asterisk."""
    found = []
    for line in text.splitlines():
        cells = line.strip().split("|")
        if len(cells) == 5:
            name, partition, state, gres, features = cells
            words = tuple(word for word in features.split(",") if word and word != "(null)")
            found.append(Node(name, partition.rstrip("*"), state, gpus_of(gres), words))
    return found


def gpus_of(gres: str) -> int:
    """GPUs of a Gres such as "gpu:h100:8(S:0-1),shard:16"."""
    plain = re.sub(r"\([^)]*\)", "", gres)
    parts = [part.split(":") for part in plain.split(",") if part.split(":")[0] == "gpu"]
    return sum(int(part[-1]) if part[-1].isdigit() else 1 for part in parts)


def seconds_of(text: str) -> float:
    """A time limit of Slurm ("1-00:00:00", "30:00", "UNLIMITED") in seconds; infinity for none."""
    if text in ("UNLIMITED", "INFINITE", "NONE", "n/a", ""):
        return float("inf")
    found = _TIME.fullmatch(text)
    if found is None:
        return float("inf")
    days, *given = found.groups()
    first, second, third = (int(number) if number is not None else None for number in given)
    parts = [number for number in (first, second, third) if number is not None]
    if days is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return int(days) * DAY_S + hours * 3600 + minutes * 60 + seconds
    if len(parts) == 3:
        return parts[0] * 3600.0 + parts[1] * 60 + parts[2]
    return parts[0] * 60.0 + (parts[1] if len(parts) == 2 else 0)


def judge_parts(parts: Mapping[str, Slurm], partitions: str, nodes: str) -> list[Verdict]:
    """Whether each part of a job can run; what is said of one is headed by its name, if it has any."""
    told = ((name, verdict) for name, part in parts.items() for verdict in judge(part, partitions, nodes))
    return [
        one._replace(message=f"part {name}: {one.message}" if name else one.message) for name, one in told
    ]


def judge(wanted: Slurm, partitions: str, nodes: str) -> list[Verdict]:
    """Whether a job of the recipe's `slurm` section can run, now or ever."""
    known = partitions_in(partitions)
    if not known:
        return [unknown("scontrol tells of no partition", "run doctor where sinfo shows some: a login node")]
    name = wanted.partition or next((n for n, f in known.items() if f.get("Default") == "YES"), "")
    if not name:
        return [fail("no partition is the default", f"set slurm.partition: {', '.join(sorted(known))}")]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? there are" if near else "there are"
        return [fail(f"no partition {name}", f"correct slurm.partition: {hint} {', '.join(sorted(known))}")]
    there = [node for node in nodes_in(nodes) if node.partition == name]
    found = [*_partition(wanted, name, known[name]), *_nodes(wanted, name, there)]
    return found or [ok(f"partition {name} takes it")]


def _partition(wanted: Slurm, name: str, fields: Mapping[str, str]) -> list[Verdict]:
    """What the partition itself refuses."""
    found = []
    if fields.get("State", "UP") != "UP":
        found.append(fail(f"partition {name} is {fields['State']}", "choose another slurm.partition"))
    longest = fields.get("MaxTime", "")
    if wanted.time is not None and wanted.time > seconds_of(longest):
        told = f"partition {name} gives a job {longest} at most, slurm.time is {wanted.time:.0f} s"
        found.append(fail(told, f"--set slurm.time={seconds_of(longest):.0f}, or another partition"))
    usual = min((fields.get("DefaultTime", ""), longest), key=seconds_of)
    if wanted.time is None and seconds_of(usual) < DAY_S:
        told = f"without slurm.time partition {name} ends the service after {usual}"
        found.append(warn(told, f"set slurm.time, at most {longest}"))
    most = fields.get("MaxNodes", "UNLIMITED")
    if wanted.nodes and most.isdigit() and wanted.nodes > int(most):
        told = f"partition {name} gives a job {most} nodes at most, slurm.nodes is {wanted.nodes}"
        found.append(fail(told, "fewer nodes, or another partition"))
    for field, word in (("account", "AllowAccounts"), ("qos", "AllowQos")):
        given, allowed = getattr(wanted, field), fields.get(word, "ALL").split(",")
        if given and "ALL" not in allowed and given not in allowed:
            found.append(
                fail(f"partition {name} is not for {field} {given}", f"allowed: {', '.join(allowed)}")
            )
    return found


def _nodes(wanted: Slurm, name: str, nodes: Sequence[Node]) -> list[Verdict]:
    """Whether there are as many nodes as wanted that fit and can be used."""
    if not nodes:
        return [unknown(f"sinfo tells of no node of partition {name}")]
    need, gpus = wanted.nodes or 1, wanted.gpus_per_node or 0
    plain = re.fullmatch(r"[\w.-]*", wanted.constraint) is not None
    features = {wanted.constraint} if plain and wanted.constraint else set()
    fitting = [node for node in nodes if node.gpus >= gpus and features <= set(node.features)]
    usable = [node for node in fitting if node.usable]
    what = f"{gpus} GPUs" if gpus else "what is asked"
    if features:
        what += f" and feature {wanted.constraint}"
    if len(fitting) < need:
        most = max(node.gpus for node in nodes)
        told = f"{len(fitting)} nodes of partition {name} have {what}, {need} are needed"
        return [fail(told, f"its nodes have {most} GPUs at most: correct slurm.nodes or slurm.gpus_per_node")]
    if len(usable) < need:
        states = ", ".join(sorted({f"{node.name} {node.state}" for node in fitting if not node.usable}))
        told = f"{len(usable)} of the {need} nodes needed can be used: {states}"
        return [fail(told, "wait, or have them resumed: scontrol update nodename=NODE state=resume")]
    found = [ok(f"{len(usable)} nodes of partition {name} have {what}")]
    idle = sum(node.state == "idle" for node in usable)
    if idle < need:
        found.append(note(f"{idle} of them are idle now, {need} are needed: the job will wait"))
    if not plain:
        found.append(unknown(f"constraint {wanted.constraint} was not compared with the nodes' features"))
    return found
