"""The API keys clients come with: which there are, by digest alone, how much each may ask for, and who may
change how the deployment works.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable

from dynctl.errors import Forbidden, Overloaded, Unauthorized
from dynctl.http.server import Request
from dynctl.observability.metrics import Metrics
from dynctl.protocol.specs import ApiKeySpec

RETRY_AFTER_S = 1.0
_FORWARDED = (b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via")
_OF_A_PAGE = (b"origin", b"sec-fetch-site")


class ApiKey:
    """One key, and its requests under way: `enter` and `leave` around each. `max_concurrent` 0 = no limit."""

    __slots__ = ("_inflight", "_refused", "_requests", "admin", "max_concurrent", "name")

    def __init__(self, spec: ApiKeySpec, metrics: Metrics) -> None:
        self.name = spec.name
        self.admin = spec.admin
        self.max_concurrent = spec.max_concurrent
        self._inflight = metrics.gauge("api_key_inflight_requests", key=spec.name)
        self._requests = metrics.counter("api_key_requests_total", key=spec.name)
        self._refused = metrics.counter("api_key_rejections_total", key=spec.name)

    def enter(self) -> None:
        """A request begins. Raises Overloaded when the key has as many as it may."""
        if 0 < self.max_concurrent <= self._inflight.value:
            self._refused.inc()
            raise Overloaded(
                f"this API key has {self.max_concurrent} requests under way, as many as it may",
                retry_after_s=RETRY_AFTER_S,
                hint="send it again when one has ended",
            )
        self._requests.inc()
        self._inflight.inc()

    def leave(self) -> None:
        """A request has ended."""
        self._inflight.dec()


class ApiKeys:
    """The keys that open `/v1`; none = everybody may.

    They are looked up by digest: how long that takes tells nothing of a key.
    """

    def __init__(self, specs: Iterable[ApiKeySpec], metrics: Metrics) -> None:
        self._keys = {bytes.fromhex(spec.sha256): ApiKey(spec, metrics) for spec in specs}

    @property
    def asked_for(self) -> bool:
        """Whether a key is needed at all."""
        return bool(self._keys)

    def check(self, authorization: bytes | None) -> ApiKey | None:
        """Whose request it is; None when everybody may. Raises Unauthorized without one of the keys."""
        if not self._keys:
            return None
        scheme, _, text = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer" or not text.strip():
            raise Unauthorized("an API key is needed", hint="send `Authorization: Bearer <key>`")
        key = self._keys.get(hashlib.sha256(text.strip()).digest())
        if key is None:
            raise Unauthorized("the API key is not valid here")
        return key


def check_may_change(key: ApiKey | None, request: Request) -> None:
    """Raises Forbidden unless whoever asks may change how the deployment works.

    Where API keys are asked for: with one that is marked so. Else: from this very machine, and not through a
    proxy on it, whose clients may be anywhere; nor by a page in a browser on it, which may be anybody's.
    """
    if key is not None:
        if not key.admin:
            raise Forbidden(
                "this API key may not change settings", hint="one with `admin: true` in the recipe may"
            )
        return
    forwarded = any(request.header(name) is not None for name in (*_FORWARDED, *_OF_A_PAGE))
    if forwarded or not is_loopback(request.peer):
        raise Forbidden(
            "settings may be changed from this machine only",
            hint="or from elsewhere with a key: frontend.api_key with `admin: true`",
        )


def is_loopback(peer: str) -> bool:
    """Whether "address:port" is of this machine."""
    try:
        address = ipaddress.ip_address(peer.rpartition(":")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)
