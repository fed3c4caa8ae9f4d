"""The nodes of the job that this process runs in, as an inventory."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dynctl.deploy.slurm_size import MORE_NODES
from dynctl.errors import SlurmError
from dynctl.launchers.slurm_client import SlurmClient
from dynctl.launchers.slurm_step import JobSite
from dynctl.topology.inventory import Host, Inventory

_PORTION = re.compile(r"\bNodes=(\S+) CPU_IDs=\S* Mem=\S* GRES=(\S*)")
_GPUS = re.compile(r"(?:^|,)gpu(?::[A-Za-z_][\w.-]*)?:(\d+)(?=\(|,|$)")


@dataclass(frozen=True, slots=True)
class Allocation:
    """What the job has been given: its nodes, the batch script's first, and the job itself."""

    site: JobSite
    name: str
    inventory: Inventory


def allocation(environ: Mapping[str, str], client: SlurmClient) -> Allocation:
    """The job's nodes, their addresses and GPUs. Raises SlurmError outside a job."""
    job_id = environ.get("SLURM_JOB_ID", "")
    if not job_id:
        raise SlurmError("this does not run in a Slurm job", hint="submit it with sbatch")
    lists = _node_lists(environ)
    groups: dict[str, int] = {}
    for group, text in lists:
        for name in client.hostnames(text):
            if name in groups:
                hint = "slurm.exclusive: true keeps the parts apart"
                raise SlurmError("two parts of the job have this node", where=name, hint=hint)
            groups[name] = group
    names = list(groups)
    first = environ.get("SLURMD_NODENAME", "")
    names.sort(key=lambda name: name != first)  # stable: the others keep Slurm's order
    hosts = hosts_of_job(client, job_id, names)
    ids = tuple(environ.get(f"SLURM_JOB_ID_HET_GROUP_{group}", job_id) for group, _ in lists)
    inventory = Inventory(hosts, f"job {job_id}", more=MORE_NODES)
    site = JobSite(job_id, groups, ids) if len(lists) > 1 else JobSite(job_id)
    return Allocation(site, environ.get("SLURM_JOB_NAME", ""), inventory)


def hosts_of_job(client: SlurmClient, job_id: str, names: Sequence[str]) -> tuple[Host, ...]:
    """These nodes of a job with their addresses and the GPUs it has there. Raises SlurmError."""
    gpus = gpus_by_node(client.job_detail(job_id), client.hostnames)
    addresses = {row.name: row.address for row in client.nodes(names)}
    return tuple(Host(name, address_of(addresses.get(name) or name), gpus.get(name, 0)) for name in names)


def _node_lists(environ: Mapping[str, str]) -> list[tuple[int, str]]:
    """(part, nodes) of the job; one part unless it is a job of several."""
    size = environ.get("SLURM_HET_SIZE", "")
    if size.isdigit() and int(size) > 1:
        return [(i, environ.get(f"SLURM_JOB_NODELIST_HET_GROUP_{i}", "")) for i in range(int(size))]
    return [(0, environ.get("SLURM_JOB_NODELIST", ""))]


def gpus_by_node(detail: str, hostnames: Callable[[str], Sequence[str]]) -> dict[str, int]:
    """GPUs of the job on each node, from `scontrol -d show job`."""
    found: dict[str, int] = {}
    for portion in _PORTION.finditer(detail):
        count = sum(int(number) for number in _GPUS.findall(portion[2]))
        if count:
            found.update(dict.fromkeys(hostnames(portion[1]), count))
    return found


def address_of(name: str) -> str:
    """The numeric address of a node; its name when it cannot be resolved here."""
    try:
        return str(socket.getaddrinfo(name, None, family=socket.AF_INET, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return name
