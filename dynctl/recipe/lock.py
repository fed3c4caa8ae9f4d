"""The lockfile: a recipe with every default and override written out. It loads as a recipe does."""

from __future__ import annotations

import yaml

from dynctl.recipe.load import LoadedRecipe


def lock_text(loaded: LoadedRecipe, version: str) -> str:
    """The resolved recipe as YAML, headed by its origin. API keys are digests. Same input, same bytes."""
    head = [f"# Resolved by dynctl {version} from {loaded.file}."]
    head.extend(f"# Changed by: {change}" for change in map(_one_line, loaded.overrides))
    head.append("# Durations are in seconds, sizes in bytes.")
    data = loaded.recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    slurm = loaded.recipe.slurm
    if slurm is not None and slurm.het is not None:
        # What a part does not say is as for all parts: written out it would be said.
        data["slurm"]["het"] = slurm.het.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    body = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, default_flow_style=False, width=110)
    return "\n".join(head) + "\n" + body


def _one_line(change: str) -> str:
    """A change without its value when that may be a secret, and never more than one line."""
    if "api_key" in change or "env." in change:
        change = change.split("=", 1)[0] + "=***" if "=" in change else change
    return " ".join(change.split())
