"""What the fields of a recipe mean together: refused before anything starts, each with its reason."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from dynctl.engines import catalog
from dynctl.engines.base import Engine, Finding, Parallel, RoleSettings
from dynctl.recipe.check_planner import planner_rules
from dynctl.recipe.load import LoadedRecipe
from dynctl.recipe.problems import Problem, as_error
from dynctl.recipe.schema import Frontend, Recipe, RoleSection


def check_recipe(loaded: LoadedRecipe) -> list[Problem]:
    """The warnings. Raises RecipeError that tells all errors."""
    recipe = loaded.recipe
    engine = catalog.get(recipe.backend)
    findings: list[Finding] = []
    for rule in _RULES:
        findings.extend(rule(recipe, engine))
    findings.extend(_args(recipe, engine))
    findings.extend(_model(loaded, engine))
    if recipe.roles.encode is None:
        findings.extend(engine.check(role_settings(recipe), loaded.model.facts))
    found = {level: [_problem(loaded, f) for f in findings if f.level == level] for level in _LEVELS}
    if found["error"]:
        raise as_error(found["error"], loaded.file)
    return list(dict.fromkeys(found["warning"]))


_LEVELS = ("error", "warning")


def role_settings(recipe: Recipe) -> list[RoleSettings]:
    """Each role with its own and the engine-wide options merged, the role's winning."""
    return [
        RoleSettings(
            role=role,
            replicas=section.replicas,
            parallel=parallel_of(section),
            args={**recipe.engine.args, **section.args},
            env={**recipe.engine.env, **section.env},
            model=recipe.model.path,
            urls=tuple(section.urls),
        )
        for role, section in recipe.roles.present().items()
    ]


def parallel_of(section: RoleSection) -> Parallel:
    """The parallel sizes of a role."""
    return Parallel(
        tensor=section.tensor_parallel,
        pipeline=section.pipeline_parallel,
        data=section.data_parallel,
        expert=section.expert_parallel,
    )


def _problem(loaded: LoadedRecipe, finding: Finding) -> Problem:
    return Problem(loaded.where(finding.field), finding.message)


def _error(field: str, message: str) -> Finding:
    return Finding("error", field, message)


def _roles(recipe: Recipe, engine: Engine) -> Iterator[Finding]:
    roles = recipe.roles
    if roles.encode is not None:
        yield _error("roles.encode", "encode workers are not supported yet; remove the role")
    apart = {"prefill": roles.prefill, "decode": roles.decode}
    given = [name for name, section in apart.items() if section is not None]
    if not recipe.roles.present():
        yield _error(
            "roles", "there is no role; give aggregated, or prefill and decode (with defaults only: {})"
        )
    elif roles.aggregated is not None and given:
        yield _error(
            "roles", f"aggregated and {' and '.join(given)} exclude each other; give one or the other"
        )
    elif len(given) == 1:
        other = "decode" if given == ["prefill"] else "prefill"
        yield _error(
            f"roles.{given[0]}",
            f"{given[0]} alone serves nothing; give {other} too ({{}} for the defaults), or aggregated",
        )
    if given and not engine.features.disaggregation:
        yield _error("roles", f"backend {recipe.backend} cannot do prefill and decode apart; use aggregated")
    transfer = recipe.engine.kv_transfer
    if transfer and transfer not in engine.transfers:
        known = ", ".join(engine.transfers) or "none"
        yield _error(
            "engine.kv_transfer", f"backend {recipe.backend} cannot move the KV cache by {transfer}: {known}"
        )
    for role, section in roles.present().items():
        if section.data_parallel > 1 and not engine.features.data_parallel:
            yield _error(f"roles.{role}.data_parallel", f"backend {recipe.backend} has no data parallelism")


def _frontend(recipe: Recipe, engine: Engine) -> Iterator[Finding]:
    yield from _frontend_hosts(recipe.frontend)
    if recipe.router.mode == "kv" and engine.features.kv_events == "none":
        told = f"backend {recipe.backend} publishes no KV events: mode kv guesses what is cached"
        yield Finding("warning", "router.mode", told)
    skips = recipe.router.conditional_disagg.mode != "off" and recipe.roles.prefill is not None
    if skips and recipe.router.mode != "kv":
        told = f"mode {recipe.router.mode} does not look at prompts: prefill is never skipped; use mode kv"
        yield Finding("warning", "router.conditional_disagg.mode", told)
    ways = engine.transfers
    way = ways.get(recipe.engine.kv_transfer) or next(iter(ways.values()), None)
    if skips and way is not None and way.order == "concurrent":
        told = f"decode workers of backend {recipe.backend} read no prompts: prefill is never skipped"
        yield Finding("warning", "router.conditional_disagg.mode", told)


def _frontend_hosts(frontend: Frontend) -> Iterator[Finding]:
    hosts = frontend.hosts
    if len(set(hosts)) < len(hosts):
        yield _error("frontend.hosts", "a host is named twice; frontend.replicas puts more than one on each")
    elif frontend.replicas < len(hosts):
        yield _error("frontend.replicas", f"{frontend.replicas} replicas but {len(hosts)} hosts")
    elif len(hosts) > 1 and frontend.host not in ("0.0.0.0", "::"):
        yield _error(
            "frontend.host",
            f"frontends on {len(hosts)} hosts cannot all listen on {frontend.host}; use 0.0.0.0 or ::",
        )


def _api_keys(recipe: Recipe, engine: Engine) -> Iterator[Finding]:
    names = [key.name for key in recipe.frontend.api_key]
    for i, name in enumerate(names):
        if name in names[:i]:
            yield _error(f"frontend.api_key.{i}.name", f"there are two API keys named '{name}'")
    digests = [key.key for key in recipe.frontend.api_key]
    for i, digest in enumerate(digests):
        if digest in digests[:i]:
            first = names[digests.index(digest)]
            told = f"the API keys '{first}' and '{names[i]}' are the same; give each its own"
            yield _error(f"frontend.api_key.{i}.key", told)


