"""The recipe that `dynctl profile` writes: what flags changed and whole paths are in it, comments stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dynctl.engines.arguments import normalised
from dynctl.perfmodel.choice import Option, Pool, Sla
from dynctl.perfmodel.layout import Layout
from dynctl.profiler.candidate import alone, candidate
from dynctl.profiler.recipe_out import recipe_text, section_of
from dynctl.profiler.request import sla_of
from dynctl.recipe.load import LoadedRecipe, load_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def chosen(recipe: LoadedRecipe) -> Option:
    """Two replicas that do both, or one worker of each role where the recipe has them apart."""
    option = alone(Layout(tensor=2))
    roles = recipe.recipe.roles.present()
    if "prefill" not in roles:
        return option
    pools = tuple(
        Pool(role=role, layout=Layout(), replicas=1, sequences=8, batched_tokens=2048, load=0.5)
        for role in roles
        if role in ("prefill", "decode")
    )
    return Option(mode="disaggregated", pools=pools, predicted=option.predicted)


def asked_in(recipe: LoadedRecipe) -> Sla:
    return sla_of("ttft=1s" if recipe.recipe.sla is None else "", recipe.recipe.sla)


def again(
    recipe: LoadedRecipe, folder: Path, environ: dict[str, str] | None = None, sla: Sla | None = None
) -> LoadedRecipe:
    """What was written, as it loads from another folder."""
    folder.mkdir(exist_ok=True)
    path = folder / "written.yaml"
    path.write_text(recipe_text(recipe, chosen(recipe), "made by a test", sla or asked_in(recipe)))
    return load_recipe(path, environ=environ or {}, files_here=False)


def plain(recipe: LoadedRecipe) -> dict[str, Any]:
    values = recipe.recipe.model_dump(mode="json")
    return {name: value for name, value in values.items() if name not in ("roles", "planner", "sla")}


SETS: tuple[tuple[str, ...], ...] = (
    (),
    ("name=other", "frontend.port=8123"),
    ("target=slurm", "slurm.partition=long", "engine.start_timeout=7m"),
    ("engine.env.A=1", "engine.args.max-num-seqs=17", "router.queue.policy=shortest"),
    ("sla.ttft=250ms", "sla.percentile=p99", "frontend.limits.body=1MiB", "engine.drain_timeout=11s"),
)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("sets", SETS, ids=lambda sets: ",".join(sets) or "none")
def test_what_flags_changed_is_in_it_and_all_else_is_as_it_was(
    tmp_path: Path, path: Path, sets: tuple[str, ...]
) -> None:
    loaded = load_recipe(path, sets, environ={}, files_here=False)
    found = again(loaded, tmp_path / "out")
    assert plain(found) == plain(loaded)
    assert asked_in(found) == asked_in(loaded)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("given", ["ttft=400ms,itl=20ms", "ttft=1.2s,itl=0.0071s,percentile=p99.9", "itl=1m"])
def test_the_service_level_is_the_one_it_was_chosen_for(tmp_path: Path, path: Path, given: str) -> None:
    """Not the one that the recipe had before: a planner would keep another."""
    wanted = sla_of(given, None)
    for sets in ((), ("sla={percentile: p90}",)):
        loaded = load_recipe(path, sets, environ={}, files_here=False)
        assert sla_of("", again(loaded, tmp_path / "out", sla=wanted).recipe.sla) == wanted


def test_what_the_environment_set_and_a_flag_took_away_is_in_it_too(tmp_path: Path) -> None:
    path = ROOT / "recipes" / "quickstart.yaml"
    environ = {"DYNCTL_SET": "frontend.port=8125;sla.itl=40ms"}
    loaded = load_recipe(path, (), ("router", "description"), environ)
    found = again(loaded, tmp_path / "out")
    assert plain(found) == plain(loaded)
    assert (found.recipe.frontend.port, found.recipe.description) == (8125, "")
    assert "router:" not in (tmp_path / "out" / "written.yaml").read_text()


def test_comments_stay_but_for_those_of_sections_written_anew(tmp_path: Path) -> None:
    path = ROOT / "recipes" / "quickstart.yaml"
    loaded = load_recipe(path, ("frontend.port=8123", "router.queue.limit=5"), environ={})
    again(loaded, tmp_path)
    text = (tmp_path / "written.yaml").read_text()
    assert "port: 8123                # taken?" in text
    assert "# tokenizer and chat template that come with dynctl" in text
    assert "repeated prompts go to the worker" not in text


RELATIVE = """
schema: dynctl/v1
name: relative
model: {path: ./model, tokenizer: ./model, chat_template: chat.jinja}
backend: mocker
engine:
  args: {profile: "laws/tp{tensor}.json"}
