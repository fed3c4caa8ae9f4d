"""Real engines are slow to start: one per session, shared by all tests; tests use prompts of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engines.real_worker import Worker, running, tiny_launch


@pytest.fixture(scope="session")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """One vLLM worker with the tiny model, started by the command that dynctl gives."""
    with running(tiny_launch("aggregated"), tmp_path_factory.mktemp("vllm")) as ready:
        yield ready