def _environment(recipe: Recipe, engine: Engine) -> Iterator[Finding]:
    given = [name for name in ("venv", "python") if getattr(recipe.engine, name) is not None]
    if len(given) > 1:
        yield _error("engine.python", "engine.venv and engine.python exclude each other; keep one")
    if recipe.engine.runtime == "pyxis" and recipe.target != "slurm":
        yield _error("engine.runtime", "pyxis is a part of Slurm; use apptainer, or target slurm")
    if recipe.engine.mounts and not recipe.engine.container:
        yield _error("engine.mounts", "there is no engine.container to mount anything in")
    if engine.features.launches:
        return
    for name in (*given, *(["container"] if recipe.engine.container else [])):
        yield _error(f"engine.{name}", f"backend {recipe.backend} starts no engine; remove it")


def _engine_keys(recipe: Recipe, engine: Engine) -> Iterator[Finding]:
    """The engines' own key is made anew for each deployment and known to nobody else."""
    places = [("engine.env", recipe.engine.env)]
    places += [(f"roles.{role}.env", section.env) for role, section in recipe.roles.present().items()]
    for at, env in places:
        if engine.key_variable and engine.key_variable in env:
            yield _error(
                f"{at}.{engine.key_variable}",
                "dynctl gives the engines a key of their own; clients' keys are frontend.api_key",
            )


def _urls(recipe: Recipe, engine: Engine) -> Iterator[Finding]:
    for role, section in recipe.roles.present().items():
        at = f"roles.{role}"
        if engine.features.launches:
            for name in ("urls", "kv_events", "kv_replay"):
                if getattr(section, name):
                    yield _error(
                        f"{at}.{name}",
                        f"backend {recipe.backend} starts its own engines; only backend external takes this",
                    )
            continue
        if section.replicas != max(len(section.urls), 1):
            yield _error(f"{at}.replicas", f"{section.replicas} replicas but {len(section.urls)} urls")
        for name in ("kv_events", "kv_replay"):
            given = len(getattr(section, name))
            if given not in (0, len(section.urls)):
                yield _error(f"{at}.{name}", f"{given} endpoints for {len(section.urls)} urls; one for each")
        yield from _addresses(at, section)


def _addresses(at: str, section: RoleSection) -> Iterator[Finding]:
    for name in ("kv_events", "kv_replay"):
        for i, endpoint in enumerate(getattr(section, name)):
            if not _is_tcp(endpoint):
                yield _error(f"{at}.{name}.{i}", f"'{endpoint}' is no endpoint; write tcp://host:port")


def _is_tcp(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme == "tcp" and bool(parts.hostname) and bool(parts.port)
    except ValueError:
        return False


def _hosts(recipe: Recipe, engine: Engine) -> Iterator[Finding]:
    names = [host.name for host in recipe.hosts]
    for i, name in enumerate(names):
        if name in names[:i]:
            yield _error(f"hosts.{i}.name", f"there are two hosts named '{name}'")


def _reach(recipe: Recipe, engine: Engine) -> Iterator[Finding]:
    """Frontends on other machines that only those themselves can talk to."""
    host = recipe.frontend.host
    if recipe.target == "ssh" and _is_loopback(host):
        told = (
            f"only the frontend's own host reaches the service at {host}; 0.0.0.0 lets others reach it, too"
        )
        yield Finding("warning", "frontend.host", told)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _args(recipe: Recipe, engine: Engine) -> Iterator[Finding]:
    """Argument names: none that a recipe field sets, none that the engine cannot have."""
    if not engine.features.launches:
        return  # refused as a whole by the engine's own check
    present = recipe.roles.present().items()
    places: list[tuple[str, str, Mapping[str, Any]]] = [("engine.args", "ROLE", recipe.engine.args)]
    places += [(f"roles.{role}.args", role, section.args) for role, section in present]
    for at, role, args in places:
        for name in args:
            bare = name.lstrip("-")
            owner = next((engine.owned_args[n] for n in _spellings(bare) if n in engine.owned_args), None)
            if name != bare:
                yield _error(f"{at}.{name}", f"write '{bare}', without leading dashes")
            elif owner is not None:
                yield _error(f"{at}.{name}", _owned(name, owner.replace("<role>", role)))
            elif not engine.known_args(name):
                yield _error(f"{at}.{name}", f"'{name}' is not an argument of {recipe.backend}")


def _owned(name: str, owner: str) -> str:
    """Why dynctl's own argument is refused; the engine tells its owner as a field, or "nothing: reason"."""
    nobody, _, reason = owner.partition("nothing: ")
    if reason and not nobody:
        return f"'{name}' cannot be given: {reason}"
    return f"'{name}' is set by dynctl, from {owner}: set it there"


def _spellings(name: str) -> tuple[str, ...]:
    return (name, name.replace("_", "-"), name.replace("-", "_"))


def _model(loaded: LoadedRecipe, engine: Engine) -> Iterator[Finding]:
    if (
        loaded.recipe.router.mode == "kv"
        and engine.features.kv_events != "none"
        and not loaded.model.tokenizer
    ):
        told = (
            "no tokenizer.json is at hand for this model: until it is, mode kv chooses by load only; "
            "download the model or set model.tokenizer to a directory"
        )
        yield Finding("warning", "model.path", told)


_RULES: tuple[Callable[[Recipe, Engine], Iterator[Finding]], ...] = (
    _roles,
    _frontend,
    _api_keys,
    _engine_keys,
    _environment,
    _urls,
    _hosts,
    _reach,
    planner_rules,
)
