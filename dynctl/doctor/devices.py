"""Judges of GPUs and of what moves KV blocks between them: devices, drivers, settings. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dynctl.doctor.findings import Verdict, fail, note, ok, unknown, warn
from dynctl.doctor.subject import Subject
from dynctl.protocol.hosts import GpuFacts, IbFacts

Judge = Callable[[str, str], Verdict]

BUSY_SHARE = 0.1
"""Of a GPU's memory in use: engines ask for nine tenths of it."""
LEAST_MEMLOCK = 64 * 1024 * 1024
_RDMA_WAYS = ("rc", "ud", "dc", "ib", "all")
_MEMLOCK = "'{user} - memlock unlimited' in /etc/security/limits.conf, or LimitMEMLOCK=infinity of slurmd"


def gpus(subject: Subject) -> list[Verdict]:
    """There are as many as the recipe uses there, or the inventory says, all of one kind."""
    facts, wanted, host = subject.facts, _gpus_wanted(subject), subject.host.name
    if not facts.gpus:
        return _no_gpus(subject, wanted)
    kinds = sorted({gpu.name for gpu in facts.gpus})
    told = f"{len(facts.gpus)} x {' and '.join(kinds)}, driver {facts.gpus[0].driver}"
    if len(facts.gpus) < wanted:
        why = f"{told}: {wanted} are needed"
        return [fail(why, f"correct the GPUs of {host} in the inventory, or use fewer or smaller replicas")]
    visible = facts.env.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and wanted and not subject.wanted.here:
        return [warn(f"{told}; its shells set CUDA_VISIBLE_DEVICES={visible}", "unset it in start files")]
    if len(kinds) > 1:
        return [warn(f"{told}: a replica over unlike GPUs is as slow as the slowest", "use only those alike")]
    return [ok(told)]


def _gpus_wanted(subject: Subject) -> int:
    if subject.wanted.recipe is None:
        return subject.host.gpus
    if not subject.wants_gpus:
        return 0
    used = subject.node.gpus if subject.node else ()
    return max(used, default=-1) + 1 if used else subject.host.gpus


def _no_gpus(subject: Subject, wanted: int) -> list[Verdict]:
    facts = subject.facts
    why = facts.gpu_note or facts.note("gpus") or "nvidia-smi lists none"
    if facts.gpu_devices or "does not answer" in why:
        remedy = "nvidia-smi must work: see dmesg for NVRM and Xid; the driver may have to be loaded anew"
        told = f"{facts.gpu_devices} devices in /dev, but what they are is not known: {why}"
        return [unknown(told, remedy)]
    if not wanted and not subject.wants_gpus:
        return [note(f"none ({why})")]
    need = f"{wanted} are needed" if wanted else "the recipe needs some"
    other = "--set engine.device=cpu for a CPU build" if subject.wanted.recipe else "correct the inventory"
    return [fail(f"none, {need}: {why}", f"install the driver, or {other}")]


def gpu_use(subject: Subject) -> list[Verdict]:
    """Nobody else is on the GPUs that are to be used."""
    facts, node = subject.facts, subject.node
    if subject.wanted.recipe is not None and not subject.wants_gpus:
        return []
    wanted = set(node.gpus) if node else {gpu.index for gpu in facts.gpus}
    # Without a recipe somebody may well be meant to be there.
    judge = fail if subject.wants_gpus else note
    found = [verdict for gpu in facts.gpus if gpu.index in wanted for verdict in _use(gpu, judge)]
    idle = len(wanted) - len(found)
    return [*found, ok(f"{idle} idle")] if idle > 0 and facts.gpus else found


def _use(gpu: GpuFacts, judge: Judge) -> list[Verdict]:
    who = ", ".join(f"{process.name} (pid {process.pid})" for process in gpu.processes[:3])
    told = f"GPU {gpu.index}: {gpu.used_mib} of {gpu.memory_mib} MiB in use"
    told += f" by {who}" if who else ", by processes that cannot be seen here"
    if gpu.used_mib > BUSY_SHARE * gpu.memory_mib:
        remedy = "end them, use other GPUs, or set a smaller share of the memory in engine.args"
        return [judge(told, remedy)]
    return [warn(told, "end it, if it is not meant to be there")] if gpu.processes else []


def memlock(subject: Subject) -> list[Verdict]:
    """Memory can be pinned for RDMA."""
    told = subject.facts.limits.get("memlock")
    if not told or len(told) != 2:
        return [unknown("the limit of locked memory was not told")]
    soft, hard = told
    if soft == -1:
        return [ok("unlimited locked memory")]
    text = f"{soft // 1024} kB of locked memory"
    if not subject.facts.ib:
        return [ok(f"{text}; there is no RDMA device that would need more")]
    remedy = "ulimit -l unlimited before starting" if hard == -1 else _MEMLOCK.format(user=subject.facts.user)
    if subject.wanted.apart and soft < LEAST_MEMLOCK:
        return [fail(f"{text}: KV blocks cannot be registered with the RDMA devices", remedy)]
    return [warn(f"{text}: RDMA pins what it moves", remedy)]


