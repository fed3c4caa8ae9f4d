"""One client request as the pipeline sees it: read, checked, stripped of what only dynctl may say."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Literal

import msgspec

from dynctl.errors import RequestError
from dynctl.frontend import body as bodies
from dynctl.frontend.accounts import Account
from dynctl.frontend.admission import Models, asked_tokens, check_context
from dynctl.frontend.body import Body
from dynctl.frontend.hints import NO_HINTS, Hints
from dynctl.frontend.upload import Upload, is_form
from dynctl.http.server import Request
from dynctl.observability.tracing import Trace

Headers = tuple[tuple[bytes, bytes], ...]
Kind = Literal["chat", "completions", "other"]

_REQUEST_ID = re.compile(rb"[!-~]{1,128}")
_PASSED_ON = (b"accept",)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One engine path: the label it has in metrics, and whether it generates from a prompt known here.

    `takes_files`: its body may be a form (multipart/form-data) in place of JSON. `waits`: it is work for the
    workers, so it is held up, or refused, where these are busy.
    """

    path: str
    label: str
    kind: Kind = "other"
    takes_files: bool = False
    waits: bool = True


CHATS = Endpoint("/v1/chat/completions", "chat_completions", "chat")
COMPLETIONS = Endpoint("/v1/completions", "completions", "completions")


@dataclass(frozen=True, slots=True)
class Call:
    """`body` carries no field that only dynctl may set. `headers` go to the engine as they are, and the
    headers of `trace` with them, which differ by leg.
    """

    endpoint: Endpoint
    body: Body
    adapter: str
    stream: bool
    asked: int | None
    request_id: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    account: Account
    trace: Trace
    hints: Hints = NO_HINTS


class Form(msgspec.Struct, frozen=True):
    """The part of a request that is checked before it is counted as one: its body's form, model, options."""

    body: Body
    model: str
    adapter: str
    stream: bool
    asked: int | None


def read_body(endpoint: Endpoint, request: Request) -> Body:
    """A request's body: JSON, or a form with files where the endpoint takes one. Raises RequestError."""
    content_type = request.header(b"content-type") if endpoint.takes_files else None
    if content_type is not None and is_form(content_type):
        return Upload.read(request.body, content_type)
    return Body.parse(request.body)


def read_form(endpoint: Endpoint, given: Body, models: Models, owned_fields: frozenset[str]) -> Form:
    """Check a body. Raises RequestError naming the field at fault, ModelNotFound, ContextTooLong.

    Token ids, and messages, of which there are more than tokens fit are refused before they are decoded:
    megabytes of them take seconds.
    """
    body = given.without(owned_fields)
    model = body.get("model", str)
    if model is None:
        if endpoint.kind != "other":
            raise RequestError(
                "`model` is missing", where="model", hint=f"one of {', '.join(models.names())}"
            )
        model = models.card.name
    adapter = models.adapter(model)
    stream = body.get("stream", bool) is True
    if endpoint.kind == "other":
        return Form(body, model, adapter, stream, None)
    for name, kind in (("n", int), ("stream_options", dict)):
        body.get(name, kind)
    if endpoint.kind == "chat":
        check_context(bodies.messages_at_least(body), None, models.max_model_len, "messages")
        bodies.messages(body)
    asked = asked_tokens(body)
    if endpoint.kind == "completions":
        check_context(bodies.tokens_at_least(body), asked, models.max_model_len, "prompt")
        read = not bodies.large_batch(body)
        if read and bodies.prompt(body) is None and not body.has("prompt_embeds"):
            raise RequestError("`prompt` is missing", where="prompt")
    return Form(body, model, adapter, stream, asked)


def request_id(request: Request) -> bytes:
    """The client's `x-request-id` when it is printable and short, else a new one."""
    given = request.header(b"x-request-id")
    return given if given and _REQUEST_ID.fullmatch(given) else secrets.token_hex(16).encode()


def engine_headers(
    request: Request, id_: bytes, own: Headers, *, pass_key: bool
) -> tuple[tuple[bytes, bytes], ...]:
    """`own`, and what of the client's headers the engine is to see: its key only where nobody here asks for
    one, neither this frontend nor the engine (then `own` holds that). Bodies are JSON unless said otherwise.
    """
    passed = (*_PASSED_ON, b"authorization") if pass_key else _PASSED_ON
    return ((b"x-request-id", id_), *own, *(pair for pair in request.headers if pair[0] in passed))
