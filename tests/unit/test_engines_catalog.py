"""Which prefill/decode contract belongs to which engine and transfer."""

from __future__ import annotations

import pytest

from dynctl.engines import catalog
from dynctl.engines.vllm_disagg import NixlPull
from dynctl.engines.vllm_mooncake import Mooncake
from dynctl.errors import RecipeError


def test_an_engines_first_transfer_is_its_default() -> None:
    assert isinstance(catalog.contract("vllm"), NixlPull)
    assert isinstance(catalog.contract("vllm", "mooncake"), Mooncake)
    assert catalog.contract("external") is None


@pytest.mark.parametrize(("backend", "known"), [("vllm", "nixl, mooncake"), ("external", "none")])
def test_a_transfer_the_engine_does_not_have_is_refused(backend: str, known: str) -> None:
    with pytest.raises(RecipeError, match=known):
        catalog.contract(backend, "carrier_pigeon")