def infiniband(subject: Subject) -> list[Verdict]:
    """RDMA devices are up, where engines talk to other hosts."""
    ports = subject.facts.ib
    if not ports:
        if subject.wanted.spread:
            remedy = "if it should have some: rdma link, ibstat; else set UCX_TLS=tcp,sm,self,cuda_copy"
            return [warn("no RDMA device: engines on different hosts talk over TCP, far slower", remedy)]
        return [note("no RDMA device")]
    up = [port for port in ports if port.state == "ACTIVE"]
    down = [port for port in ports if port.state != "ACTIVE"]
    found = [ok(f"{_names(up)} active, {up[0].rate}, {up[0].link_layer}")] if up else []
    if down:
        told = f"{_names(down)} {down[0].state.lower() or 'in an unknown state'}"
        remedy = "look at cable and subnet manager: ibstat, ibdiagnet; or leave it out of UCX_NET_DEVICES"
        if not up and subject.wanted.spread:
            found.append(fail(f"{told}: no RDMA device is active", remedy))
        else:
            found.append((warn if subject.wanted.spread else note)(told, remedy))
    return found


def _names(ports: Sequence[IbFacts]) -> str:
    names = [f"{port.device}:{port.port}" for port in ports]
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def transfer(subject: Subject) -> list[Verdict]:
    """Settings of UCX and NIXL name what is there, and leave a fast way open."""
    env, ib = subject.environment(), subject.facts.ib
    given = {name: value for name, value in env.items() if name.startswith(("UCX_", "NIXL_"))}
    judge = fail if subject.wanted.apart and subject.has_engine else warn
    devices, ways = env.get("UCX_NET_DEVICES", ""), env.get("UCX_TLS", "")
    found = _net_devices(devices, ib, list(subject.facts.interfaces), judge)
    found += _ways(ways, bool(ib), bool(subject.facts.gpus), judge)
    if subject.wanted.apart and "NCCL_IB_HCA" in env and "UCX_NET_DEVICES" not in env:
        told = f"NCCL_IB_HCA={env['NCCL_IB_HCA']} says nothing to UCX, which moves the KV blocks"
        found.append(note(told, "set UCX_NET_DEVICES too, as in mlx5_0:1,mlx5_1:1"))
    if found:
        return found
    told = ", ".join(f"{name}={value}" for name, value in sorted(given.items()))
    return [ok(told or "no setting: all ways open")]


def _net_devices(
    wanted: str, ib: Sequence[IbFacts], interfaces: Sequence[str], judge: Judge
) -> list[Verdict]:
    if not wanted or wanted == "all" or wanted.startswith("^"):
        return []
    there = {f"{port.device}:{port.port}" for port in ib} | {port.device for port in ib}
    there |= set(interfaces)
    missing = [name for name in wanted.split(",") if name.strip() not in there]
    if not missing:
        return []
    names = ", ".join(sorted(f"{port.device}:{port.port}" for port in ib)) or "no RDMA device"
    remedy = f"correct UCX_NET_DEVICES in engine.env or in the host's start files; there is: {names}"
    return [judge(f"UCX_NET_DEVICES names {', '.join(missing)}, which is not there", remedy)]


def _ways(wanted: str, rdma: bool, gpus: bool, judge: Judge) -> list[Verdict]:
    ways = [way.strip() for way in wanted.split(",") if way.strip()]
    if not ways or ways[0].startswith("^"):
        return []
    fast = any(way.split("_")[0] in _RDMA_WAYS for way in ways)
    found = []
    if rdma and not fast:
        told = f"UCX_TLS={wanted} leaves out RDMA, which is there"
        found.append(warn(told, "unset UCX_TLS, or add rc; containers often preset it"))
    if gpus and not any(way.startswith("cuda") or way == "all" for way in ways):
        told = f"UCX_TLS={wanted} leaves out the GPUs' memory"
        found.append(judge(told, "add cuda_copy and cuda_ipc, or unset UCX_TLS"))
    return found


def peermem(subject: Subject) -> list[Verdict]:
    """RDMA devices reach GPU memory without a detour through the host's."""
    facts = subject.facts
    if not (facts.ib and (facts.gpus or facts.gpu_devices)):
        return []
    loaded = facts.modules.get("nvidia_peermem")
    if loaded is None:
        return [unknown("the kernel does not tell which modules are loaded")]
    if loaded:
        return [ok("nvidia_peermem is loaded")]
    told = "nvidia_peermem is not loaded: unless driver and UCX use DMA-BUF, KV blocks go through host memory"
    return [(warn if subject.wanted.spread else note)(told, "as root: modprobe nvidia_peermem")]
