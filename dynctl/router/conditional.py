"""Whether a decode worker reads a prompt itself instead of getting it from a prefill worker. Pure.

A hand-off costs a hop, a queue and the transfer of all blocks. It is not worth that when little of the prompt
is left to compute where it will be decoded, or when all prefill workers have enough to do.
"""

from __future__ import annotations

from dynctl.protocol.specs import ConditionalDisaggSpec


def spills(spec: ConditionalDisaggSpec) -> bool:
    """Whether prompts that find all prefill workers busy go past them."""
    return spec.mode in ("load", "either")


def reads_itself(
    spec: ConditionalDisaggSpec, prompt: int, cached: int, prefill_queue: int, *, full: bool = False
) -> bool:
    """`cached` of the `prompt` tokens are on the decode worker; `prefill_queue` tokens wait on the least busy
    prefill worker, and all of these are `full` where requests would wait for them. A prompt of unknown length
    (0) is handed on.
    """
    left = prompt - cached
    short = prompt > 0 and left < spec.max_tokens and left < spec.max_ratio * prompt
    busy = prompt > 0 and (full or prefill_queue >= spec.prefill_busy_tokens)
    return (short and spec.mode in ("isl", "either")) or (busy and spills(spec))
