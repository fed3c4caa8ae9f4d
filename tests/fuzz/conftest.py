"""How long to look: DYNCTL_FUZZ_EXAMPLES examples for each test; without it few, always the same ones."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

_EXAMPLES = int(os.environ.get("DYNCTL_FUZZ_EXAMPLES", "0"))

settings.register_profile(
    "fuzz",
    max_examples=_EXAMPLES or 150,
    derandomize=not _EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
FUZZ = settings.get_profile("fuzz")
"""Decorates the tests here: the profile is theirs alone."""
