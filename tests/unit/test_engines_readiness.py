"""An engine that names the model by its path is ready all the same; one that serves another model is not."""

from __future__ import annotations

import json
from typing import cast

import pytest

from dynctl.engines import catalog
from dynctl.http.client import Client, Response
from dynctl.worker.readiness import Probe, WrongModel


class Answers:
    """Stands for an engine's HTTP side: healthy, with these models, without metrics."""

    def __init__(self, *names: str) -> None:
        self._models = json.dumps({"data": [{"id": name} for name in names]}).encode()

    async def request(self, origin: object, method: str, path: str, **_: object) -> Response:
        return Response(status=200, headers=[], body=self._models if path == "/v1/models" else b"")


def probe(engine: str, *names: str) -> Probe:
    client = cast(Client, Answers(*names))
    return Probe(client, catalog.get(engine), "http://127.0.0.1:1", "llama")


async def test_engine_that_goes_by_the_path() -> None:
    assert (await probe("trtllm", "Llama-3.1-70B").ready()).adapters == ()


@pytest.mark.parametrize(("engine", "names"), [("vllm", ["Llama-3.1-70B"]), ("trtllm", []), ("vllm", [])])
async def test_engine_of_another_model(engine: str, names: list[str]) -> None:
    with pytest.raises(WrongModel, match="not llama"):
        await probe(engine, *names).ready()
