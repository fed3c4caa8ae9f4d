"""What one host has, as one line of JSON: run by any Python from 3.8 on, without dynctl, from standard input.

`python3 - '{"paths": [...], ...}' < hostfacts.py` over SSH or srun; `protocol.hosts` has both sides' fields.
Every probe has a time of its own and runs beside the others: one that fails or hangs becomes a note, and its
field stays empty. Nothing but the line is written to standard output.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import pwd
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # A subscript that is evaluated would need Python 3.9.
    Json = dict[str, Any]
    Probe = Callable[[], Any]

VERSION = 1
OWN = "{dynctl-python}"
PROBE_S = 5.0
ENGINE_S = 60.0
FINGERPRINT_S = 3.0
MOST_LEFTOVERS = 40
MODULES = ("nvidia_peermem", "gdrdrv")
WEIGHTS = (".safetensors", ".json", ".model", ".bin", ".pt", ".pth", ".gguf")
PREFIXES = ("UCX_", "NIXL_", "NCCL_")
NAMES = ("CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "LD_LIBRARY_PATH", "SLURM_CONF")
JOB = ("SLURM_JOB_ID", "SLURM_JOB_PARTITION", "SLURMD_NODENAME", "SLURM_JOB_NODELIST", "SLURM_GPUS_ON_NODE")
FLAGS = r"(?m)^ {1,8}(-[\w-]+.*)$"
"""Lines of a help text that define flags, unless the engine's are other ones."""
GPU_COLUMNS = "index,name,memory.total,memory.used,driver_version,uuid"
EXPECTED = (OSError, ValueError, LookupError, TypeError, AttributeError, subprocess.SubprocessError)
"""What a probe may end with: told in a note."""


def run(argv: Sequence[str], time_s: float = PROBE_S, env: Json | None = None) -> tuple[int, str, str]:
    """Exit code and output of a program, which ends in time. Raises OSError, TimeoutExpired."""
    child = subprocess.Popen(
        list(argv),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "COLUMNS": "200", **(env or {})},
        cwd="/",
        start_new_session=True,
    )
    try:
        out, err = child.communicate(timeout=time_s)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait(1)
        raise
    finally:
        for pipe in filter(None, (child.stdout, child.stderr)):
            pipe.close()
    return child.returncode, out.decode("utf-8", "replace"), err.decode("utf-8", "replace")


