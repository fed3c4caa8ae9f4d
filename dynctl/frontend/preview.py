"""The answer to a dry run: where a request would go and why. Nothing is counted and no engine is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from dynctl.frontend.prompt.preprocess import PromptFacts
from dynctl.protocol.instances import Role
from dynctl.router.request import Preview, RouteRequest
from dynctl.router.service import Router


def preview(
    router: Router, prompt: PromptFacts, roles: Sequence[Role], request: Callable[[Role], RouteRequest]
) -> bytes:
    """The JSON body. `cost` is in blocks; lower is better. Raises as `Router.choose` does."""
    placed: dict[str, Any] = {}
    for role in roles:
        rows = router.preview(request(role))
        chosen = next(row for row in rows if row.chosen)
        placed[role] = {
            "worker": chosen.worker,
            "rank": chosen.rank,
            "overlap_blocks": chosen.overlap_blocks,
            "candidates": [_row(row) for row in rows],
        }
    last = placed[roles[-1]]
    return msgspec.json.encode(
        {
            "object": "dynctl.route",
            "worker": last["worker"],
            "rank": last["rank"],
            "overlap_blocks": last["overlap_blocks"],
            "prompt_tokens": prompt.tokens,
            "prompt_blocks": len(prompt.hashes or ()),
            "block_size": router.block_size,
            "tokenised": prompt.hashes is not None,
            "roles": placed,
        }
    )


def _row(row: Preview) -> dict[str, Any]:
    return {
        "worker": row.worker,
        "rank": row.rank,
        "cost": row.cost,
        "overlap_blocks": row.overlap_blocks,
        "requests": row.requests,
        "prefill_tokens": row.prefill_tokens,
        "blocks": row.blocks,
        "crowded": row.barred,
    }
