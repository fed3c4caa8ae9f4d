"""How `top` shows a deployment, in lines that fit the terminal. Pure but for colours."""

from __future__ import annotations

import time
from collections.abc import Sequence

from dynctl.cli.render import STATE_STYLES, age, paint
from dynctl.deploy.figures import Figures, WorkerFigures
from dynctl.deploy.status import ready_counts
from dynctl.protocol.deployment import DeploymentView, ProcessView

WIDE = 100
_BAR = 12
_NONE = "-"


def shown(seen: DeploymentView, found: Figures, width: int) -> list[str]:
    """The head, the figures of all, a row for each process."""
    wide = width >= WIDE
    phase = paint(seen.phase, STATE_STYLES.get(seen.phase, ""))
    clock = time.strftime("%H:%M:%S")
    lines = [f"{paint(seen.name, 'bold')}  {phase}  {ready_counts(seen)}  {seen.url}  {paint(clock, 'dim')}"]
    lines += [_cut(f"changing: {seen.changing}", width)] if seen.changing else []
    lines += [_cut(f"locked by {seen.locked}", width)] if seen.locked else []
    lines += [paint(_cut(seen.reason, width), "warning")] if seen.reason else []
    rates = [
        f"{found.requests:.1f} req/s",
        f"{found.tokens:.0f} tok/s",
        f"in flight {found.inflight}",
        f"queued {found.queued}",
        f"hit rate {percent(found.hit_rate)}",
        *([paint(f"{found.errors:.1f} errors/s", "error")] if found.errors else []),
    ]
    times = [
        f"{label} p50 {duration(p50)} p95 {duration(p95)}"
        for label, (p50, p95) in (("TTFT", found.ttft), ("ITL", found.itl))
    ]
    one = "   ".join([*rates, *times])
    lines += [one] if len(one) <= width else ["   ".join(rates), "   ".join(times)]
    return [*lines, "", *_table(seen, found, width, wide=wide)]


def duration(seconds: float | None) -> str:
    """12ms, 1.3s."""
    if seconds is None:
        return _NONE
    if seconds >= 1:
        return f"{seconds:.1f}s"
    return f"{seconds * 1000:.0f}ms" if seconds >= 0.01 else f"{seconds * 1000:.1f}ms"


def percent(share: float | None) -> str:
    """23%."""
    return _NONE if share is None else f"{share * 100:.0f}%"


def _table(seen: DeploymentView, found: Figures, width: int, *, wide: bool) -> list[str]:
    heads = ["PROCESS", "STATE", "NODE", "GPUS", "RUN", "WAIT", "KV", "HIT"]
    heads += ["RESTARTS", "AGE"] if wide else []
    right = {"RUN", "WAIT", "HIT", "RESTARTS", "AGE"}
    rows = [_cells(row, found.workers.get(row.id), wide=wide) for row in seen.processes]
    widths = [max(len(line[i]) for line in (heads, *rows)) for i in range(len(heads))]
    over = sum(widths) + 2 * (len(widths) - 1) - width
    node = heads.index("NODE")
    widths[node] = max(4, widths[node] - max(0, over))

    def line(cells: Sequence[str], state: str = "") -> str:
        fitted = [_cut(cell, wide_as) for cell, wide_as in zip(cells, widths, strict=True)]
        padded = [
            cell.rjust(wide_as) if head in right else cell.ljust(wide_as)
            for head, cell, wide_as in zip(heads, fitted, widths, strict=True)
        ]
        if state:
            padded[1] = paint(padded[1], STATE_STYLES.get(state, ""))
        return "  ".join(padded).rstrip()

    body = [line(cells, row.state) for cells, row in zip(rows, seen.processes, strict=True)]
    return [paint(line(heads), "dim"), *body]


def _cells(row: ProcessView, told: WorkerFigures | None, *, wide: bool) -> list[str]:
    known = told or WorkerFigures()
    cells = [
        row.id + (" +" if row.surge else ""),
        row.state,
        row.node,
        _spans(row.gpus),
        _count(known.running),
        _count(known.waiting),
        _bar(known.kv_usage, _BAR if wide else _BAR // 2),
        percent(known.hit_rate),
    ]
    if wide:
        up_s = time.time() - row.started_at if row.pid else None
        cells += [str(row.restarts), _NONE if up_s is None else age(up_s)]
    return cells


def _count(number: int | None) -> str:
    return _NONE if number is None else str(number)


def _bar(share: float | None, width: int) -> str:
    if share is None:
        return _NONE
    full = round(min(1.0, max(0.0, share)) * width)
    return f"{'█' * full}{'·' * (width - full)} {percent(share):>4}"


def _spans(numbers: Sequence[int]) -> str:
    """0-3,6 of 0,1,2,3,6."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and found[-1][-1] == number - 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ",".join(str(s[0]) if len(s) == 1 else f"{s[0]}-{s[-1]}" for s in found) or _NONE


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"
