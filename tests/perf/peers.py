"""Who is measured by `serving`, and how each is started in front of the same engines.

    python -m tests.perf.peers build [NAME...]      sglang-router, vllm-router, ai-dynamo: all by default

Each peer from PyPI lives in an environment of its own under ~/.cache/dynctl-perf. HAProxy is Debian's
(`apt-get install haproxy`). ai-dynamo is installed without `aisimulate`, a time model for its mocker which is
not on PyPI and not used here; its frontend cannot stand before other engines than its own workers, so it has
its own mocker behind it, at the same number of tokens a second as nearly as that can be set.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.perf.stand_in import ASSETS, ROOT

HOME = Path.home() / ".cache" / "dynctl-perf"
START_DEADLINE_S = 60.0
DYNAMO_NEEDS = (
    "aiohttp>=3.14.3,<4",
    "certifi",
    "kubernetes>=32.0.1,<33",
    "msgspec>=0.19",
    "prometheus-client>=0.23.1,<1",
    "pyzmq>=26",
    "redis>=6.2,<9",
    "tqdm",
    "transformers>=4.56",
    "typing-extensions",
    "zstandard>=0.23,<1",
    "pydantic>=2.10.6,<=2.13.5",
    "uvloop>=0.21",
)
BUILDS: dict[str, list[list[str]]] = {
    "sglang-router": [["sglang-router"]],
    "vllm-router": [["vllm-router"]],
    "ai-dynamo": [["--no-deps", "ai-dynamo", "ai-dynamo-runtime"], list(DYNAMO_NEEDS)],
}
HAPROXY_CONFIG = """
global
  nbthread 1
  maxconn 8192
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
  {option}
frontend in
  bind 127.0.0.1:{port}
  default_backend engines
backend engines
  balance leastconn
{servers}
"""


@dataclass
class Running:
    """A started proxy: the CPU of `measured` and its children counts, `others` stand behind it."""

    port: int
    measured: subprocess.Popen[Any]
    others: list[subprocess.Popen[Any]] = field(default_factory=list)

    def stop(self) -> None:
        """End what was started."""
        for process in (self.measured, *self.others):
            process.terminate()
        for process in (self.measured, *self.others):
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@dataclass(frozen=True)
class Setting:
    """Where a proxy is started: the engines' ports, a folder for its files, and whether Dynamo's mocker takes
    its time as a real engine does (the scripted engine is told by itself). `told`: batches of KV events a
    second, and blocks in them each way, that dynctl's stand-in sidecars tell.
    """

    engines: list[int]
    folder: Path
    paced: bool = True
    told: tuple[float, float] = (20.0, 480.0)

    def urls(self) -> list[str]:
        """The engines' addresses."""
        return [f"http://127.0.0.1:{port}" for port in self.engines]


Start = Callable[[int, Setting], Running]
"""Starts a proxy on a port."""


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def launch(argv: list[str], log: Path, **env: str) -> subprocess.Popen[Any]:
    """A process in the repository's root, its words in a file."""
    with log.open("ab") as out:
        return subprocess.Popen(argv, cwd=ROOT, stdout=out, stderr=out, env={**os.environ, **env})


def haproxy(option: str) -> Start:
    """One thread, as Debian ships it, with one more line of configuration."""

    def start(port: int, setting: Setting) -> Running:
        servers = "\n".join(f"  server e{port} 127.0.0.1:{port}" for port in setting.engines)
        config = setting.folder / f"haproxy-{port}.cfg"
        config.write_text(HAPROXY_CONFIG.format(port=port, option=option, servers=servers))
        argv = ["/usr/sbin/haproxy", "-db", "-q", "-f", str(config)]
        return Running(port, launch(argv, setting.folder / "haproxy.log"))

    return start


def bare(port: int, setting: Setting) -> Running:
    """Nothing but dynctl.http: server, client, relay."""
    argv = [sys.executable, "-m", "tests.perf.bare_relay", str(port), str(setting.engines[0])]
    return Running(port, launch(argv, setting.folder / "bare.log"))


def dynctl(mode: str) -> Start:
    """A frontend in this router mode, metrics on as always, with all that it hears of in a deployment."""

    def start(port: int, setting: Setting) -> Running:
        told = map(str, setting.told)
        argv = [sys.executable, "-m", "tests.perf.stand_in", "--frontend", mode, str(port), *told]
        argv += setting.urls()
        return Running(port, launch(argv, setting.folder / f"dynctl-{mode}.log"))

    return start


