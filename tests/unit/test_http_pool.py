"""The pool of idle connections."""

from __future__ import annotations

from dynctl.http.pool import IdlePool


def pool_with(**since: float) -> IdlePool[str]:
    pool: IdlePool[str] = IdlePool(max_idle=2, idle_expiry_s=4.0)
    for name, at in since.items():
        assert pool.put("o", name, at) is None
    return pool


def test_the_last_used_connection_is_taken_first() -> None:
    pool = pool_with(a=1.0, b=2.0)
    assert [pool.take("o", 3.0), pool.take("o", 3.0), pool.take("o", 3.0)] == ["b", "a", None]
    assert pool.take("other", 3.0) is None


def test_an_expired_connection_is_not_taken_but_given_up() -> None:
    pool = pool_with(a=1.0, b=2.0)
    assert pool.take("o", 6.0) is None
    assert pool.expire(5.5) == ["a"]
    assert len(pool) == 1
    assert pool.expire(9.0) == ["b"]
    assert len(pool) == 0


def test_the_oldest_connection_makes_room() -> None:
    pool = pool_with(a=1.0, b=2.0)
    assert pool.put("o", "c", 3.0) == "a"
    none: IdlePool[str] = IdlePool(max_idle=0, idle_expiry_s=4.0)
    assert none.put("o", "c", 3.0) == "c"


def test_a_closed_connection_is_forgotten() -> None:
    pool = pool_with(a=1.0, b=2.0)
    pool.discard("o", "a")
    pool.discard("o", "never here")
    assert pool.take("o", 2.0) == "b"
    pool.discard("o", "b")
    pool.put("o", "d", 1.0)
    pool.discard("o", "d")
    assert len(pool) == 0


def test_clear_gives_back_all() -> None:
    pool = pool_with(a=1.0, b=2.0)
    assert pool.clear() == ["a", "b"]
    assert len(pool) == 0
