"""The assets that ship are those the maintainers' script makes."""

from __future__ import annotations

from tests.make_tiny_tokenizer import ASSETS, build


def test_the_assets_are_what_the_script_makes() -> None:
    assert {path.name: path.read_text(encoding="utf-8") for path in ASSETS.iterdir()} == build()
