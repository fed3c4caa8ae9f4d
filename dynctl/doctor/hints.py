"""Which checks may explain a failed start: from the kind of its failure and the words of its error. Pure."""

from __future__ import annotations

import re

KINDS: dict[str, tuple[str, ...]] = {
    "port_in_use": ("ports",),
    "recipe": ("engine", "model"),
    "launch": ("engine", "disk", "open files"),
}
"""`DynctlError.kind` that a process left → checks."""

_WORDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"address already in use|errno 98|port \d+ .*(taken|in use)|eaddrinuse", ("ports",)),
    (r"out of memory|outofmemory|free memory on device|cuda error|no cuda gpus|busy or unavailable|nvml",
     ("gpus", "gpu use")),
    (r"no space left|errno 28|disk quota|errno 122", ("disk", "shm")),
    (r"/dev/shm|shared memory|bus error|sigbus|errno 12\b", ("shm",)),
    (r"too many open files|errno 24\b", ("open files",)),
    (r"ibv_|memlock|rdma|nixl|ucx|ibverbs|nccl", ("rdma", "transfer", "memlock", "peermem")),
    (r"unrecognized arguments|no such option|unexpected argument|invalid choice", ("engine",)),
    (r"engine program|command not found|modulenotfounderror|no module named|importerror|cannot run",
     ("engine",)),
    (r"config\.json|safetensors|repo id|huggingface|hfvalidation|model.*not (found|exist)|no such file",
     ("model", "engine")),
    (r"permission denied|errno 13\b", ("model", "disk", "engine")),
    (r"killed by sigkill|oom-kill", ("gpus", "shm")),
)  # fmt: skip
"""What errors say → checks, most telling first."""


def topics_of(kind: str, error: str) -> tuple[str, ...]:
    """The checks that may explain it, each once, most telling first; () = none would."""
    found = list(KINDS.get(kind, ()))
    for pattern, topics in _WORDS:
        if re.search(pattern, error, re.IGNORECASE):
            found += topics
    return tuple(dict.fromkeys(found))