def router(name: str) -> Start:
    """SGLang's or vLLM's router, each with the policy that it is used with for prefix caches."""

    def start(port: int, setting: Setting) -> Running:
        argv = [str(HOME / name / "bin" / name), *(["launch"] if name == "sglang-router" else [])]
        argv += ["--host", "127.0.0.1", "--port", str(port)]
        argv += ["--policy", "cache_aware", "--prometheus-port", str(free_port()), "--log-level", "error"]
        argv += ["--worker-urls", *setting.urls()]
        return Running(port, launch(argv, setting.folder / f"{name}.log"))

    return start


def dynamo(port: int, setting: Setting) -> Running:
    """Its frontend with its KV router, before its own mocker with as many workers."""
    python = str(HOME / "ai-dynamo" / "bin" / "python")
    planes = ["--discovery-backend", "file", "--event-plane", "zmq", "--request-plane", "tcp"]
    env = {"DYN_FILE_KV": str(setting.folder / f"dynamo-{port}"), "HF_HUB_OFFLINE": "1", "DYN_LOG": "error"}
    behind = [python, "-m", "dynamo.mocker", "--model-path", str(ASSETS), "--model-name", "tiny"]
    behind += ["--block-size", "16", "--max-model-len", "131072", "--num-gpu-blocks-override", "262144"]
    behind += ["--num-workers", str(len(setting.engines)), "--max-num-seqs", "1024", *planes]
    behind += [] if setting.paced else ["--speedup-ratio", "0"]
    mocker = launch(behind, setting.folder / "mocker.log", **env)
    argv = [python, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port)]
    argv += ["--router-mode", "kv", "--kv-cache-block-size", "16", *planes]
    return Running(port, launch(argv, setting.folder / "dynamo.log", **env), [mocker])


PROXIES: dict[str, Start] = {
    "haproxy": haproxy("option http-no-delay"),
    "haproxy-held": haproxy(""),
    "dynctl.http": bare,
    "dynctl least_loaded": dynctl("least_loaded"),
    "dynctl kv": dynctl("kv"),
    "sglang-router": router("sglang-router"),
    "vllm-router": router("vllm-router"),
    "ai-dynamo": dynamo,
}
"""HAProxy holds chunks back by default (MSG_MORE, for up to 200 ms); with `http-no-delay` it does the work
that a token stream asks for, and that row is the measure of the others.
"""


def missing(name: str) -> str:
    """Why this one cannot be started here; "" = it can."""
    if name.startswith("haproxy"):
        return "" if Path("/usr/sbin/haproxy").exists() else "apt-get install haproxy"
    if name in BUILDS and not (HOME / name / "built").exists():
        return f"python -m tests.perf.peers build {name}"
    return ""


def await_serving(one: Running, name: str) -> None:
    """Wait until the proxy lists a model, whatever it calls it.

    Ends the program when the proxy exits or the deadline passes.
    """
    end = time.monotonic() + START_DEADLINE_S
    request = b"GET /v1/models HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
    while time.monotonic() < end:
        if one.measured.poll() is not None:
            raise SystemExit(f"{name} exited with {one.measured.returncode}")
        try:
            with socket.create_connection(("127.0.0.1", one.port), timeout=1.0) as probe:
                probe.sendall(request)
                got = b""
                while data := probe.recv(65536):
                    got += data
            if b" 200 " in got.partition(b"\r\n")[0] and b'"object":"model"' in got:
                return
        except OSError:
            pass  # it does not listen yet
        time.sleep(0.1)
    raise SystemExit(f"{name} does not serve its model after {START_DEADLINE_S:g} s")


def build(names: list[str]) -> None:
    """Make the environments that are asked for anew."""
    for name in names or list(BUILDS):
        home = HOME / name
        (home / "built").unlink(missing_ok=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        for wanted in BUILDS[name]:
            subprocess.run([str(home / "bin" / "pip"), "install", "-q", *wanted], check=True)
        (home / "built").touch()
        print(f"{name}: {home}")


def temporary() -> tempfile.TemporaryDirectory[str]:
    """For the files of one run."""
    return tempfile.TemporaryDirectory(prefix="dynctl-serving-")


if __name__ == "__main__":
    if sys.argv[1:2] != ["build"]:
        raise SystemExit(__doc__)
    build(sys.argv[2:])
