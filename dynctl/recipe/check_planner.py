"""What the planner section means: whether it can keep anything, within bounds that can be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dynctl.engines.base import Engine, Finding
from dynctl.errors import ProfileError
from dynctl.perfmodel.gpus import gpu_named
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.profile import Profile, Subject, load_profile
from dynctl.recipe.schema import Recipe, RoleSection


def planner_rules(recipe: Recipe, engine: Engine) -> Iterator[Finding]:
    """Findings about `planner`, none without it."""
    planner = recipe.planner
    if planner is None or not planner.enabled:
        return
    if not engine.features.launches:
        yield _error("planner", f"backend {engine.name} starts no engines: there is nothing to add or remove")
        return
    if recipe.sla is None or (recipe.sla.ttft is None and recipe.sla.itl is None):
        yield _error("planner", "there is no service level to keep; give sla.ttft or sla.itl")
    least = 0
    for role, section in recipe.roles.present().items():
        if role == "encode":
            continue
        bounds, gpus = getattr(planner.roles, role), layout_of(section).gpus
        least += bounds.min_replicas * gpus
        most = bounds.max_replicas
        if most is not None and most < bounds.min_replicas:
            told = f"{most} is below min_replicas, {bounds.min_replicas}"
            yield _error(f"planner.roles.{role}.max_replicas", told)
        yield from _profile(recipe, engine, role, section)
    if planner.max_gpus and least > planner.max_gpus:
        yield _error("planner.max_gpus", f"the fewest replicas of all roles take {least} GPUs already")
    if planner.gpu:
        try:
            gpu_named(planner.gpu)
        except ProfileError as error:
            yield _error("planner.gpu", str(error))
    if planner.interval < planner.load_interval:
        yield _error("planner.interval", "must not be shorter than planner.load_interval")


def profile_path(recipe: Recipe, role: str) -> str:
    """The profile of a role, "" = none is given."""
    if recipe.planner is None:
        return ""
    own: str = getattr(recipe.planner.roles, role).profile
    return own or recipe.planner.profile


def layout_of(section: RoleSection) -> Layout:
    """The layout of a role's replicas."""
    return Layout(
        tensor=section.tensor_parallel,
        pipeline=section.pipeline_parallel,
        data=section.data_parallel,
        expert=section.expert_parallel,
    )


def _profile(recipe: Recipe, engine: Engine, role: str, section: RoleSection) -> Iterator[Finding]:
    path = profile_path(recipe, role)
    if not path or recipe.target == "ssh":
        return  # on the head of a deployment over SSH it is looked at when it is used
    own = recipe.planner is not None and getattr(recipe.planner.roles, role).profile
    field = f"planner.roles.{role}.profile" if own else "planner.profile"
    try:
        profile = load_profile(Path(path))
    except ProfileError as error:
        yield _error(field, str(error))
        return
    differs = differences(profile, recipe, engine, section)
    if differs:
        yield _error(field, f"{path} is of something else: {'; '.join(differs)}")


def differences(
    profile: Profile, recipe: Recipe, engine: Engine, section: RoleSection, gpu: str = ""
) -> list[str]:
    """What the profile was made of that the role is not; [] where it does not tell. `gpu`: the name in
    `perfmodel.gpus` of the GPUs it is to run on, "" = as `planner.gpu` says, or not known.
    """
    subject = profile.subject
    if subject is None:
        return []
    if not gpu and recipe.planner is not None and recipe.planner.gpu:
        gpu = gpu_named(recipe.planner.gpu).name
    names = {recipe.model.name, recipe.model.path, Path(recipe.model.path).name}
    model = subject.model if {subject.model, subject.model.rsplit("/", 1)[-1]} & names else recipe.model.path
    found = subject.differences(Subject(model=model, backend=engine.name, hardware=gpu))
    if subject.layout != layout_of(section):
        found.append(f"layout {subject.layout.label}, not {layout_of(section).label}")
    return found


def _error(field: str, message: str) -> Finding:
    return Finding("error", field, message)
