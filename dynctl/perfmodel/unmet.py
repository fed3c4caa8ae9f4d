"""When nothing keeps the SLA: what is nearest, and what it would take. Pure."""

from __future__ import annotations

from dynctl.perfmodel.choice import Option, Pool, Prediction
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.offers import Offers
from dynctl.perfmodel.pools import Decode, Prefill
from dynctl.perfmodel.profile import Profile


def why_not(offers: Offers, rate_limit: tuple[Option | None, int]) -> str:
    """In words: each axis on which nothing comes near enough, with the nearest, and what would be enough."""
    ask = offers.ask
    if not any(ask.profiles.values()):
        return "no layout can be: each is refused with its reason"
    told = [part for part in (_first_token(offers), _gap(offers)) if part]
    if told:
        return "; ".join(told)
    most, needed = rate_limit
    if most is None:
        return (
            "each of TTFT and ITL can be kept, but not both within the GPUs there are: "
            f"{ask.gpus}, where a layout needs {_smallest(offers)}"
        )
    takes = f"; it would take {needed} GPUs" if needed else ""
    return (
        f"{ask.demand.rate:g} requests/s are more than {ask.gpus} GPUs serve within the SLA: "
        f"at most {most.predicted.capacity:.3g}, with {most.label}{takes}"
    )


def _smallest(offers: Offers) -> int:
    alone = [layout.gpus for layout in offers.both]
    pairs = [first.gpus + second.gpus for first in offers.readers for second in offers.writers]
    return min([*alone, *pairs], default=0)


def _first_token(offers: Offers) -> str:
    """Why no first token comes in time even at an idle worker; "" when one does."""
    wanted, fastest = offers.ask.sla.ttft_s, _fastest(offers)
    if wanted is None or fastest is None or offers.readers or offers.both:
        return ""
    layout, seconds = fastest
    isl = offers.ask.demand.isl
    return (
        f"a TTFT of {_ms(wanted)} cannot be kept: {layout.label} is the fastest, and reads prompts of "
        f"{isl:.0f} tokens in {_ms(seconds)} with nobody before them; it would take a TTFT above that, "
        "shorter prompts, a higher hit rate or faster GPUs"
    )


def _gap(offers: Offers) -> str:
    """Why no token comes in time even in a batch of one; "" when one does."""
    wanted, quickest = offers.ask.sla.itl_s, _quickest(offers)
    if wanted is None or quickest is None or offers.writers or offers.both:
        return ""
    layout, seconds = quickest
    return (
        f"an ITL of {_ms(wanted)} cannot be kept: {layout.label} is the fastest, and takes {_ms(seconds)} a "
        "token for one user alone; it would take an ITL above that, a smaller model or precision, or faster "
        "GPUs"
    )


def nearest(offers: Offers) -> tuple[Option, ...]:
    """One worker of each of the layouts that come nearest on an axis, unloaded, with what it misses."""
    found: dict[Layout, Profile] = {}
    everything = _profiles(offers)
    for one in (_fastest(offers), _quickest(offers)):
        if one is not None:
            found[one[0]] = everything[one[0]]
    return tuple(_alone(offers, layout, profile) for layout, profile in found.items())


def _alone(offers: Offers, layout: Layout, profile: Profile) -> Option:
    sla = offers.ask.sla
    limits = profile.limits
    batched = limits.batched_tokens if limits else 8192
    writer = Decode(profile, offers.mix, None)
    ttft_s, itl_s = _own_s(offers, profile), writer.steps[1]
    misses = [
        f"{name} {_ms(is_s)}, {_ms(wanted)} wanted"
        for name, is_s, wanted in (("TTFT", ttft_s, sla.ttft_s), ("ITL", itl_s, sla.itl_s))
        if wanted is not None and is_s > wanted
    ]
    return Option(
        mode="aggregated",
        pools=(
            Pool(
                role="aggregated",
                layout=layout,
                replicas=1,
                sequences=max(1, writer.seats),
                batched_tokens=batched,
                load=0.0,
            ),
        ),
        predicted=Prediction(
            ttft_s=ttft_s,
            itl_s=itl_s,
            capacity=0.0,
            tokens_per_s_per_gpu=0.0,
            tokens_per_s_per_user=1.0 / itl_s,
        ),
        misses=tuple(misses) or ("not with this rate and these GPUs",),
    )


def _profiles(offers: Offers) -> dict[Layout, Profile]:
    profiles = offers.ask.profiles.values()
    return {layout: profile for by_layout in profiles for layout, profile in by_layout.items()}


def _own_s(offers: Offers, profile: Profile) -> float:
    """TTFT at the percentile with nobody else there."""
    batched = profile.limits.batched_tokens if profile.limits else 8192
    reading = Prefill(profile, offers.mix, batched, "least_work").reading(0.0, 1)
    assert reading is not None
    return reading.ttft_s(offers.ask.sla.percentile) + profile.decode_s(1, offers.mix.context)


def _fastest(offers: Offers) -> tuple[Layout, float] | None:
    times = [(_own_s(offers, profile), layout) for layout, profile in _profiles(offers).items()]
    return (min(times)[1], min(times)[0]) if times else None


def _quickest(offers: Offers) -> tuple[Layout, float] | None:
    context = offers.mix.context
    times = [(profile.decode_s(1, context), layout) for layout, profile in _profiles(offers).items()]
    return (min(times)[1], min(times)[0]) if times else None


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 10 else f"{seconds:.3g} s"
