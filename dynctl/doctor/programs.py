"""Judges of the engine, its flags, its container, the model's files. Pure."""

from __future__ import annotations

import os
from collections.abc import Iterable

from dynctl.doctor.findings import Verdict, fail, note, ok, unknown, warn
from dynctl.doctor.subject import Subject
from dynctl.engines.inquiry import doubts
from dynctl.hostfacts import OWN
from dynctl.hub import BUILTIN
from dynctl.protocol.hosts import PathFacts
from dynctl.recipe.check import role_settings


def engine(subject: Subject) -> list[Verdict]:
    """Its program is there; which version it is."""
    if not subject.has_engine or subject.wanted.recipe is None:
        return []
    told, section = subject.facts.engine, subject.wanted.recipe.engine
    backend = subject.wanted.recipe.backend
    if told is None:
        return [unknown(f"it was not asked: {subject.facts.note('engine') or 'no answer'}")]
    given = next((name for name in ("container", "python", "venv") if getattr(section, name)), "")
    inquiry = subject.wanted.inquiry
    if not told.found and inquiry is not None and inquiry.program == OWN:
        return [unknown(f"{backend} comes with dynctl, which is not there")]
    if not told.found:
        where = f"engine.{given} ({getattr(section, given)})" if given else "PATH"
        remedy = f"install it {subject.on}, or correct engine.{given or 'venv'}"
        return [fail(f"the program of {backend} is not there: looked in {where}", remedy)]
    first, last = told.note.split("; ")[0], told.note.split("; ")[-1]
    found = [ok(f"{backend} {told.version} ({told.found})" if told.version else f"{told.found} is there")]
    if not told.version and told.note:
        found = [unknown(f"{told.found} is there, its version is not known: {first}")]
    if told.flags is None and last and (told.version or last != first):
        remedy = f"run it by hand {subject.on}: it may not start either"
        found.append(warn(f"it does not print its help: {last}", remedy))
    return found


def flags(subject: Subject) -> list[Verdict]:
    """What the recipe gives the engine is listed by the engine's own help."""
    wanted, told = subject.wanted, subject.facts.engine
    if not subject.has_engine or wanted.engine is None or wanted.loaded is None:
        return []
    settings = role_settings(wanted.loaded.recipe)
    given = tuple(dict.fromkeys(f for role in settings for f in wanted.engine.command_flags(role.args)))
    named = {n.replace("_", "-") for role in settings for n, v in role.args.items() if v not in (None, False)}
    beside = len(named) - len(given)
    found = [note(f"{beside} settings are no flags: its help says nothing of them")] if beside > 0 else []
    if not given:
        return found or [ok("the recipe gives it none")]
    if told is None or told.flags is None:
        why = told.note.split("; ")[-1] if told is not None else subject.facts.note("engine")
        return [*found, unknown(f"{len(given)} not compared with its help: {why or 'not asked'}")]
    inquiry = wanted.inquiry
    wrong = doubts(given, told.flags, abbreviates=inquiry is not None and inquiry.abbreviates)
    for doubt in wrong:
        where = _where(subject, doubt.flag)
        if doubt.kind == "short":
            remedy = f"write it out at {where}: what is short may mean another flag in the next release"
            found.append(warn(f"{doubt.flag} is short for {doubt.near}", remedy))
        else:
            near = f"did you mean {doubt.near}? " if doubt.near else ""
            told_version = f" {told.version}" if told.version else ""
            message = f"{wanted.loaded.recipe.backend}{told_version} has no flag {doubt.flag}"
            found.append(fail(message, f"{near}It is set at {where}"))
    good = len(given) - len(wrong)
    return [*found, ok(f"{good} known to its help, which lists {len(told.flags)}")] if good else found


