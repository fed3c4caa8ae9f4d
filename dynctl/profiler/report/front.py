"""What layouts give when they are full: tokens a second by GPU over those of one user. Pure.

Nobody waits here and prefill workers may be cut in fractions, so no service goes beyond these lines; a
service at a rate, with waits and headroom, lies below them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.pools import Decode, fresh, ranks_of
from dynctl.perfmodel.profile import Profile
from dynctl.perfmodel.traffic import Traffic

Mode = Literal["aggregated", "disaggregated"]
_GROWTH = 1.3


@dataclass(frozen=True, slots=True)
class Point:
    """`user`: tokens a second of one stream; `gpu`: tokens a second by GPU; `label`: of what, in words."""

    user: float
    gpu: float
    label: str


def front(mode: Mode, profiles: Mapping[Layout, Profile], mix: Traffic, ttft_s: float | None) -> list[Point]:
    """The points that no other one beats on both axes, slowest user first.

    Layouts that take longer than `ttft_s` to read the mean prompt alone do not read. Source: a batch of b
    whose gap is g gives b / g tokens a second; each answer of n tokens costs one prompt's reading time.
    """
    works = {layout: (work_s(one, mix), one.prefill.seconds[0]) for layout, one in profiles.items()}
    readers = {
        layout: work for layout, (work, fixed) in works.items() if ttft_s is None or work + fixed <= ttft_s
    }
    made = _apart(profiles, readers, mix) if mode == "disaggregated" else _together(profiles, readers, mix)
    return best_of(made)


def best_of(points: Iterable[Point]) -> list[Point]:
    """Those that no other one beats on both axes, slowest user first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda one: (-one.user, -one.gpu, one.label)):
        if not kept or point.gpu > kept[-1].gpu:
            kept.append(point)
    return kept[::-1]


def work_s(profile: Profile, mix: Traffic) -> float:
    """Seconds that the mean prompt adds to steps which are made anyway."""
    return sum(
        profile.prefill_s(round(prompt - new), round(new)) * share
        for prompt, share in mix.prompts
        for new in (fresh(prompt, mix.hit_rate),)
    )


def _together(
    profiles: Mapping[Layout, Profile], readers: Mapping[Layout, float], mix: Traffic
) -> Iterator[Point]:
    for layout, work in readers.items():
        writer = Decode(profiles[layout], mix, None, work / ranks_of(profiles[layout]))
        for batch in batches(writer.seats):
            gap = writer.gap_s(batch)
            yield Point(1.0 / gap, batch / gap / layout.gpus, f"{layout.label}, batch {batch}")


def _apart(
    profiles: Mapping[Layout, Profile], readers: Mapping[Layout, float], mix: Traffic
) -> Iterator[Point]:
    """The reader that takes the fewest GPU seconds a prompt serves all writers."""
    if not readers:
        return
    costs = {layout: work * layout.gpus / ranks_of(profiles[layout]) for layout, work in readers.items()}
    first = min(costs, key=lambda layout: (costs[layout], layout))
    for layout, profile in profiles.items():
        writer = Decode(profile, mix, None)
        for batch in batches(writer.seats):
            gap = writer.gap_s(batch)
            rate = batch / gap
            gpus = layout.gpus + rate / mix.answer * costs[first]
            yield Point(1.0 / gap, rate / gpus, f"{first.label} + {layout.label}, batch {batch}")


def batches(most: int) -> list[int]:
    """1 to `most`, about a third larger each; empty when `most` is 0."""
    found: list[int] = []
    size = 1.0
    while round(size) < most:
        if not found or round(size) > found[-1]:
            found.append(round(size))
        size *= _GROWTH
    return [*found, most] if most > 0 else []
