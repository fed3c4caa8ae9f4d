"""A sidecar becomes that of another seat while its engine runs on: what it is asked, how it is known then."""

from __future__ import annotations

import msgspec

ENV_TOOK = "DYNCTL_TOOK"
"""In the environment of a sidecar that has: "SEAT INCARNATION" as which its engine was started. What has
these in its own environment belongs to the sidecar's seat.
"""


class Become(msgspec.Struct, frozen=True, kw_only=True):
    """Drain, leave the registry, and go on as this incarnation of seat `id`. `spec`: a WorkerSpec as JSON.

    The answer, nothing, comes before that is done. Refused when the engine of `spec` is another than runs.
    """

    id: str
    incarnation: int
    spec: str