def _where(subject: Subject, flag: str) -> str:
    """Where the recipe gives a flag: file:line."""
    loaded = subject.wanted.loaded
    if loaded is None:
        return ""
    plain = flag.lstrip("-").removeprefix("no-").replace("_", "-")
    for role, section in loaded.recipe.roles.present().items():
        for at, args in ((f"roles.{role}.args", section.args), ("engine.args", loaded.recipe.engine.args)):
            for name in args:
                if name.replace("_", "-").removeprefix("no-") == plain:
                    return loaded.where(f"{at}.{name}")
    return loaded.file


def container(subject: Subject) -> list[Verdict]:
    """What runs the recipe's image is there, and the image can be read."""
    recipe, told = subject.wanted.recipe, subject.facts.containers
    if recipe is None or not recipe.engine.container:
        there = [f"{n} {v}" for n, v in (("apptainer", told.apptainer), ("enroot", told.enroot)) if v]
        there += ["pyxis"] if told.pyxis else []
        return [note(", ".join(there) or "no runtime, and none is needed")] if recipe is None or there else []
    if not subject.has_engine:
        return []
    if not told.apptainer:
        if why := subject.facts.note("containers"):
            return [unknown(f"apptainer was not found out about: {why}")]
        remedy = "install apptainer (it needs no root to run), or use engine.venv instead of engine.container"
        return [fail("apptainer is not there, which runs engine.container", remedy)]
    image = recipe.engine.container
    at = subject.facts.paths.get(image)
    if at is None or at.readable:
        return [ok(f"apptainer {told.apptainer}, image {image}")]
    return [_unreadable("image", image, at, "engine.container", subject.on)]


def model(subject: Subject) -> list[Verdict]:
    """The model's files are there and may be read."""
    recipe, facts = subject.wanted.recipe, subject.facts
    if recipe is None or not subject.has_engine:
        return []
    path = recipe.model.path
    found = list(_other_files(subject, (recipe.model.tokenizer, recipe.model.chat_template)))
    if recipe.engine.container:
        return [*found, unknown(f"{path} is a path of the image: whether it is mounted there is not known")]
    if path.startswith(BUILTIN):
        return [*found, ok(f"{path} comes with dynctl")]
    if not os.path.isabs(path):
        return [*found, _hub(subject, path)]
    at = facts.paths.get(path)
    if at is None:
        why = facts.note(f"model {path}") or "not told"
        remedy = "if a file server is behind it, see whether it hangs"
        return [*found, unknown(f"{path}: {why}", remedy)]
    if not at.readable:
        return [*found, _unreadable("model", path, at, "model.path", subject.on)]
    if not at.is_dir:
        return [*found, warn(f"{path} is a file, no directory", "give the directory that holds config.json")]
    return [*found, ok(f"{path} ({at.fstype or 'unknown file system'})")]


def _hub(subject: Subject, model_id: str) -> Verdict:
    facts, env = subject.facts, subject.environment()
    if facts.model_at:
        return ok(f"{model_id} is in the cache: {facts.model_at}")
    if facts.note(f"model {model_id}"):
        return unknown(f"{model_id}: {facts.note(f'model {model_id}')}")
    remedy = f"{subject.on}: hf download {model_id}"
    if env.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        return fail(f"{model_id} is not in the cache, and HF_HUB_OFFLINE forbids to download it", remedy)
    return warn(f"{model_id} is not in the cache: the engine downloads it when it starts", remedy)


def _other_files(subject: Subject, paths: Iterable[str]) -> list[Verdict]:
    wrong = []
    for path in paths:
        at = subject.facts.paths.get(path)
        if at is not None and not at.readable:
            wrong.append(_unreadable("file", path, at, "model.tokenizer or model.chat_template", subject.on))
    return wrong


def _unreadable(what: str, path: str, at: PathFacts, field: str, on: str) -> Verdict:
    if not at.exists:
        return fail(f"{what} missing: {path}", f"put it there {on}, or correct {field}")
    below = f": {os.path.relpath(at.unread, path)} in it" if at.is_dir and at.unread not in ("", path) else ""
    return fail(
        f"{what} cannot be read by this user: {path}{below}", f"chmod -R a+rX {path}, or correct {field}"
    )
