"""What `dynctl compare` takes for a service."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynctl.cli.stand import Stand, stand_of
from dynctl.errors import UsageError


def test_a_recipe_whose_model_is_on_other_machines_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`up` gets the target by a flag, and looks for the model where it is."""
    monkeypatch.setenv("DYNCTL_HOME", str(tmp_path / "home"))
    path = tmp_path / "r.yaml"
    path.write_text(
        "schema: dynctl/v1\nname: far\nmodel: {path: /elsewhere/model}\nbackend: vllm\n"
        "roles: {aggregated: {}}\n"
    )
    assert stand_of(str(path)) == Stand("far", path)
    with pytest.raises(UsageError, match="is no recipe, no URL and no deployment"):
        stand_of("nothing-of-that-name")