def lines_of(path: str) -> list[str]:
    """The lines of a small text file. Raises OSError."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read().splitlines()


def word_in(path: str) -> str:
    """The first line of a file; "" when there is none to be read."""
    try:
        return lines_of(path)[0].strip()
    except (OSError, IndexError):
        return ""


def whole(text: str) -> int:
    """The number a text begins with before any dot; 0 for one that is none."""
    return int(digits) if (digits := text.strip().split(".")[0]).isdigit() else 0


def engine_of(asked: Json, own: Sequence[str] = ()) -> Json:
    """{"found", "version", "flags", "note"} of a program (`OWN`: first of `own`); flags None = not told."""
    python = next(filter(shutil.which, map(os.path.expanduser, own)), OWN)
    asked = json.loads(json.dumps(asked).replace(OWN, json.dumps(python)[1:-1]))
    env = asked.get("env") or {}
    found = shutil.which(asked["argv0"], path=env.get("PATH") or os.environ.get("PATH"))
    if not found:
        return {"found": "", "version": "", "flags": None, "note": "not there, or may not be run"}
    notes, version, flags = [], "", None
    if asked.get("version_argv"):
        text, note = _answer(asked["version_argv"], env)
        version = version_in(text)
        notes.append(note or ("" if version else "tells no version"))
    if asked.get("help_argv"):
        text, note = _answer(asked["help_argv"], env)
        flags = flags_in(text, asked.get("flag_lines") or FLAGS) or None
        notes.append(note or ("" if flags else "its help lists no flags"))
    return {"found": found, "version": version, "flags": flags, "note": "; ".join(filter(None, notes))}


def _answer(argv: Sequence[str], env: Json) -> tuple[str, str]:
    """What a program prints, and why it prints nothing of use ("" = it does)."""
    called = argv[0] if "-c" in argv[1:] else " ".join(argv)
    try:
        code, out, err = run(argv, ENGINE_S, env)
    except subprocess.TimeoutExpired:
        return "", f"{called}: no end after {ENGINE_S:g} s"
    except OSError as error:
        return "", f"{called}: {error.strerror or error}"
    if code:
        last = [line for line in (err or out).splitlines() if line.strip()][-1:]
        return "", f"{called}: exit code {code}: {''.join(last).strip()[:200]}"
    return out if out.strip() else err, ""


def version_in(text: str) -> str:
    """The last thing in a text that looks like a version: banners come before the answer."""
    found = re.findall(r"\bv?(\d+\.\d+[\w.+-]*)", text)
    return found[-1] if found else ""


def flags_in(text: str, pattern: str) -> list[str]:
    """The long flags at the heads of the lines that `pattern` finds, sorted.

    A head is "-c, --config FILE" or "--[no-]x, --y [{a,b}]", and ends where two blanks begin a description.
    """
    flags: set[str] = set()
    for line in re.findall(pattern, re.sub(r"\x1b\[[0-9;]*m", "", text)):
        head = re.split(r"\s{2,}", line.strip())[0]
        for flag in re.findall(r"(?:^|[\s,/|])(--(?:\[no-\])?[A-Za-z0-9][\w-]*)", head):
            flags.update([flag] if "[" not in flag else [flag.replace("[no-]", ""), "--no-" + flag[7:]])
    return sorted(flags)


def dynctl_of(python: str) -> list[Json]:
    """Which dynctl a Python would run; version "" = none."""
    code = "import importlib.metadata as m; print(m.version('dynctl'))"
    try:
        done, out, _ = run([os.path.expanduser(python), "-c", code])
    except (OSError, subprocess.SubprocessError):
        done, out = 1, ""
    return [{"python": python, "version": "" if done else out.strip()}]


def pythons(asked: Sequence[str]) -> list[str]:
    """Those asked for, and the one that runs the dynctl on PATH."""
    found = shutil.which("dynctl")
    head = word_in(found).partition(" ")[0] if found else ""
    return list(dict.fromkeys([*asked, *([head[2:]] if head.startswith("#!/") else [])]))


def containers() -> Json:
    """Versions of what runs containers, "" = not there; pyxis None = Slurm could not be asked."""
    found: Json = {"apptainer": "", "enroot": "", "pyxis": None}
    for name, word in (("apptainer", "--version"), ("enroot", "version")):
        if shutil.which(name):
            found[name] = version_in(run([name, word], 3.0)[1]) or "there"
    if shutil.which("srun"):
        found["pyxis"] = "--container-image" in run(["srun", "--help"], 3.0)[1]
    return found


def slurm() -> Json | None:
    """What this host has of Slurm, and the job this runs in; None = neither."""
    program = shutil.which("sinfo")
    job = {name[6:].lower(): os.environ[name] for name in JOB if name in os.environ}
    if program is None:
        return {"sinfo": "", "version": "", **job} if job else None
    return {"sinfo": program, "version": version_in(run([program, "--version"], 3.0)[1]), **job}


def gpus() -> Json:
    """`gpus`, or `gpu_note` with why they are not known. `gpu_devices` are counted without a tool."""
    devices = len(glob.glob("/dev/nvidia[0-9]*"))
    program = shutil.which("nvidia-smi")
    if program is None:
        amd = "; AMD's are not looked at" if os.path.exists("/dev/kfd") else ""
        return {"gpu_devices": devices, "gpu_note": "nvidia-smi is not on PATH" + amd}
    try:
        code, out, err = run([program, "--query-gpu=" + GPU_COLUMNS, "--format=csv,noheader,nounits"], 4.5)
    except subprocess.TimeoutExpired:
        return {"gpu_devices": devices, "gpu_note": "nvidia-smi does not answer"}
    if code:
        said = [*(err or out).strip().splitlines(), f"exit code {code}"]
        return {"gpu_devices": devices, "gpu_note": f"nvidia-smi: {said[0]}"}
    apps = "--query-compute-apps=gpu_uuid,pid,process_name,used_memory"
    users = run([program, apps, "--format=csv,noheader,nounits"], 4.5)[1]
    return {"gpu_devices": devices, "gpus": gpus_in(out, users)}


def gpus_in(table: str, users: str) -> list[Json]:
    """nvidia-smi's two CSV tables as GPUs with their processes; "[N/A]" is 0."""
    found: list[Json] = []
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 6 and cells[0].isdigit():
            index, name, memory, used, driver, uuid = cells
            gpu: Json = {"index": int(index), "name": name, "driver": driver, "uuid": uuid}
            found.append({**gpu, "memory_mib": whole(memory), "used_mib": whole(used), "processes": []})
    by_uuid = {gpu["uuid"]: gpu for gpu in found}
    for line in users.splitlines():
        # A process name is a path and may hold commas: what is around it does not.
        uuid, _, rest = line.partition(",")
        pid, _, rest = rest.strip().partition(",")
        name, _, used = rest.strip().rpartition(",")
        if uuid.strip() in by_uuid and pid.strip().isdigit():
            process = {"pid": int(pid), "name": name.strip(), "used_mib": whole(used)}
            by_uuid[uuid.strip()]["processes"].append(process)
    return found


