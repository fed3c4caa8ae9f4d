"""Which probe next: few layouts, few points of each, and no more of a layout that cannot win. Pure.

Layouts are taken up by successive halving: each that the estimate cannot rule out has three prompt lengths
and two batches measured; then only those go on whose optimistic bound beats the best of all measured ones, to
the largest batch within the ITL, by bisection, since a step takes longer the more answers it carries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import msgspec

from dynctl.perfmodel.choice import Demand
from dynctl.perfmodel.fit import Row, decode_row, prefill_row, refitted, scaled
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.offers import Ask
from dynctl.perfmodel.pools import ranks_of
from dynctl.perfmodel.profile import Profile
from dynctl.perfmodel.split import best
from dynctl.perfmodel.traffic import Traffic
from dynctl.profiler.outcome import DecodePoint, PrefillPoint
from dynctl.protocol.instances import Role

HOPE = 1.15
"""By how much a layout may do better than what was measured of it so far."""
MOST_DECODES = 5
_KEPT: Mapping[Role, int] = {"prefill": 2, "decode": 2, "aggregated": 2}
"""So many layouts of each role are looked at."""
_CLOSE = 0.1
_HALFWAY = 0.75
_LEAST_PROMPT = 32
_MOST_BATCH = 512
"""More streams than one client can read in time tell of the client."""


class PrefillProbe(msgspec.Struct, frozen=True, kw_only=True, tag="prefill"):
    """Prompts of so many tokens, one at a time."""

    isl: int

    @property
    def label(self) -> str:
        """For people."""
        return f"prefill {self.isl}"


class DecodeProbe(msgspec.Struct, frozen=True, kw_only=True, tag="decode"):
    """So many answers at once, with so many tokens before them each."""

    batch: int
    context: int

    @property
    def label(self) -> str:
        """For people."""
        return f"decode {self.batch} x {self.context}"


Probe = PrefillProbe | DecodeProbe


def shortlist(ask: Ask) -> tuple[Layout, ...]:
    """The layouts to be measured: of each role those of the best option, then those of the best one without
    them. None when nothing of the estimate keeps the SLA: then the fastest reader and the fastest writer.
    """
    found: dict[Layout, None] = {}
    for roles in (("prefill", "decode"), ("aggregated",)):
        if all(role in ask.profiles for role in roles):
            for role in roles:
                found.update(dict.fromkeys(_best_of(ask, role, roles)))
    return tuple(found) or _fastest(ask)


def _best_of(ask: Ask, role: Role, roles: Sequence[Role]) -> list[Layout]:
    found: list[Layout] = []
    for _ in range(_KEPT[role]):
        profiles = {one: ask.profiles[one] for one in roles}
        profiles[role] = {k: v for k, v in profiles[role].items() if k not in found}
        option = best(replace(ask, profiles=profiles))
        pool = option.pool(role) if option else None
        if pool is None:
            break
        found.append(pool.layout)
    return found


def _fastest(ask: Ask) -> tuple[Layout, ...]:
    profiles = {k: v for one in ask.profiles.values() for k, v in one.items()}
    if not profiles:
        return ()
    reader = min(profiles, key=lambda k: (profiles[k].prefill_s(0, round(ask.demand.isl)), k))
    writer = min(profiles, key=lambda k: (profiles[k].decode_s(1, ask.demand.isl), k))
    return tuple(dict.fromkeys((reader, writer)))


def prefill_probes(demand: Demand, longest: int) -> tuple[PrefillProbe, ...]:
    """Three prompt lengths: short, usual, and the longest or a quarter more than usual. `longest`: tokens
    that the model takes in one request, 0 = not known.
    """
    sizes = sorted(prompt for prompt, _ in demand.lengths)
    usual, most = sizes[len(sizes) // 2], sizes[-1]
    top = max(most, round(usual * 1.25))
    if longest:
        top = max(1, min(top, longest - 1))
    lengths = sorted({min(top, max(_LEAST_PROMPT, usual // 4)), min(usual, top), top})
    return tuple(PrefillProbe(isl=one) for one in lengths)


def largest(profile: Profile, context: float) -> int:
    """Answers at most that an engine writes at once and whose KV it holds."""
    if profile.limits is None:
        return _MOST_BATCH
    room = int(profile.limits.kv_tokens // max(1.0, context))
    return max(1, min(room, profile.limits.sequences, _MOST_BATCH))


def decode_probes(profile: Profile, mix: Traffic, itl_s: float | None) -> tuple[DecodeProbe, ...]:
    """The first two batches: one answer alone, and as many as should keep within the ITL."""
    context = max(_LEAST_PROMPT, round(mix.context))
    most = largest(profile, context)
    guess = _within(profile, context, itl_s, most) if itl_s else most
    batches = sorted({1, max(2, guess) if most > 1 else 1})
    return tuple(DecodeProbe(batch=one, context=context) for one in batches)


def next_decode(
    profile: Profile, seen: Sequence[DecodePoint], mix: Traffic, itl_s: float | None
) -> DecodeProbe | None:
    """The next batch to try of a layout, whose `profile` has been fitted to what was `seen`; None = enough.

    Between the largest batch within the ITL and the smallest beyond it; last half the context, which tells
    tokens of KV from answers.
    """
    context = max(_LEAST_PROMPT, round(mix.context))
    if len(seen) >= MOST_DECODES or not seen:
        return None
    most = largest(profile, context)
    usual = [point for point in seen if point.context > context * _HALFWAY]
    inside = max((p.batch for p in usual if itl_s is None or p.seconds <= itl_s), default=0)
    beyond = min((p.batch for p in usual if itl_s is not None and p.seconds > itl_s), default=most + 1)
    if not inside:
        return None  # not even one answer alone
    found = beyond - inside <= max(1, round(_CLOSE * inside))
    if found or len(usual) >= MOST_DECODES - 1:
        short = max(_LEAST_PROMPT, context // 2)
        done = len(usual) < len(seen) or short > context * _HALFWAY
        return None if done else DecodeProbe(batch=inside, context=short)
    guess = _within(profile, context, itl_s, most) if itl_s else most
    if not inside < guess < beyond:
        guess = (inside + beyond) // 2
    return DecodeProbe(batch=guess, context=context)


def _within(profile: Profile, context: float, itl_s: float | None, most: int) -> int:
    """The largest batch whose step is within the ITL, by the profile; at least 1."""
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        fine = itl_s is None or profile.decode_s(middle, context) <= itl_s
        low, high = (middle, high) if fine else (low, middle - 1)
    return low


def fitted(
    estimate: Profile, prefill: Sequence[PrefillPoint], decode: Sequence[DecodePoint], spread: float
) -> Profile:
    """The estimate of a layout brought to what was measured of it. `spread`: how far it may be off."""
    budget = estimate.limits.batched_tokens // ranks_of(estimate) if estimate.limits else 0
    reading: list[Row] = [
        prefill_row(p.isl, p.seconds, -(-round(p.isl) // budget) if budget else 1) for p in prefill
    ]
    steps: list[Row] = [decode_row(p.batch, p.context, p.seconds) for p in decode]
    return refitted(estimate, reading, steps, spread)


def worth(ask: Ask, measured: Mapping[Layout, Profile], layout: Layout) -> bool:
    """Whether more of a layout may change the choice: with all its times shorter by `HOPE` it would be in
    the best option of all that were measured, or nothing would.
    """
    profiles = dict(measured)
    profiles[layout] = scaled(profiles[layout], prefill=1 / HOPE, decode=1 / HOPE)
    option = best(replace(ask, profiles=dict.fromkeys(ask.profiles, profiles)))
    return option is None or any(pool.layout == layout for pool in option.pools)
