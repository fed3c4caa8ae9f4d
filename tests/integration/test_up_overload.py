"""Overload and a hung engine in a whole deployment: real frontend, sidecars and simulated engines."""

from __future__ import annotations

import http.client
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.deployment import RECIPES, Cli, Deployment, counter, end_all, eventually, get, owned, sets, up

QUICKSTART = RECIPES / "quickstart.yaml"
PROMPT = "one two three four five six seven eight " * 12


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    yield Cli(tmp_path / "home")
    end_all(tmp_path / "home")


def ask(url: str, number: int, tokens: int = 8) -> tuple[int, str]:
    """Status and Retry-After of one streamed completion, read to its end."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    body = {"model": "tiny", "prompt": f"{number} {PROMPT}", "max_tokens": tokens, "stream": True}
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        return answer.status, answer.headers.get("retry-after", "")
    finally:
        connection.close()


def stream(url: str, number: int, tokens: int) -> tuple[int, int, str]:
    """Status, completion tokens by the usage, and why it ended, of one streamed completion."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    body = {"model": "tiny", "prompt": f"{number} {PROMPT}", "max_tokens": tokens, "stream": True}
    body["stream_options"] = {"include_usage": True}
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        lines = [line.removeprefix(b"data: ") for line in answer.read().split(b"\n\n") if line]
    finally:
        connection.close()
    events = [json.loads(line) for line in lines if line != b"[DONE]"]
    finishes = [choice["finish_reason"] for event in events for choice in event.get("choices", [])]
    usage: dict[str, int] = next((event["usage"] for event in events if event.get("usage")), {})
    return answer.status, usage.get("completion_tokens", 0), next(filter(None, finishes), "")


def engine_urls(deployment: Deployment) -> list[str]:
    """Where the engines listen, by what their command lines say."""
    urls = []
    for pid in owned(deployment.run_dir.resolve().name):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"dynctl.mocker" in words:
            urls.append(f"http://127.0.0.1:{words[words.index(b'--port') + 1].decode()}")
    return urls


def post(url: str, body: bytes) -> None:
    parts = urlsplit(url)
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
    connection.request("POST", parts.path, body)
    assert connection.getresponse().status == 200
    connection.close()


def test_a_storm_fills_the_queue_is_refused_in_part_and_opens_no_circuit(cli: Cli) -> None:
    options = {
        "frontend.port": 0,
        "frontend.admission.prefill_tokens_threshold": 300,
        "router.queue.limit": 8,
        "engine.args.speedup": 0.2,
    }
    with up(cli, QUICKSTART, *sets(options)) as deployment, ThreadPoolExecutor(64) as pool:
        told = list(pool.map(lambda number: ask(deployment.url, number), range(192)))
        after = ask(deployment.url, 999)
        text = get(f"{deployment.url}/metrics")
    statuses = Counter(status for status, _ in told)
    sys.stdout.write(f"storm: {dict(statuses)}\n")
    assert set(statuses) == {200, 429}
    assert all(int(retry) >= 1 for status, retry in told if status == 429)
    assert after[0] == 200
    assert counter(text, "dynctl_frontend_circuit_opened_total") == 0
    assert counter(text, "dynctl_frontend_router_queue_backpressure_total") == statuses[429]
    assert counter(text, "dynctl_frontend_router_queue_pending_requests") == 0


def test_an_engine_that_is_healthy_and_generates_nothing_gets_no_requests(cli: Cli) -> None:
    options = {
        "frontend.port": 0,
        "roles.aggregated.replicas": 2,
        "engine.canary.interval": "500ms",
        "engine.canary.timeout": "500ms",
    }
    with up(cli, QUICKSTART, *sets(options)) as deployment:
        engine = engine_urls(deployment)[0]
        post(f"{engine}/mock/faults", b'{"hang": true}')

        def states() -> list[str]:
            return sorted(str(row["state"]) for row in deployment.ps() if row["role"] == "aggregated")

        assert eventually(lambda: "silent" in states()), states()
        assert [ask(deployment.url, number)[0] for number in range(12)] == [200] * 12
        post(f"{engine}/mock/faults", b'{"hang": false}')
        assert eventually(lambda: "silent" not in states()), states()


def test_streams_of_a_worker_that_stops_go_on_elsewhere_after_its_deadline(cli: Cli) -> None:
    """Not a word is lost: the sidecar has left the registry before its engine aborts what still runs."""
    options = {"frontend.port": 0, "engine.drain_timeout": "1s", "engine.args.speedup": 0.5}
    with up(cli, QUICKSTART, *sets(options)) as deployment, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(stream, deployment.url, number, 400) for number in range(8)]
        metrics = f"{deployment.url}/metrics"
        assert eventually(
            lambda: counter(get(metrics), "dynctl_frontend_time_to_first_token_seconds_count") == 8
        )
        worker = deployment.workers("aggregated")[0]
        os.kill(int(worker["pid"]), signal.SIGTERM)
        told = [one.result() for one in asked]
        text = get(metrics)
    assert [status for status, _, _ in told] == [200] * 8
    assert [finish for _, _, finish in told] == ["length"] * 8
    assert [tokens for _, tokens, _ in told] == [400] * 8
    assert counter(text, "dynctl_frontend_model_migration_total", migration_type="ongoing_request") >= 1
