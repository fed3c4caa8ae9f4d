"""What doctor has found, as people read it: a block for each host, what to do under what is wrong."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence

from dynctl.cli.render import Style, paint
from dynctl.doctor.checks import CHECKS
from dynctl.doctor.findings import ALL_HOSTS, Finding, Level, counts
from dynctl.doctor.service import Report
from dynctl.topology.inventory import LOCAL, Host

SYMBOLS: dict[Level, tuple[str, Style]] = {
    "ok": ("✓", "good"),
    "note": ("·", "dim"),
    "warn": ("!", "warning"),
    "fail": ("✗", "error"),
    "unknown": ("?", "bold"),
}
MANY = 4
"""With more hosts than that, what is well on a host is one line."""
_NAME = max(len(check) for check in CHECKS)
_INDENT = 4 + _NAME + 2
_LEAST_WIDTH = 60


def report_text(report: Report, hosts: Sequence[Host]) -> str:
    """All of it."""
    folded = len(hosts) > MANY
    blocks = [host_block(host, of_host(report, host.name), folded=folded) for host in hosts]
    together = of_host(report, ALL_HOSTS)
    if together:
        blocks.append(
            "\n".join([paint("all hosts" if len(hosts) > 1 else "recipe", "bold"), *lines(together)])
        )
    return "\n\n".join([*blocks, summary(report.findings, len(hosts))])


def of_host(report: Report, name: str) -> list[Finding]:
    """The findings about one host."""
    return [finding for finding in report.findings if finding.host == name]


def host_block(host: Host, findings: Sequence[Finding], *, folded: bool) -> str:
    """A host's name and its checks."""
    told = "this machine" if host.name == LOCAL else host.address if host.address != host.name else ""
    head = f"{paint(host.name, 'bold')}  {paint(told, 'dim')}".rstrip()
    well = [finding for finding in findings if finding.level in ("ok", "note")]
    shown = [finding for finding in findings if finding not in well] if folded else findings
    rows = lines(shown)
    if folded and well:
        symbol, style = SYMBOLS["ok"]
        rows.append(f"  {paint(symbol, style)} {len(well)} {'checks' if len(well) > 1 else 'check'} well")
    return "\n".join([head, *rows])


def lines(findings: Sequence[Finding]) -> list[str]:
    """One line for each finding, and its remedy under it; a check's name is told once."""
    shown: list[str] = []
    before = ""
    for finding in findings:
        symbol, style = SYMBOLS[finding.level]
        name = finding.check if finding.check != before else ""
        before = finding.check
        head = f"  {paint(symbol, style)} {name.ljust(_NAME)}  "
        quiet: Style = "dim" if finding.level == "note" else ""
        first, *rest = wrapped(finding.message)
        shown.append(head + paint(first, quiet))
        shown += [" " * _INDENT + paint(line, quiet) for line in rest]
        if finding.remedy and finding.level != "ok":
            first, *rest = wrapped(finding.remedy, less=2)
            shown.append(" " * _INDENT + paint("→ ", style) + first)
            shown += [" " * (_INDENT + 2) + line for line in rest]
    return shown


def wrapped(text: str, *, less: int = 0) -> list[str]:
    """The text in lines that fit the terminal; in one off a terminal, where others read it."""
    plain = " ".join(text.split())
    if not sys.stdout.isatty():
        return [plain]
    width = max(_LEAST_WIDTH, shutil.get_terminal_size().columns) - _INDENT - less
    return textwrap.wrap(plain, width, break_long_words=False, break_on_hyphens=False) or [""]


def summary(findings: Sequence[Finding], hosts: int) -> str:
    """One line: how much is well, and what is not."""
    found = counts(findings)
    told = [f"{hosts} host{'s' if hosts != 1 else ''}: {found['ok'] + found['note']} well"]
    words: tuple[tuple[Level, str], ...] = (
        ("fail", "wrong"),
        ("warn", "doubtful"),
        ("unknown", "could not be checked"),
    )
    told += [paint(f"{found[level]} {word}", SYMBOLS[level][1]) for level, word in words if found[level]]
    return ", ".join(told)