roles: {aggregated: {args: {profile: other.json}}}
hosts:
  - {name: a, key: keys/a}
  - name: b
    key: keys/b      # of the other one
frontend:
  tls: {cert: cert.pem, key: key.pem}
  api_key:
    - "file:keys/api"
    - {name: second, key: "file:./keys/api"}
target: ssh
sla: {ttft: 1s}
planner: {roles: {aggregated: {max_replicas: 3}, decode: {min_replicas: 2}}, profile: costs.json}
"""


def test_every_relative_path_is_whole_so_that_up_takes_it_from_another_folder(tmp_path: Path) -> None:
    here = tmp_path / "here"
    (here / "keys").mkdir(parents=True)
    (here / "keys" / "api").write_text("a-long-enough-key\n")
    (here / "relative.yaml").write_text(RELATIVE)
    loaded = load_recipe(here / "relative.yaml", environ={})
    found = again(loaded, tmp_path / "elsewhere")
    assert plain(found) == plain(loaded)
    assert [host.key for host in found.recipe.hosts] == [f"{here}/keys/a", f"{here}/keys/b"]
    section = found.recipe.roles.present()["aggregated"]
    assert section.args["profile"] == f"{here}/other.json"
    assert found.recipe.engine.args["profile"] == f"{here}/laws/tp{{tensor}}.json"
    text = (tmp_path / "elsewhere" / "written.yaml").read_text()
    assert f'"file:{here}/keys/api"' in text
    assert "a-long-enough-key" not in text
    assert "# of the other one" in text


def test_a_planner_gets_the_profiles_that_are_written_beside_it(tmp_path: Path) -> None:
    here = tmp_path / "here"
    (here / "keys").mkdir(parents=True)
    (here / "keys" / "api").write_text("a-long-enough-key\n")
    (here / "relative.yaml").write_text(RELATIVE)
    found = again(load_recipe(here / "relative.yaml", environ={}), tmp_path / "out")
    planner = found.recipe.planner
    assert planner is not None
    assert planner.profile == ""
    assert planner.roles.aggregated.profile == f"{tmp_path}/out/profile-aggregated.json"
    assert planner.roles.aggregated.max_replicas == 3
    written = yaml.safe_load((tmp_path / "out" / "written.yaml").read_text())
    assert set(written["planner"]["roles"]) == {"aggregated"}, (
        "bounds of roles that are not there any more go"
    )


def test_a_recipe_in_json_stays_one(tmp_path: Path) -> None:
    document = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())
    path = tmp_path / "quick.json"
    path.write_text(json.dumps(document))
    loaded = load_recipe(path, ("frontend.port=8123", "sla.itl=40ms", "router.queue.limit=5"), environ={})
    assert plain(again(loaded, tmp_path / "out")) == plain(loaded)
    body = (tmp_path / "out" / "written.yaml").read_text().split("\n\n", 1)[1]
    assert json.loads(body)["roles"]["aggregated"]["tensor_parallel"] == 2


OWN = ("name", "description", "planner")
"""Of a trial alone, as are the frontend's address and key."""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_what_is_tried_is_what_is_written(tmp_path: Path, path: Path) -> None:
    loaded = load_recipe(path, ("frontend.limits.body=1MiB", "engine.env.A=1"), environ={}, files_here=False)
    written = again(loaded, tmp_path / "out").recipe
    tried = candidate(loaded, chosen(loaded), "profile-1-confirm-0", "the-secret-key").recipe
    told = [one.model_dump(mode="json", by_alias=True) for one in (tried, written)]
    for one in told:
        for name in (*OWN, "sla"):
            del one[name]
        one["frontend"] |= dict.fromkeys(("host", "port", "replicas", "hosts", "api_key"))
    assert told[0] == told[1]
    assert tried.planner is None, "nobody changes what is measured"


def test_a_limit_is_set_in_the_spelling_that_the_recipe_has_it_in(tmp_path: Path) -> None:
    sets = ("engine.args.max_num_seqs=17", "roles.aggregated.args.max-num-batched-tokens=512")
    loaded = load_recipe(ROOT / "recipes" / "quickstart.yaml", sets, environ={})
    pool = Pool(role="aggregated", layout=Layout(), replicas=3, sequences=6, batched_tokens=2048, load=0.5)
    section = section_of(loaded.recipe, pool)
    args = {**loaded.recipe.engine.args, **section.args}
    assert normalised(args)["max-num-seqs"] == 6
    assert normalised(args)["max-num-batched-tokens"] == 2048
    assert section.replicas == 3
