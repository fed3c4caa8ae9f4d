"""`dynctl chat`."""

from __future__ import annotations

import http.client
import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from dynctl.cli import options
from dynctl.cli.pick import pick, state
from dynctl.cli.render import json_data
from dynctl.deploy.ask import open_frontend
from dynctl.errors import EngineFailed, PeerLost, RequestError
from dynctl.protocol.sse import DONE, event_data

_ANSWER_S = 600.0

Prompt = Annotated[str, typer.Argument(metavar="PROMPT", help="What to say; - reads standard input.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", metavar="N", min=1, help="At most that many tokens.")]
Key = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        metavar="KEY",
        envvar="DYNCTL_API_KEY",
        help="When the frontend asks for one.",
        show_default=False,
    ),
]


def chat(
    prompt: Prompt,
    name: options.NameOption = None,
    max_tokens: MaxTokens = 256,
    api_key: Key = None,
    as_json: options.Json = False,
) -> None:
    """Send one prompt, stream the answer.

    With --json: one object with the whole answer, why it ended, and the usage.
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    kept = state(pick(name))
    body = {
        "model": kept.model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer: list[str] = []
    reason, usage = "", dict[str, Any]()
    for chunk in stream(kept.url, body, api_key):
        usage = chunk.get("usage") or usage
        for choice in chunk.get("choices") or []:
            reason = choice.get("finish_reason") or reason
            said = (choice.get("delta") or {}).get("content") or ""
            answer.append(said)
            if not as_json:
                sys.stdout.write(said)
                sys.stdout.flush()
    if as_json:
        json_data({"model": kept.model, "content": "".join(answer), "finish_reason": reason, "usage": usage})
    else:
        sys.stdout.write("\n")


def stream(url: str, body: dict[str, Any], api_key: str | None) -> Iterator[dict[str, Any]]:
    """The chunks of a streamed answer. Raises PeerLost, or RequestError with what the server said."""
    headers = {"content-type": "application/json"}
    if api_key:
        headers["authorization"] = f"Bearer {api_key}"
    connection = open_frontend(url, _ANSWER_S)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body).encode(), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise RequestError(error_message(answer.read(), answer.status), where=url)
        yield from chunks(answer, url)
    except (OSError, http.client.HTTPException) as error:
        raise PeerLost(f"the frontend cannot be reached: {error}", where=url, hint="dynctl status") from error
    finally:
        connection.close()


def chunks(answer: Iterator[bytes], url: str) -> Iterator[dict[str, Any]]:
    """The objects of a server-sent event stream, to its [DONE]. Raises EngineFailed when it breaks off."""
    for raw in answer:
        payload = event_data(raw)
        if not payload:
            continue
        if payload == DONE:
            return
        found = json.loads(payload)
        if "error" in found:
            raise EngineFailed(error_message(payload, 200), where=url)
        yield found
    raise EngineFailed("the answer broke off", where=url)


def error_message(body: bytes, status: int) -> str:
    """What an OpenAI error body says."""
    try:
        said = json.loads(body)["error"]
        return str(said["message"] if isinstance(said, dict) else said)
    except (ValueError, KeyError, TypeError):
        return f"status {status}: {body[:200].decode(errors='replace')}"