def infiniband(root: str = "/sys/class/infiniband") -> list[Json]:
    """Every port of every RDMA device, Ethernet ones (RoCE) included."""
    found = []
    for port in sorted(glob.glob(root + "/*/ports/*")):
        facts = {name: word_in(f"{port}/{name}") for name in ("state", "rate", "link_layer")}
        facts["state"] = facts["state"].rpartition(":")[2].strip()
        found.append({"device": port.split("/")[-3], "port": whole(os.path.basename(port)), **facts})
    return found


def modules(names: Sequence[str] = MODULES) -> Json:
    """Whether kernel modules are loaded; None = the kernel does not tell."""
    try:
        loaded = {line.split()[0] for line in lines_of("/proc/modules")}
    except OSError:
        return {name: os.path.isdir("/sys/module/" + name) or None for name in names}
    return {name: name in loaded or os.path.isdir("/sys/module/" + name) for name in names}


def sockets(asked: Sequence[int], proc: str = "/proc") -> Json:
    """`listening`: ports on which somebody does. `holders`: who, of those asked for: "name (pid N)"."""
    ports: dict[int, set[str]] = {}
    for table in glob.glob(proc + "/net/tcp*"):
        for fields in (row.split() for row in lines_of(table)[1:]):
            if fields[3] == "0A":
                ports.setdefault(int(fields[1].rpartition(":")[2], 16), set()).add(fields[9])
    wanted = {f"socket:[{inode}]": port for port in asked for inode in ports.get(port, ())}
    holders: Json = {}
    for link in glob.iglob(proc + "/[0-9]*/fd/*") if wanted else ():
        port = wanted.get(_link(link))
        if port is not None and str(port) not in holders:
            pid = link.split("/")[-3]
            holders[str(port)] = f"{word_in(f'{proc}/{pid}/comm') or 'a process'} (pid {pid})"
    return {"listening": sorted(ports), "holders": holders}


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def ephemeral() -> list[int]:
    """First and last port that the kernel gives to outgoing connections."""
    return [int(word) for word in lines_of("/proc/sys/net/ipv4/ip_local_port_range")[0].split()]


def interfaces() -> Json:
    """Addresses by interface, as `ip` tells them."""
    found: Json = {}
    for line in run(["ip", "-o", "addr", "show"])[1].splitlines():
        fields = line.split()
        if len(fields) > 3 and fields[2] in ("inet", "inet6"):
            found.setdefault(fields[1], []).append(fields[3].split("/")[0])
    return found


def path_facts(path: str) -> Json:
    """A path as this user finds it; it may begin with ~."""
    full = os.path.expanduser(path)
    facts: Json = {"exists": os.path.lexists(full), "readable": False, "is_dir": os.path.isdir(full)}
    facts.update(dev=0, fstype="", fingerprint="", unread="")
    try:
        facts["dev"] = os.stat(full).st_dev
        facts["readable"] = os.access(full, os.R_OK | (os.X_OK if facts["is_dir"] else 0))
        facts["fstype"] = fstype_of(os.path.realpath(full), lines_of("/proc/self/mounts"))
        facts["fingerprint"] = fingerprint(full) if facts["readable"] else ""
    except (FileNotFoundError, NotADirectoryError):
        return facts
    except PermissionError as error:  # below a directory that may not be entered, or a file in it
        return {**facts, "exists": True, "readable": False, "unread": error.filename}
    return facts


