"""API keys: known by digest, each with a name and a limit of its own."""

from __future__ import annotations

import hashlib

import pytest

from dynctl.errors import Overloaded, Unauthorized
from dynctl.frontend.keys import ApiKeys
from dynctl.observability.metrics import Metrics
from dynctl.protocol.specs import ApiKeySpec


def spec(key: bytes, name: str, max_concurrent: int = 0) -> ApiKeySpec:
    digest = hashlib.sha256(key).hexdigest().upper()
    return ApiKeySpec(name=name, sha256=digest, max_concurrent=max_concurrent)


def test_without_keys_everybody_may() -> None:
    keys = ApiKeys([], Metrics())
    assert not keys.asked_for
    assert keys.check(None) is None


def test_keys_are_checked_by_their_digest_and_known_by_name() -> None:
    keys = ApiKeys([spec(b"one", "a"), spec(b"two", "b")], Metrics())
    assert keys.asked_for
    found = [keys.check(header) for header in (b"Bearer two", b"bearer  one ")]
    assert [key.name for key in found if key is not None] == ["b", "a"]
    for wrong in (None, b"", b"Bearer", b"Bearer ", b"Bearer three", b"Basic one", b"one"):
        with pytest.raises(Unauthorized):
            keys.check(wrong)


def test_a_key_has_as_many_requests_at_once_as_it_may_and_others_are_not_its_concern() -> None:
    metrics = Metrics()
    keys = ApiKeys([spec(b"one", "a", max_concurrent=2), spec(b"two", "b")], metrics)
    one, two = keys.check(b"Bearer one"), keys.check(b"Bearer two")
    assert one is not None
    assert two is not None
    one.enter()
    one.enter()
    with pytest.raises(Overloaded, match="2 requests under way"):
        one.enter()
    two.enter()
    one.leave()
    one.enter()
    text = metrics.render().decode()
    assert 'api_key_requests_total{key="a"} 3.0' in text
    assert 'api_key_rejections_total{key="a"} 1.0' in text
