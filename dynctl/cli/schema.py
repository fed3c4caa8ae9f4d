"""`dynctl schema`: the recipe format for editors."""

from __future__ import annotations

import json

from dynctl.cli import options
from dynctl.cli.render import data
from dynctl.recipe.schema import Recipe


def schema(json_: options.Json = False) -> None:
    """JSON Schema of a recipe, for editors.

    In VS Code with the YAML extension: dynctl schema > dynctl.schema.json, and as the recipe's first line
    "# yaml-language-server: $schema=dynctl.schema.json". Always JSON, with or without --json.
    """
    made = Recipe.model_json_schema(by_alias=True)
    made = {"$schema": "https://json-schema.org/draft/2020-12/schema", **made, "title": "dynctl recipe"}
    data(json.dumps(made, indent=2))
