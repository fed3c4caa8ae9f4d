"""An engine that names the model by its path is ready all the same; one that serves another model is not."""

from __future__ import annotations

import json
from typing import cast

import pytest

from dynctl.engines import catalog
from dynctl.errors import NotReady
from dynctl.http.client import Client, Origin, Response
from dynctl.protocol.instances import ModelCard
from dynctl.protocol.specs import WorkerSpec
from dynctl.worker.readiness import Bootstrap, Probe, WrongModel, bootstrap_of


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


class Bootstrapped:
    """An engine with a bootstrap server on port 9, which answers as told, and a version."""

    def __init__(self, status: int, body: bytes, version: bytes = b"{}") -> None:
        self._bootstrap = Response(status=status, headers=[], body=body)
        self._version = version
        self.asked: list[str] = []

    async def request(self, origin: Origin, method: str, path: str, **_: object) -> Response:
        if origin.port == 9:
            self.asked.append(path)
            return self._bootstrap
        bodies = {"/v1/models": b'{"data": [{"id": "llama"}]}', "/version": self._version}
        return Response(status=200, headers=[], body=bodies.get(path, b""))


def prefill_probe(client: Bootstrapped, backend: str, transfer: str = "") -> Probe:
    contract = catalog.contract(backend, transfer)
    assert contract is not None
    bootstrap = Bootstrap(Origin("http", "127.0.0.1", 9), contract, ranks=2)
    return Probe(cast(Client, client), catalog.get(backend), "http://127.0.0.1:1", "llama", bootstrap)


async def test_prefill_is_ready_with_the_names_decode_knows_its_ranks_by() -> None:
    client = Bootstrapped(200, b'{"0": {"engine_id": "e0"}, "1": {"engine_id": "e1"}}')
    assert (await prefill_probe(client, "vllm", "mooncake").ready()).peers == ("e0", "e1")
    assert client.asked == ["/query"]


@pytest.mark.parametrize(
    ("backend", "transfer", "status", "body"),
    [
        ("vllm", "mooncake", 200, b"{}"),
        ("vllm", "mooncake", 200, b'{"0": {"engine_id": "e0"}}'),
        ("vllm", "mooncake", 404, b""),
        ("sglang", "", 503, b"not yet"),
    ],
)
async def test_prefill_that_decode_cannot_find_yet_is_not_ready(
    backend: str, transfer: str, status: int, body: bytes
) -> None:
    with pytest.raises(NotReady):
        await prefill_probe(Bootstrapped(status, body), backend, transfer).ready()


async def test_all_of_sglangs_ranks_are_asked_for() -> None:
    client = Bootstrapped(200, b"{}")
    assert (await prefill_probe(client, "sglang").ready()).peers == ()
    assert client.asked[0].startswith("/route?prefill_dp_rank=-1&")


@pytest.mark.parametrize(
    ("told", "known"), [(b'{"version": "1.3.0rc2"}', "1.3.0rc2"), (b'"1.2"', ""), (b"", ""), (b"{}", "")]
)
async def test_the_version_is_what_the_engine_says_or_unknown(told: bytes, known: str) -> None:
    client = cast(Client, Bootstrapped(200, b"", told))
    probe = Probe(client, catalog.get("trtllm"), "http://127.0.0.1:1", "llama")
    assert (await probe.ready()).version == known


@pytest.mark.parametrize(
    ("backend", "transfer", "port", "asked"),
    [
        ("vllm", "mooncake", 9, True),
        ("vllm", "", 9, False),
        ("vllm", "mooncake", 0, False),
        ("sglang", "", 9, True),
    ],
)
def test_only_prefill_workers_with_a_bootstrap_server_are_asked(
    backend: str, transfer: str, port: int, asked: bool
) -> None:
    spec = WorkerSpec(
        id="prefill-0",
        role="prefill",
        index=0,
        node="n",
        backend=backend,
        model=ModelCard(name="m"),
        url="http://10.0.0.5:8000",
        registry="",
        keys_file="",
        bind_host="",
        events_port=0,
        control_port=0,
        bootstrap_port=port,
        kv_transfer=transfer,
    )
    found = bootstrap_of(spec)
    assert (found is not None) is asked
    assert found is None or str(found.origin) == "http://10.0.0.5:9"
