"""A look at Slurm's nodes asks for those of the job, and reads what each said whatever srun makes of it."""

from pathlib import Path

from dynctl.deploy.slurm_look import Limits, by_node, look_argv
from dynctl.deploy.slurm_size import parts_of
from dynctl.recipe.load import LoadedRecipe, load_recipe

LIMITS = Limits(60.0, 20.0)
QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


def loaded(*sets: str) -> LoadedRecipe:
    return load_recipe(QUICKSTART, ["target=slurm", *sets], environ={})


def argv(*sets: str) -> tuple[str, ...]:
    recipe = loaded(*sets)
    return look_argv(recipe, parts_of(recipe)[0], "look-1", LIMITS, ("python3", "-", "{}"))


def test_nodes_are_those_of_the_job_as_many_as_are_to_be_had() -> None:
    words = argv("slurm.nodes=4", "slurm.partition=gpu", "slurm.gpus_per_node=8", "slurm.exclusive=true")
    assert words[0] == "srun"
    assert {"--nodes=1-4", "--partition=gpu", "--gpus-per-node=8", "--exclusive"} <= set(words)
    assert "--immediate=60" in words, "it must not wait for ever"
    assert words[-3:] == ("python3", "-", "{}")


def test_its_job_is_short_whatever_the_recipes_is_and_has_no_options_of_sbatch_alone() -> None:
    sets = ("slurm.nodes=1", "slurm.time=2d", "slurm.sbatch_args.requeue=true", "slurm.sbatch_args.nice=5")
    words = argv(*sets, "slurm.sbatch_args.dependency=singleton")
    assert [word for word in words if word.startswith("--time")] == ["--time=0-00:01:20"]
    assert "--nice=5" in words
    assert not [word for word in words if "requeue" in word or "dependency" in word]


def test_pieces_of_long_lines_are_put_together_by_node() -> None:
    output = b"""00: @n1
01: @n2
00: {"a": "x: y
01: {"b": 1}
00: z"}
"""
    assert by_node(output) == {"n1": b'{"a": "x: yz"}', "n2": b'{"b": 1}'}


def test_sruns_own_words_are_no_nodes() -> None:
    assert by_node(b"srun: error: no\n 3: @n4\n12: python3: not found\n") == {"n4": b""}
