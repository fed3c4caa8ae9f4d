"""A scripted engine for the sidecar's tests: HTTP as an engine has it, and ways to go wrong."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

RUNNING = 0


def handler(model: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/v1/models":
                listed = [{"id": model, "max_model_len": 512}, {"id": "lora-a", "parent": model}]
                self.answer(json.dumps({"object": "list", "data": listed}).encode())
            elif self.path == "/metrics":
                text = (
                    f'vllm:num_requests_running{{engine="0"}} {RUNNING}\n'
                    'vllm:num_requests_waiting{engine="0"} 0\n'
                    'vllm:kv_cache_usage_perc{engine="0"} 0.25\n'
                    'vllm:cache_config_info{block_size="16",num_gpu_blocks="100",engine="0"} 1\n'
                )
                self.answer(text.encode())
            else:
                self.answer(b"{}")

        def do_POST(self) -> None:
            """/running/N sets what the metrics tell."""
            global RUNNING
            RUNNING = int(self.path.rpartition("/")[2])
            self.answer(b"{}")

        def answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    return Handler


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default="m")
    parser.add_argument("--delay", type=float, default=0)
    parser.add_argument("--die", type=int, default=-1, help="exit with this code at the start")
    parser.add_argument("--ignore-term", action="store_true")
    parser.add_argument("--grandchild", default="", help="start one that ignores SIGTERM, pid into this file")
    options = parser.parse_args()
    sys.stdout.write(f"starting as {os.getpid()}\n")
    sys.stdout.flush()
    if options.ignore_term:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    if options.grandchild:
        script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
        child = subprocess.Popen([sys.executable, "-c", script])
        with open(options.grandchild + ".part", "w") as file:
            file.write(str(child.pid))
        os.replace(options.grandchild + ".part", options.grandchild)
    if options.die >= 0:
        sys.stderr.write("Traceback (most recent call last):\nRuntimeError: the weights are missing\n")
        return int(options.die)
    time.sleep(options.delay)
    try:
        server = ThreadingHTTPServer(("127.0.0.1", options.port), handler(options.model))
    except OSError as error:
        sys.stderr.write(f"OSError: {error}\n")
        return 1
    server.daemon_threads = True
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
