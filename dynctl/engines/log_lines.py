"""Why an engine died, out of its log. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

_PREFIX = re.compile(
    r"^(?:\x1b\[[0-9;]*m|\([\w ]+ pid=\d+\)|\[?\d{4}-\d\d-\d\d[ T][\d:.,]+(?: [A-Z]+\d+(?: [A-Z]+\d+)*)?\]?"
    r"|(?:ERROR|CRITICAL|FATAL) \d\d-\d\d [\d:.]+|\[[\w/]+\.(?:py|cpp|cc|rs):\d+\]|\s)+"
)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_NOISE = re.compile(
    r"nanobind|leaked|resource_tracker|numactl|libnuma|tcmalloc|ulimit|^\s*- |deprecat"
    r"|(?:User|Future|Deprecation|Runtime|Import)Warning|^\s*warnings\.warn|destroy_process_group"
    r"|Triton is installed|Failed to import from vllm\._C|shutting down|Shutting down",
    re.IGNORECASE,
)
_CAUSE = re.compile(
    r"^(?:[\w.]+\.)?\w*(?:Error|Exception|Exit|Interrupt|NotFound)\b(?::|$)"
    r"|\berror: |\b[Ee]rrno \d+|out of memory|[Ss]egmentation fault|core dumped|\bSIG[A-Z]{3,5}\b|^Killed"
    r"|[Nn]o such file|[Pp]ermission denied|command not found|cannot open shared object|^Fatal |\bFATAL\b"
)
_CONSEQUENCE = re.compile(
    r"Engine core initialization failed|root cause above|EngineDeadError|EngineCore encountered"
    r"|Failed core proc|^SystemExit|^KeyboardInterrupt|^(?:asyncio\.\w+\.)?CancelledError|Exit code: "
    r"|died unexpectedly|cancelled|ProcessExited|BrokenPipe|raise .*Error"
)


def error_lines(log: Sequence[str], limit: int) -> list[str]:
    """The lines that tell the cause, oldest first, at most `limit`; without one, the last lines but noise.

    Shown without the logger's prefix; a line that repeats is shown once. Follow-up errors ("engine core
    initialisation failed") count only when nothing better is there.
    """
    lines = [_bare(line) for line in log]
    lines = [line for line in lines if line and not _NOISE.search(line)]
    causes = [line for line in lines if _CAUSE.search(line)]
    first_hand = [line for line in causes if not _CONSEQUENCE.search(line)]
    chosen = list(dict.fromkeys(first_hand or causes or lines))
    return chosen[-limit:] if limit > 0 else []


def _bare(line: str) -> str:
    return _PREFIX.sub("", _COLOUR.sub("", line)).rstrip()