def fstype_of(path: str, mounts: Sequence[str]) -> str:
    """The type of the file system that holds an absolute path, "" when none is known."""
    best, kind = "", ""
    for fields in (line.split() for line in mounts):
        at = fields[1].encode().decode("unicode_escape") if len(fields) > 2 else ""
        inside = path == at or path.startswith(at.rstrip("/") + "/")
        if at and inside and len(at) >= len(best):
            best, kind = at, fields[2]
    return kind


def fingerprint(path: str) -> str:
    """The same for the same content: a file's digest, or one of a directory's file names and sizes.

    In a directory config.json counts by its content too. "" for one that takes longer than it may. Raises
    PermissionError for a file of a model in it that is not readable or a link to nothing.
    """
    if not os.path.isdir(path):
        return _digest(path)
    entries, ends = [], time.monotonic() + FINGERPRINT_S
    for folder, _, names in os.walk(path):
        for full in (os.path.join(folder, name) for name in names):
            if full.endswith(WEIGHTS) and not os.access(full, os.R_OK):
                raise PermissionError(0, "not readable", full)
            size = os.path.getsize(full) if os.path.exists(full) else -1
            entries.append(f"{os.path.relpath(full, path)} {size}")
        if time.monotonic() > ends:
            return ""
    config = os.path.join(path, "config.json")
    entries = [*sorted(entries), _digest(config) if os.path.isfile(config) else ""]
    return hashlib.sha256("\n".join(entries).encode("utf-8", "surrogateescape")).hexdigest()


def _digest(path: str) -> str:
    """SHA-256 of a file; of a large one over its size and first mebibyte."""
    with open(path, "rb") as file:
        head, size = file.read(1 << 20), os.fstat(file.fileno()).st_size
    return hashlib.sha256(head if size <= len(head) else str(size).encode() + head).hexdigest()


def model_facts(model: str) -> Json:
    """Where the model is, and what is there."""
    at = model_path(model)
    return {"model_at": at, "paths": {at: path_facts(at)} if at else {}}


def model_path(model: str) -> str:
    """A model's directory: itself, or for ID or ID@REVISION the snapshot in this user's cache ("" = none)."""
    if model.startswith(("/", "~", ".")):
        return model
    model, _, revision = model.partition("@")
    home = os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")
    hub = os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
    folder = os.path.join(hub, "models--" + model.replace("/", "--"))
    commit = word_in(f"{folder}/refs/{revision or 'main'}") or revision
    found = os.path.join(folder, "snapshots", commit)
    return found if commit and os.path.isdir(found) else ""


def disk(path: str) -> Json:
    """Bytes free to this user and in all, and the file system's type, where `path` is or would be made."""
    at = os.path.abspath(os.path.expanduser(path))
    while not os.path.exists(at):
        at = os.path.dirname(at)
    found = os.statvfs(at)
    kind = fstype_of(os.path.realpath(at), lines_of("/proc/self/mounts"))
    return {"free": found.f_bavail * found.f_frsize, "total": found.f_blocks * found.f_frsize, "fstype": kind}


def shared_memory(root: str = "/dev/shm") -> Json:
    """What is free, and the largest files there that no process we can see has open or mapped."""
    used, now = _in_use(root + "/"), time.time()
    left: list[Json] = []
    for entry in os.scandir(root):
        if entry.path in used or not entry.is_file(follow_symlinks=False):
            continue
        found = entry.stat(follow_symlinks=False)
        size, age = found.st_blocks * 512, max(0.0, now - found.st_mtime)
        left.append({"name": entry.name, "bytes": size, "age_s": age, "owner": _user(found.st_uid)})
    left.sort(key=lambda file: (-file["bytes"], file["name"]))
    return {**disk(root), "leftovers": left[:MOST_LEFTOVERS]}


def _in_use(prefix: str) -> set[str]:
    """What processes have open, and what of `prefix` they have mapped, as far as we may see."""
    found = {_link(link) for link in glob.iglob("/proc/[0-9]*/fd/*")}
    for maps in glob.iglob("/proc/[0-9]*/maps"):
        try:
            found.update(line[line.index(prefix) :] for line in lines_of(maps) if prefix in line)
        except OSError:
            continue  # ended since, or not ours to look into
    return found


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def limits() -> Json:
    """[soft, hard] of the limits that matter; -1 = none."""
    kinds = {name: getattr(resource, f"RLIMIT_{name.upper()}") for name in ("nofile", "memlock", "nproc")}
    return {name: [int(value) for value in resource.getrlimit(kind)] for name, kind in kinds.items()}


