"""The error tree: one message each, stable kinds."""

from __future__ import annotations

from dynctl import errors


def tree(cls: type[errors.DynctlError]) -> list[type[errors.DynctlError]]:
    return [cls, *(s for c in cls.__subclasses__() for s in tree(c))]


def test_kinds_are_unique_and_stable() -> None:
    kinds = [c.kind for c in tree(errors.DynctlError) if c.__module__ == errors.__name__]
    assert len(kinds) == len(set(kinds))
    assert {"recipe", "placement", "port_in_use", "peer_lost", "superseded"} <= set(kinds)


def test_message_says_where_what_and_what_would_be_right() -> None:
    error = errors.RecipeError("unknown key 'replica'", where="r.yaml:7", hint="did you mean 'replicas'?")
    assert str(error) == "r.yaml:7: unknown key 'replica' (did you mean 'replicas'?)"
    assert str(errors.UsageError("no")) == "no"
