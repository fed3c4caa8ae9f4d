"""`dynctl planner`."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

import msgspec
import typer

from dynctl.cli import options
from dynctl.cli.pick import ask, pick
from dynctl.cli.render import data, json_data, paint, prose, table
from dynctl.deploy.amend import hosts_of, read_plan
from dynctl.deploy.home import RunDir
from dynctl.errors import CodecError, UsageError
from dynctl.planner.core import Decision
from dynctl.planner.journal import Entry, read
from dynctl.planner.observe import Observation
from dynctl.planner.settings import about, config_of
from dynctl.protocol.deployment import DeploymentView
from dynctl.recipe.load import LoadedRecipe, load_recipe

What = Annotated[
    Literal["why", "show"], typer.Argument(help="why: the last decisions; show: rules and state.")
]
Lines = Annotated[int, typer.Option("--lines", "-n", min=1, help="How many decisions, the last ones.")]
Changes = Annotated[bool, typer.Option("--changes", help="Only decisions that changed something.")]


def planner(
    what: What = "why",
    name: options.Name = None,
    lines: Lines = 5,
    changes: Changes = False,
    as_json: options.Json = False,
) -> None:
    """What the planner decided and why, with the figures behind it; its rules and how it is now.

    One entry for each forecast, and for each look that led to something else than the one before. With
    --json why prints one object a line, as in the run's planner.jsonl.

    dynctl planner why; dynctl planner why chat -n 20 --changes; dynctl planner show
    """
    run = pick(name, ended=True)
    entries = journal(run)
    if what == "show":
        show(run, entries[-1:], as_json=as_json)
        return
    if changes:
        entries = [entry for entry in entries if entry.decision.changed]
    if not entries:
        prose("nothing decided yet" if not changes else "nothing changed yet")
    for entry in entries[-lines:]:
        data(msgspec.json.encode(entry).decode() if as_json else "\n".join([*shown(entry), ""]))


def journal(run: RunDir) -> list[Entry]:
    """What has been decided. Raises CodecError, UsageError without a planner."""
    try:
        entries = read(run.planner)
    except OSError as error:
        raise CodecError(f"it cannot be read: {error.strerror}", where=str(run.planner)) from error
    if not entries and _loaded(run).recipe.planner is None:
        raise UsageError(
            "this deployment has no planner",
            where=str(run.lock),
            hint="planner: {} in the recipe turns it on",
        )
    return entries


def _loaded(run: RunDir) -> LoadedRecipe:
    return load_recipe(run.lock, environ={}, files_here=False)


def shown(entry: Entry) -> list[str]:
    """One decision for people."""
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.ts))
    head = f"{paint(clock, 'dim')}  {_changes(entry.decision)}"
    if entry.outcome:
        head += "  " + paint(entry.outcome, "good" if entry.outcome.startswith("done") else "warning")
    lines = [head, *(f"  {line}" for line in _roles(entry.decision, entry.observation))]
    lines.append(f"  seen      {_seen(entry.observation)}")
    ahead = entry.decision.ahead
    if ahead is not None:
        lines.append(
            f"  forecast  {ahead.rate:.2f} requests/s at most in {ahead.horizon_s:.0f} s "
            f"({ahead.now:.2f} now), "
            f"prompts {ahead.isl:.0f}, answers {ahead.osl:.0f} tokens, {ahead.hit_rate:.0%} cached"
        )
    return lines


def _changes(decision: Decision) -> str:
    made = [
        f"{role} {one.current} -> {one.target}"
        for role, one in decision.roles.items()
        if one.target != one.current
    ]
    return paint(", ".join(made), "bold") if made else "no change"


def _roles(decision: Decision, seen: Observation) -> list[str]:
    width = max(8, *(len(role) for role in decision.roles))
    return [
        f"{role:<{width}}  {one.why}"
        + (f" [floor {one.floor}]" if one.floor is not None else "")
        + f" [ready {seen.roles[role].ready} of {seen.roles[role].wanted}]"
        for role, one in decision.roles.items()
    ]


def _seen(seen: Observation) -> str:
    parts = [f"{seen.arrivals} requests in {seen.span_s:.1f} s"]
    parts += [f"{seen.queued} waiting"] if seen.queued else []
    parts += [f"TTFT {seen.ttft_s * 1000:.0f} ms"] if seen.ttft_s is not None else []
    parts += [f"ITL {seen.itl_s * 1000:.1f} ms"] if seen.itl_s is not None else []
    for role, load in seen.roles.items():
        if not load.workers:
            continue
        count = len(load.workers)
        running = sum(worker.running for worker in load.workers) / count
        waiting = sum(worker.waiting for worker in load.workers) / count
        usage = [worker.kv_usage for worker in load.workers if worker.kv_usage is not None]
        kv = f", KV {sum(usage) / len(usage):.0%}" if usage else ""
        parts.append(f"{role}: {running:.1f} running, {waiting:.1f} waiting each{kv}")
    return "; ".join(parts)


def show(run: RunDir, last: list[Entry], *, as_json: bool) -> None:
    """The rules, and how it is now."""
    loaded = _loaded(run)
    gpus = sum(host.gpus for host in hosts_of(run, read_plan(run)).hosts)
    config = config_of(loaded, gpus)
    if config is None:
        raise UsageError("the planner is off", where=loaded.where("planner"), hint="planner.enabled: true")
    rules, seen = about(config, loaded.recipe), ask(run)[0]
    if as_json:
        json_data(rules | {"state": seen.planner, "last": msgspec.to_builtins(last[-1]) if last else None})
        return
    data("\n".join(_rules(rules, seen, last)))


def _rules(rules: dict[str, Any], seen: DeploymentView, last: list[Entry]) -> list[str]:
    sla = rules["sla"]
    wanted = ", ".join(
        f"{name.removesuffix('_s')} {sla[name] * 1000:g} ms" for name in ("ttft_s", "itl_s") if sla[name]
    )
    floors = {role: one.floor for role, one in last[-1].decision.roles.items()} if last else {}
    rows = [
        [
            role,
            str(seen.wanted.get(role, "-")),
            str(one["min_replicas"]),
            str(one["max_replicas"]),
            str(one["gpus"]),
            str(floors.get(role) or "-"),
            one["costs"] + (f" ({one['no_estimate']})" if one["no_estimate"] else ""),
        ]
        for role, one in rules["roles"].items()
    ]
    budget = f"at most {rules['max_gpus']} GPUs" if rules["max_gpus"] else "no limit of GPUs"
    return [
        f"{seen.name}  {'advisory' if rules['advisory'] else 'acts'}, mode {rules['mode']}, "
        f"predictor {rules['predictor']}",
        f"keeps {wanted} for p{sla['percentile'] * 100:g}, {budget}, headroom {rules['headroom']:.0%}, "
        f"cool-down {rules['cooldown_s']:g} s",
        f"looks every {rules['load_interval_s']:g} s, forecasts every {rules['interval_s']:g} s",
        *([f"now: {seen.planner}"] if seen.planner else []),
        "",
        table(("ROLE", "WANTED", "MIN", "MAX", "GPUS", "FLOOR", "COSTS"), rows),
    ]