def base() -> Json:
    """What needs no probe, and the empty form of what does."""
    facts: Json = {name: [] for name in ("dynctl", "gpus", "listening", "ephemeral", "ib", "notes")}
    facts.update({name: {} for name in ("holders", "limits", "disk", "paths", "interfaces")})
    facts.update(gpu_note="", gpu_devices=0, model_at="", shm=None, engine=None, slurm=None)
    facts.update(modules=dict.fromkeys(MODULES), containers={"apptainer": "", "enroot": "", "pyxis": None})
    return {
        **facts,
        "v": VERSION,
        "host": socket.gethostname(),
        "user": _user(os.getuid()),
        "uid": os.getuid(),
        "home": os.path.expanduser("~"),
        "now": time.time(),
        "python": {"path": sys.executable or "", "version": platform.python_version()},
        "path_dynctl": shutil.which("dynctl") or "",
        "env": {k: v for k, v in os.environ.items() if k.startswith(PREFIXES) or k in NAMES},
    }


def probes(asked: Json) -> Iterator[tuple[str, float, Probe]]:
    """(name, seconds, what gives fields of the facts)."""
    yield "gpus", 2 * PROBE_S, gpus
    yield "ports", PROBE_S, partial(sockets, asked.get("ports") or [])
    yield "containers", 2 * PROBE_S, partial(_field, "containers", containers)
    for name in ("limits", "infiniband", "modules", "slurm", "shared_memory", "interfaces", "ephemeral"):
        field = {"infiniband": "ib", "shared_memory": "shm"}.get(name, name)
        yield field, PROBE_S, partial(_field, field, globals()[name])
    for python in (own := pythons(asked.get("dynctl") or [])):
        yield f"dynctl {python}", PROBE_S + 1, partial(_field, "dynctl", dynctl_of, python)
    for path in dict.fromkeys(asked.get("paths") or []):
        yield f"path {path}", PROBE_S, partial(_item, "paths", path, path_facts)
    if asked.get("model"):
        yield f"model {asked['model']}", PROBE_S, partial(model_facts, asked["model"])
    for path in sorted({os.path.expanduser("~"), asked.get("scratch") or "/tmp"}):
        yield f"disk {path}", PROBE_S, partial(_item, "disk", path, disk)
    if asked.get("engine"):
        yield "engine", 2 * ENGINE_S + 1, partial(_field, "engine", engine_of, asked["engine"], own)


def _field(name: str, make: Callable[..., Any], *args: Any) -> Json:
    return {name: make(*args)}


def _item(name: str, key: str, make: Callable[[str], Any]) -> Json:
    return {name: {key: make(key)}}


def collect(asked: Json) -> Json:
    """All facts. A probe that is late is left behind in its thread: it may hang on a dead file server."""
    facts, started, begun = base(), [], time.monotonic()
    for name, time_s, probe in probes(asked):
        answer: list[Any] = []
        thread = threading.Thread(target=_guarded, args=(probe, answer), daemon=True)
        thread.start()
        started.append((name, time_s, thread, answer))
    for name, time_s, thread, answer in started:
        thread.join(max(0.0, begun + time_s - time.monotonic()))
        if not answer:
            facts["notes"].append(f"{name}: no answer after {time_s:g} s")
        elif isinstance(answer[0], str):
            facts["notes"].append(f"{name}: {answer[0]}")
        else:
            _merge(facts, answer[0])
    return {**facts, "took_s": time.monotonic() - begun}


def _guarded(probe: Probe, answer: list[Any]) -> None:
    """Put a probe's fields into `answer`, or the text of its failure."""
    try:
        answer.append(probe())
    except EXPECTED as error:
        answer.append(f"{type(error).__name__}: {error}")


def _merge(facts: Json, fields: Json) -> None:
    for name, value in fields.items():
        if isinstance(facts[name], dict):
            facts[name].update(value)
        elif isinstance(facts[name], list):
            facts[name].extend(value)
        else:
            facts[name] = value


def main(argv: Sequence[str]) -> None:
    """Print the facts and leave at once, whatever still hangs."""
    sys.stdout.write(json.dumps(collect(json.loads(argv[0]) if argv else {})) + "\n")
    sys.stdout.flush()
    os.close(sys.stdout.fileno())
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
