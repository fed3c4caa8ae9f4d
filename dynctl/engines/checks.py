"""Checks that engines share: what prefill and decode must agree on, sizes against the model. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dynctl.engines.arguments import normal_name
from dynctl.engines.base import ArgValue, Finding, ModelFacts, RoleSettings


@dataclass(frozen=True, slots=True)
class Setting:
    """An argument of an engine: all its spellings (dashes), what counts when it is absent, and its effect."""

    names: tuple[str, ...]
    default: ArgValue
    reason: str
    level: Literal["error", "warning"] = "error"


def error(role: RoleSettings, path: str, message: str) -> Finding:
    """An error at `path` below the role."""
    return Finding("error", f"roles.{role.role}.{path}", message)


def warning(role: RoleSettings, path: str, message: str) -> Finding:
    """A warning at `path` below the role."""
    return Finding("warning", f"roles.{role.role}.{path}", message)


def argument(role: RoleSettings, names: Iterable[str]) -> tuple[str, ArgValue] | None:
    """The argument of a role under any of its names: the key as written and the value; None when absent."""
    wanted = frozenset(names)
    for key, value in role.args.items():
        if normal_name(key) in wanted:
            return key, value
    return None


def value_of(role: RoleSettings, setting: Setting) -> ArgValue:
    """The value in force."""
    found = argument(role, setting.names)
    return setting.default if found is None else found[1]


def number(value: ArgValue) -> int | None:
    """A whole number given as number or text; None for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().isdigit():
        return int(value)
    return None


def prefill_and_decode(roles: Sequence[RoleSettings]) -> tuple[RoleSettings, RoleSettings] | None:
    """The two roles of a disaggregated deployment, or None."""
    by_role = {role.role: role for role in roles}
    if "prefill" in by_role and "decode" in by_role:
        return by_role["prefill"], by_role["decode"]
    return None


def check_pair(roles: Sequence[RoleSettings], settings: Iterable[Setting]) -> list[Finding]:
    """Prefill and decode load the same model string and agree on each of `settings`."""
    pair = prefill_and_decode(roles)
    if pair is None:
        return []
    prefill, decode = pair
    found: list[Finding] = []
    if prefill.model != decode.model:
        found.append(
            error(
                decode,
                "model",
                f"prefill loads {prefill.model!r} and decode {decode.model!r}: both must name the model by"
                " the same string, a path on one side and a repository on the other do not match",
            )
        )
    for setting in settings:
        ours, theirs = value_of(prefill, setting), value_of(decode, setting)
        if str(ours) == str(theirs):
            continue
        where = argument(decode, setting.names) or argument(prefill, setting.names)
        side = decode if argument(decode, setting.names) else prefill
        text = f"{setting.names[0]} is {_shown(ours)} for prefill and {_shown(theirs)} for decode: "
        path = f"roles.{side.role}.args.{where[0] if where else setting.names[0]}"
        found.append(Finding(setting.level, path, text + setting.reason))
    return found


def _shown(value: ArgValue) -> str:
    return "the engine's default" if value is None else str(value)


def check_heads(roles: Sequence[RoleSettings], facts: ModelFacts | None) -> list[Finding]:
    """Tensor and pipeline sizes against the model's heads and layers, as far as they are known."""
    if facts is None:
        return []
    return [finding for role in roles for finding in _heads_of(role, facts)]


def _heads_of(role: RoleSettings, facts: ModelFacts) -> list[Finding]:
    size, heads, kv_heads = role.parallel.tensor, facts.attention_heads, facts.kv_heads
    found: list[Finding] = []
    if heads and heads % size:
        text = f"{size} does not divide the model's {heads} attention heads"
        found.append(error(role, "tensor_parallel", text))
    elif kv_heads and kv_heads % size and size % kv_heads:
        text = f"{size} does not divide the model's {kv_heads} KV heads, nor is it a multiple of them"
        found.append(error(role, "tensor_parallel", text))
    elif kv_heads and size > kv_heads:
        text = (
            f"{size} is more than the model's {kv_heads} KV heads: each head is kept {size // kv_heads} times"
        )
        found.append(warning(role, "tensor_parallel", text))
    if facts.layers and role.parallel.pipeline > facts.layers:
        text = f"{role.parallel.pipeline} stages are more than the model's {facts.layers} layers"
        found.append(error(role, "pipeline_parallel", text))
    return found


def check_context(role: RoleSettings, names: tuple[str, ...], facts: ModelFacts | None) -> list[Finding]:
    """A context length above what the model was made for."""
    given = argument(role, names)
    length = number(given[1]) if given else None
    if given is None or length is None or facts is None or not 0 < facts.max_position < length:
        return []
    text = (
        f"{length} is above the model's {facts.max_position} positions: the engine refuses unless overridden"
    )
    return [warning(role, f"args.{given[0]}", text)]


def check_names(role: RoleSettings, owned: Mapping[str, str]) -> list[Finding]:
    """Arguments given under two spellings, and short forms that the parser would take for an owned one."""
    found: list[Finding] = []
    seen: dict[str, str] = {}
    for key in role.args:
        name = normal_name(key)
        if name in seen:
            found.append(error(role, f"args.{key}", f"given twice: {seen[name]} and {key} are one argument"))
        seen[name] = key
        longer = sorted(full for full in owned if full.startswith(name) and full != name)
        if longer and name not in owned:
            text = f"is read as a short form of {longer[0]}, which {owned[longer[0]]} sets"
            found.append(error(role, f"args.{key}", text))
    return found


def check_env(role: RoleSettings, owned: Mapping[str, str]) -> list[Finding]:
    """Environment variables that dynctl sets itself."""
    return [
        error(role, f"env.{name}", f"is set by dynctl from {owned[name]}; remove it")
        for name in sorted(role.env)
        if name in owned
    ]
