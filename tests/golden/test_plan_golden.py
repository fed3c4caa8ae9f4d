"""Each golden case's plan, byte for byte. `python -m tests.golden.case` writes them anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynctl.deploy.plan import Plan
from dynctl.recipe.shipped import shipped_recipes
from tests.golden import case as golden

CASES = golden.all_cases()


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("golden")
    golden.prepare(made)
    return made


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parent.name}/{case.name}")
def test_plan_is_as_expected(case: Path, tmp: Path) -> None:
    plan = golden.plan_of(case, tmp)
    assert golden.rendered(plan, tmp) == (case / "expected.json").read_text()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parent.name}/{case.name}")
def test_same_input_gives_the_same_bytes(case: Path, tmp: Path) -> None:
    first, second = golden.plan_of(case, tmp), golden.plan_of(case, tmp)
    assert first.to_json() == second.to_json()
    assert Plan.from_json(first.to_json()) == first


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parent.name}/{case.name}")
def test_no_port_or_gpu_is_given_twice(case: Path, tmp: Path) -> None:
    plan = golden.plan_of(case, tmp)
    ports = [
        (p.node, port)
        for p in plan.processes
        for name, port in p.ports.items()
        if not (name == "http" and "own" in p.ports)  # which the frontends of a node share
    ]
    assert len(ports) == len(set(ports))
    gpus = [(p.node, gpu) for p in plan.processes if p.kind == "worker" for gpu in p.gpus]
    assert len(gpus) == len(set(gpus))


def test_every_shipped_recipe_has_a_case() -> None:
    shipped = {path.stem for path in shipped_recipes()}
    assert shipped == {case.name for case in CASES if case.parent.name == "shipped"}
