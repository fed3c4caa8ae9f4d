"""A plan as people read it: the node map, then every process's command in a form a shell would take."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from dynctl.cli.render import paint, table
from dynctl.command import Command
from dynctl.deploy.plan import Plan, PlannedNode, PlannedProcess

_WIDTH = 100


def plan_text(plan: Plan) -> str:
    """The whole plan; coloured only when standard output is a terminal."""
    roles = ", ".join(f"{count} {role}" for role, count in plan.roles.items())
    head = [
        f"{paint(plan.name, 'bold')}  {plan.backend}, model {plan.model}, target {plan.target}: {roles}",
        f"serves {paint(plan.url, 'good')}",
        "",
        node_map(plan),
    ]
    return "\n".join([*head, *(part for p in plan.processes for part in ("", process_text(p)))])


def node_map(plan: Plan) -> str:
    """One row per node and what runs there, with the GPUs of each."""
    rows = []
    for node in plan.nodes:
        here = [p for p in plan.processes if p.node == node.name and p.kind != "engine"]
        for i, process in enumerate(here):
            rows.append(
                [
                    node.name if i == 0 else "",
                    node.address if i == 0 else "",
                    _gpus(node) if i == 0 else "",
                    process.id,
                    ranges(process.gpus),
                    ranges(sorted(p for owner in _family(plan, process) for p in owner.ports.values())),
                ]
            )
    return table(("NODE", "ADDRESS", "GPUS", "PROCESS", "ON GPUS", "PORTS"), rows)


def process_text(process: PlannedProcess) -> str:
    """One process: what it is, where, and its command, secrets masked."""
    facts = [f"on {process.node}"]
    if process.gpus:
        facts.append(f"GPU {ranges(process.gpus)}")
    facts.extend(f"{name} {port}" for name, port in process.ports.items())
    title = f"{paint(process.id, 'bold')}  {paint(', '.join(facts), 'dim')}"
    return "\n".join([title, *(f"  {line}" for line in command_lines(process.command))])


def command_lines(command: Command) -> list[str]:
    """The command over as many lines as it needs, joined by backslashes; secrets masked."""
    whole = command.render()
    if len(whole) <= _WIDTH:
        return [whole]
    lines = [f"{name}={shlex.quote(value)}" for name, value in command.shown_env().items()]
    lines.extend(_argument_lines(command.shown_argv()))
    return [line + " \\" for line in lines[:-1]] + lines[-1:]


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers in short: "0-3,6"."""
    parts: list[tuple[int, int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1] = (parts[-1][0], number)
        else:
            parts.append((number, number))
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _argument_lines(argv: Sequence[str]) -> list[str]:
    """The program and its words on the first line, then one line an option."""
    lines = [shlex.quote(argv[0])]
    for arg in argv[1:]:
        if arg.startswith("--"):
            lines.append("  " + shlex.quote(arg))
        else:
            lines[-1] += " " + shlex.quote(arg)
    return lines


def _family(plan: Plan, sidecar: PlannedProcess) -> list[PlannedProcess]:
    return [
        p for p in plan.processes if p.id == sidecar.id or (p.kind == "engine" and sidecar.id in p.depends)
    ]


def _gpus(node: PlannedNode) -> str:
    return ranges(node.gpus) or "-"
