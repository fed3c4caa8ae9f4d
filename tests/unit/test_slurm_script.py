"""The batch script: how large the job is, what Slurm is told, and what is refused before it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from dynctl.deploy.planner import build_plan
from dynctl.deploy.seats import RunContext
from dynctl.deploy.slurm_script import JobContext, script_text, slurm_time
from dynctl.deploy.slurm_size import Size, assumed, labelled, on_its_parts, size_of
from dynctl.errors import PlacementError, RecipeError
from dynctl.recipe.load import LoadedRecipe, load_recipe
from dynctl.topology.inventory import Host, Inventory

RECIPE = """\
schema: dynctl/v1
name: demo
model: {path: org/model}
backend: vllm
target: slurm
roles:
  prefill: {replicas: 2, tensor_parallel: 2}
  decode: {replicas: 1, tensor_parallel: 4}
"""
CONTEXT = JobContext("demo-1", "/home/me/runs/demo-1", "/venv/bin/python", "/home/me/.dynctl")


def load(tmp_path: Path, *sets: str) -> LoadedRecipe:
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE)
    return load_recipe(file, sets, environ={"HOME": str(tmp_path)})


def options(text: str) -> dict[str, str]:
    """The directives by name, unquoted as sbatch does it."""
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH ")]
    words = [shlex.split(line) for line in lines]
    assert all(len(word) == 1 for word in words)
    return {word[0].partition("=")[0]: word[0].partition("=")[2] for word in words}


@pytest.mark.parametrize(
    ("sets", "size"),
    [
        ((), Size(1, 8)),
        (("slurm.gpus_per_node=4",), Size(2, 4)),
        (("slurm.gpus_per_node=3",), Size(4, 3)),
        (("slurm.gres=gpu:a100:4",), Size(2, 4)),
        (("slurm.gres=gpu:2,gpu:2,shard:9",), Size(2, 4)),
        (("slurm.nodes=2",), Size(2, 4)),
        (("slurm.nodes=3", "slurm.gpus_per_node=8"), Size(3, 8)),
        (("roles.decode.replicas=4",), Size(3, 8)),
        (("roles.decode.tensor_parallel=32",), Size(5, 8)),
        (("engine.device=cpu",), Size(1, 0)),
        (("backend=mocker",), Size(1, 0)),
        (("backend=mocker", "slurm.nodes=3"), Size(3, 0)),
    ],
)
def test_the_roles_tell_how_many_nodes_unless_the_recipe_does(
    tmp_path: Path, sets: tuple[str, ...], size: Size
) -> None:
    assert size_of(load(tmp_path, *sets)) == size


def test_too_small_a_job_is_refused_before_it_is_submitted(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match=r"needs 8 GPUs, a job of 1 nodes with 4 GPUs each has 4"):
        size_of(load(tmp_path, "slurm.nodes=1", "slurm.gpus_per_node=4"))


def test_every_field_becomes_its_option(tmp_path: Path) -> None:
    sets = (
        "slurm.partition=gpu",
        "slurm.account=abc",
        "slurm.qos=high",
        "slurm.time=04:00:00",
        "slurm.constraint=a100&nvlink",
        "slurm.exclude=n[1-2]",
        "slurm.nodelist=n7",
        "slurm.exclusive=true",
        "slurm.reservation=r1",
        "slurm.cpus_per_task=32",
        "slurm.mem=500G",
        "slurm.comment=for the demo",
        "slurm.warning=300",
        "slurm.sbatch_args.mail-type=END,FAIL",
        "slurm.sbatch_args.spread-job=true",
        "slurm.sbatch_args.nice=100",
    )
    given = options(script_text(load(tmp_path, *sets), CONTEXT))
    assert given == {
        "job-name": "demo-1",
        "partition": "gpu",
        "account": "abc",
        "qos": "high",
        "nodes": "1",
        "ntasks-per-node": "1",
        "gpus-per-node": "8",
        "cpus-per-task": "32",
        "mem": "500G",
        "time": "0-04:00:00",
        "constraint": "a100&nvlink",
        "exclude": "n[1-2]",
        "nodelist": "n7",
        "exclusive": "",
        "reservation": "r1",
        "comment": "for the demo",
        "output": "/home/me/runs/demo-1/logs/controller.log",
        "open-mode": "append",
        "signal": "B:USR1@300",
        "no-requeue": "",
        "mail-type": "END,FAIL",
        "spread-job": "",
        "nice": "100",
    }


def test_gres_takes_the_place_of_gpus_per_node(tmp_path: Path) -> None:
    given = options(script_text(load(tmp_path, "slurm.gres=gpu:h100:8"), CONTEXT))
    assert given["gres"] == "gpu:h100:8"
    assert "gpus-per-node" not in given


@pytest.mark.parametrize("comment", ['a "b" c', "it's $HOME `id`", "back\\slash", "a # b", "--partition=x"])
def test_a_value_is_one_word_whatever_is_in_it(tmp_path: Path, comment: str) -> None:
    loaded = load(tmp_path, "slurm.comment=x")
    slurm = loaded.recipe.slurm
    assert slurm is not None
    recipe = loaded.recipe.model_copy(update={"slurm": slurm.model_copy(update={"comment": comment})})
    text = script_text(LoadedRecipe(recipe, "r.yaml", loaded.model), CONTEXT)
    assert options(text)["comment"] == comment


def test_a_percent_sign_in_the_path_is_not_taken_for_a_pattern(tmp_path: Path) -> None:
    context = JobContext("demo-1", "/data/50%j/demo-1", "python", "/h")
    assert options(script_text(load(tmp_path), context))["output"] == "/data/50%%j/demo-1/logs/controller.log"


def test_the_script_is_run_as_written_with_blanks_in_its_paths(tmp_path: Path) -> None:
    context = JobContext("demo-1", "/my runs/demo-1", "/my venv/python", "/my home")
    lines = [
        shlex.split(line) for line in script_text(load(tmp_path), context).splitlines() if line[:1] != "#"
    ]
    assert lines[0] == ["export", "DYNCTL_HOME=/my home"]
    assert lines[-1][:2] == ["exec", "/my venv/python"]
    assert lines[-1][-2:] == ["--run-dir", "/my runs/demo-1"]


@pytest.mark.parametrize("name", ["job-name", "output", "array", "wrap", "error"])
def test_options_that_would_hide_the_job_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match=f"'{name}' cannot be given"):
        script_text(load(tmp_path, f"slurm.sbatch_args.{name}=x"), CONTEXT)


def test_options_with_a_field_of_their_own_are_sent_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"sbatch_args\.partition=x: .*from slurm\.partition: set it there"):
        script_text(load(tmp_path, "slurm.sbatch_args.partition=x"), CONTEXT)


def test_a_time_limit_that_leaves_no_time_to_serve_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"slurm\.time=120: a time limit of 120 s is too short"):
        script_text(load(tmp_path, "slurm.time=120"), CONTEXT)
    assert "signal" not in options(script_text(load(tmp_path, "slurm.time=120", "slurm.warning=0"), CONTEXT))


@pytest.mark.parametrize(
    ("seconds", "text"), [(60, "0-00:01:00"), (90061.2, "1-01:01:02"), (14400, "0-04:00:00")]
)
def test_time_as_slurm_reads_it(seconds: float, text: str) -> None:
    assert slurm_time(seconds) == text


def test_each_role_gets_its_part_of_the_job(tmp_path: Path) -> None:
    sets = ("slurm.partition=a", "slurm.het.decode.partition=b", "slurm.het.decode.gpus_per_node=4")
    text = script_text(load(tmp_path, *sets), CONTEXT)
    prefill, decode = (options(part) for part in text.split("#SBATCH hetjob\n"))
    assert (prefill["partition"], prefill["nodes"], prefill["gpus-per-node"]) == ("a", "1", "4")
    assert (decode["partition"], decode["nodes"], decode["gpus-per-node"]) == ("b", "1", "4")
    assert prefill["job-name"] == decode["job-name"] == "demo-1", "both parts are found by the name"
    assert "signal" in prefill
    assert "signal" not in decode


def test_roles_stay_on_the_nodes_of_their_part(tmp_path: Path) -> None:
    loaded = load(tmp_path, "slurm.het=true", "roles.prefill.replicas=4")
    made = build_plan(on_its_parts(loaded), assumed(loaded), (), RunContext("r", "/r", "python"))
    nodes = {role: {p.node for p in made.processes if p.role == role} for role in ("prefill", "decode")}
    assert nodes == {"prefill": {"node-0"}, "decode": {"node-1"}}


def test_nodes_that_were_given_are_labelled_by_their_part(tmp_path: Path) -> None:
    loaded = load(tmp_path, "slurm.het=true")
    given = Inventory((Host("n7", "10.0.0.7", 8), Host("n2", "10.0.0.2", 8)), "job 1")
    labels = [host.labels for host in labelled(loaded, given, {"n7": 0, "n2": 1}).hosts]
    assert labels == [("prefill",), ("decode",)]
    assert labelled(load(tmp_path), given, {}) == given


def test_a_successor_is_submitted_ahead_of_the_warning(tmp_path: Path) -> None:
    text = script_text(load(tmp_path, "slurm.resubmit=30m", "slurm.time=4h"), CONTEXT)
    assert options(text)["signal"] == "B:USR1@1800"
    assert text.rstrip().endswith("--resubmit")
    assert "--resubmit" not in script_text(load(tmp_path), CONTEXT)
