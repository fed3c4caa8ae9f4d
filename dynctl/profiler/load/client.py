"""One request over HTTP: bytes out, bytes in, the clock read at each piece."""

from __future__ import annotations

import asyncio
import ssl
import time
from urllib.parse import urlsplit

import msgspec

from dynctl.errors import (
    DeadlineExceeded,
    DynctlError,
    EngineFailed,
    Forbidden,
    ModelNotFound,
    Overloaded,
    RequestError,
    Unauthorized,
    UsageError,
)
from dynctl.http.client import Client, Origin, Timeouts
from dynctl.profiler.load.spec import Api, Endpoint
from dynctl.profiler.load.wire import Answer, error_text

_CONNECT_S = 10.0
_ERROR_BYTES = 100_000
_IDLE_CONNECTIONS = 8192
_PATHS: dict[Api, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
_REFUSALS: dict[int, type[RequestError]] = {
    401: Unauthorized,
    403: Forbidden,
    404: ModelNotFound,
    429: Overloaded,
    503: Overloaded,
}


def split_url(url: str) -> tuple[Origin, str]:
    """The server, and the path before its /v1. Raises UsageError for what is no http(s) URL."""
    parts = urlsplit(url)
    try:
        origin = Origin.parse(f"{parts.scheme}://{parts.netloc}")
    except DynctlError as error:
        raise UsageError(f"not a URL: {url}", hint="http://host:port") from error
    return origin, parts.path.rstrip("/").removesuffix("/v1")


class Asker:
    """Sends requests to one endpoint; `close` it at the end."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._origin, self._path = split_url(endpoint.url)
        self._client = Client(max_idle=_IDLE_CONNECTIONS, tls=None if endpoint.verify else _trusting())
        self._headers = [(b"content-type", b"application/json"), (b"accept", b"text/event-stream")]
        if endpoint.api_key:
            self._headers.append((b"authorization", f"Bearer {endpoint.api_key}".encode()))

    async def close(self) -> None:
        """Abort what is open."""
        await self._client.close()

    async def models(self, timeout_s: float = _CONNECT_S) -> list[str]:
        """The names that the server serves; [] when it does not tell. Raises RequestError, TransportError."""
        answer = await self._client.request(
            self._origin, "GET", f"{self._path}/v1/models", headers=self._headers, timeout_s=timeout_s
        )
        if answer.status in (401, 403):
            raise _refused(answer.status, answer.body, str(self._origin))
        try:
            listed = msgspec.json.decode(answer.body, type=dict[str, object]).get("data")
        except msgspec.DecodeError:
            return []
        entries = listed if isinstance(listed, list) else []
        return [str(entry["id"]) for entry in entries if isinstance(entry, dict) and "id" in entry]

    async def ask(self, api: Api, body: bytes, *, deadline_s: float, keep: bool = False) -> Answer:
        """The whole answer. Raises RequestError as the server refuses it, EngineFailed when no token or no
        end came, TransportError when it could not be reached or did not end within `deadline_s`.
        """
        timeouts = Timeouts(
            connect_s=min(_CONNECT_S, deadline_s), first_byte_s=deadline_s, stall_s=deadline_s
        )
        where = str(self._origin)
        try:
            async with asyncio.timeout(deadline_s):
                stream = await self._client.open(
                    self._origin,
                    "POST",
                    self._path + _PATHS[api],
                    headers=self._headers,
                    body=body,
                    timeouts=timeouts,
                )
                if stream.status != 200:
                    raise _refused(stream.status, await stream.read(_ERROR_BYTES), where)
                answer = Answer(time.perf_counter, chunked=stream.framing == "chunked", keep=keep)
                await stream.relay(answer)
        except TimeoutError as error:
            raise DeadlineExceeded(f"no whole answer in {deadline_s:g} s", where=where) from error
        if answer.error:
            raise EngineFailed(answer.error, where=where)
        if not answer.times:
            raise EngineFailed("the answer held no token", where=where)
        if not answer.whole and not answer.finish:
            raise EngineFailed("the answer broke off: no finish_reason, no [DONE]", where=where)
        return answer


def _refused(status: int, body: bytes, where: str) -> RequestError:
    try:
        said = error_text(msgspec.json.decode(body, type=dict[str, object]))
    except msgspec.DecodeError:
        said = body[:200].decode(errors="replace")
    kind = _REFUSALS.get(status, RequestError if status < 500 else EngineFailed)
    return kind(f"status {status}: {said}", where=where)


def _trusting() -> ssl.SSLContext:
    """For a certificate that is the user's own."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
