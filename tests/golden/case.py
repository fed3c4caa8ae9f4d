"""Golden cases as folders. As a script: write what is expected anew; read the difference before you commit.

    python -m tests.golden.case [NAME...]

cases/NAME/     recipe.yaml, and inventory.yaml unless it is for one machine without GPUs
shipped/NAME/   the same for recipes/NAME.yaml; set.txt holds one --set a line, {tmp} being a folder with a
                virtual environment "venv" and a model directory "model"
expected.json   the plan, with the content of every file it writes
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from dynctl.deploy.plan import Plan
from dynctl.deploy.planner import build_plan
from dynctl.deploy.seats import RunContext
from dynctl.recipe import shipped
from dynctl.recipe.check import check_recipe
from dynctl.recipe.load import load_recipe
from dynctl.topology.inventory import LOCAL, Host, Inventory
from dynctl.topology.inventory_file import load_inventory

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent.parent / "dynctl"
RUN = RunContext(run_id="RUN_ID", run_dir="/RUN_DIR", python="PYTHON")
LLAMA_CONFIG = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 4096,
}


def all_cases() -> list[Path]:
    """Every case folder."""
    return sorted(p for kind in ("cases", "shipped") for p in (HERE / kind).iterdir() if p.is_dir())


def prepare(tmp: Path) -> None:
    """Make the virtual environment and model directory that cases may name as {tmp}/venv and {tmp}/model."""
    (tmp / "venv" / "bin").mkdir(parents=True)
    (tmp / "model").mkdir()
    (tmp / "model" / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    (tmp / "model" / "tokenizer.json").write_text("{}")


def plan_of(case: Path, tmp: Path) -> Plan:
    """The plan of a case."""
    recipe = case / "recipe.yaml"
    if case.parent.name == "shipped":
        place = shipped.directory()
        assert place is not None
        recipe = place / f"{case.name}.yaml"
    sets = (case / "set.txt").read_text().splitlines() if (case / "set.txt").exists() else []
    loaded = load_recipe(recipe, [text.format(tmp=tmp) for text in sets], environ={"HOME": str(tmp)})
    check_recipe(loaded)
    hosts = case / "inventory.yaml"
    here = Inventory((Host(LOCAL, "127.0.0.1", 0),), "this machine")
    return build_plan(loaded, load_inventory(hosts) if hosts.exists() else here, (), RUN)


def rendered(plan: Plan, tmp: Path) -> str:
    """What expected.json holds: the plan with files as they are written, and no path of this machine."""
    shown: dict[str, Any] = plan.shown()
    for entry, process in zip(shown["processes"], plan.processes, strict=True):
        entry["files"] = {name: _content(name, text) for name, text in sorted(process.command.files.items())}
        if process.kind == "engine":
            entry["files"] = sorted(entry["files"])
    text = json.dumps(shown, indent=2)
    for path, name in ((str(tmp), "TMP"), (str(PACKAGE), "DYNCTL"), (sys.executable, "PYTHON")):
        text = text.replace(path, name)
    return text + "\n"


def _content(name: str, text: str) -> Any:
    return json.loads(text) if name.endswith(".json") else text.splitlines()


def main(names: list[str]) -> None:
    """Write expected.json of the named cases, of all without names."""
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder).resolve()
        prepare(tmp)
        for case in all_cases():
            if not names or case.name in names:
                (case / "expected.json").write_text(rendered(plan_of(case, tmp), tmp))


if __name__ == "__main__":
    main(sys.argv[1:])
