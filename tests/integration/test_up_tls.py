"""A deployment behind TLS and keys: it serves, says what is wrong with a certificate, lets no secret out."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import make_certificate
from tests.deployment import RECIPES, Cli, Deployment, end_all, eventually, owned, up

pytestmark = pytest.mark.debian("openssl")

QUICKSTART = RECIPES / "quickstart.yaml"
SECRET = "sk-5up3r-s3cret-of-the-test"
FREE_PORT = ("--set", "frontend.port=0")
PROMPT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "stream": True}


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    yield Cli(tmp_path / "home", {"MY_KEY": SECRET})
    end_all(tmp_path / "home")


def tls(cert: Path, key: Path) -> tuple[str, ...]:
    return (*FREE_PORT, "--set", f"frontend.tls={{cert: {cert}, key: {key}}}")


def fetch(deployment: Deployment, cert: Path, path: str, body: Any = None, key: str = SECRET) -> bytes:
    """One request by a client that trusts nothing but this certificate."""
    trust = ssl.create_default_context(cafile=str(cert))
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(deployment.url + path, data, headers)
    with urllib.request.urlopen(request, timeout=30, context=trust) as got:
        content: bytes = got.read()
    return content


def model_name(deployment: Deployment, cert: Path) -> str:
    listed = json.loads(fetch(deployment, cert, "/v1/models"))
    name: str = listed["data"][0]["id"]
    return name


def leaks(run_dir: Path, home: Path, words: list[bytes]) -> list[str]:
    """Where any of `words` can be read: command lines of the deployment, and all it wrote."""
    found = []
    for pid in owned(run_dir.resolve().name):
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
        found += [f"/proc/{pid}/cmdline" for word in words if word in line]
    for file in (*run_dir.rglob("*"), *home.rglob("*")):
        if file.is_file() and any(word in file.read_bytes() for word in words):
            found.append(str(file))
    return found


def test_https_is_served_and_no_secret_can_be_read_anywhere(cli: Cli, tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path / "tls")
    with up(cli, QUICKSTART, *tls(cert, key), "--set", "frontend.api_key=env:MY_KEY") as deployment:
        assert deployment.url.startswith("https://")
        prompt = {**PROMPT, "model": model_name(deployment, cert)}
        assert fetch(deployment, cert, "/v1/chat/completions", prompt).endswith(b"data: [DONE]\n\n")
        assert cli.json("status", deployment.name)["phase"] == "ready"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            fetch(deployment, cert, "/v1/models", key="sk-wrong-one")
        inside = [line.encode() for line in key.read_text().splitlines() if len(line) == 64]
        assert inside
        words = [SECRET.encode(), b"sk-wrong-one", *inside]
        assert leaks(deployment.run_dir, cli.home, words) == []


def test_a_renewed_certificate_is_served_after_sighup_and_a_bad_one_is_not(cli: Cli, tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path / "tls")
    renewed, its_key = make_certificate(tmp_path / "renewed")
    with up(cli, QUICKSTART, *tls(cert, key)) as deployment:
        (frontend,) = [row for row in deployment.ps() if row["role"] == "frontend"]
        host, _, port = deployment.url.removeprefix("https://").rpartition(":")

        def served() -> bytes:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            with socket.create_connection((host, int(port)), 10) as raw, context.wrap_socket(raw) as sock:
                return sock.getpeercert(binary_form=True) or b""

        def der(file: Path) -> bytes:
            return ssl.PEM_cert_to_DER_cert(file.read_text())

        assert cli.json("chat", "Hello", "--max-tokens", "4", "--name", deployment.name)["content"]
        assert served() == der(cert)
        before = der(cert)
        cert.write_bytes(renewed.read_bytes())
        os.kill(frontend["pid"], signal.SIGHUP)
        assert not eventually(lambda: served() != before, 1.0)
        key.write_bytes(its_key.read_bytes())
        os.kill(frontend["pid"], signal.SIGHUP)
        assert eventually(lambda: served() == der(renewed))


def test_up_says_what_is_wrong_with_a_certificate_before_anything_starts(cli: Cli, tmp_path: Path) -> None:
    cert, _ = make_certificate(tmp_path / "tls")
    old, its_key = make_certificate(tmp_path / "old", dates=("20200101000000Z", "20200201000000Z"))
    for pair, told in (((old, its_key), "it has expired"), ((cert, its_key), "another certificate")):
        for verb in (("up", "-d", "-y"), ("validate",)):
            done = cli.run(verb[0], str(QUICKSTART), *verb[1:], *tls(*pair))
            assert done.returncode != 0
            assert told in done.stderr + done.stdout
            assert "Traceback" not in done.stderr
    runs = cli.home / "runs"
    assert not runs.is_dir() or not [p for p in runs.iterdir() if not p.name.startswith(".")]
