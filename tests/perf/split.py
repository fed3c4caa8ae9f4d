"""How right the predictions of a split are: TTFT beside a simulation, the chosen split beside brute force.

python -m tests.perf.split [waits|service|choice|seats]
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from statistics import NormalDist, fmean

import msgspec

from dynctl.perfmodel.choice import Demand, Option, Pool, Prediction, Sla
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.offers import Ask, Offers
from dynctl.perfmodel.pools import Disaggregated
from dynctl.perfmodel.profile import (
    DEFAULT,
    DecodeGrid,
    Limits,
    PrefillCurve,
    Profile,
    Subject,
    Transfer,
)
from dynctl.perfmodel.queueing import Routing, crossing, service, waits
from dynctl.perfmodel.split import choose
from dynctl.perfmodel.traffic import traffic
from dynctl.protocol.instances import Role
from tests.perf.split_engine import at_share, simulate

WORKERS = (1, 2, 4, 8)
LOADS = (0.5, 0.6, 0.7, 0.8, 0.9)
NOTHING = Prediction(ttft_s=0, itl_s=0, capacity=0, tokens_per_s_per_gpu=0, tokens_per_s_per_user=0)


def machine(tensor: int, scale: float = 1.0) -> Profile:
    """About a model of 70 billion parameters in 16 bit on GPUs of 4.8 TB/s, `scale` times as large."""
    base = 0.004 + 0.036 * scale / tensor
    tokens = (0.0, 512.0, 2048.0, 8192.0, 32768.0)
    batches, contexts = (1.0, 64.0, 512.0), (0.0, 65536.0)
    kv_bytes = 327680 * scale
    return Profile(
        version=1,
        name=f"TP{tensor}",
        prefill=PrefillCurve(
            tokens=tokens,
            seconds=tuple(base + scale * (2.3e-4 * n + 2.6e-9 * n * n) / tensor for n in tokens),
        ),
        decode=DecodeGrid(
            batch=batches,
            context=contexts,
            seconds=tuple(
                tuple(base + 2e-5 * b + b * c * kv_bytes / (tensor * 3.8e12) for c in contexts)
                for b in batches
            ),
        ),
        transfer=Transfer(bytes_per_token=kv_bytes, bytes_per_s=tensor * 40e9, latency_s=0.002),
        limits=Limits(
            kv_tokens=max(1, round((tensor * 122e9 - scale * 140e9) / kv_bytes)),
            sequences=256,
            batched_tokens=16384,
        ),
        subject=Subject(model="law", backend="law", layout=Layout(tensor=tensor)),
    )


def lognormal(k2: float, count: int = 2000) -> list[float]:
    """Times of mean 1 and this squared coefficient of variation, equally likely."""
    width = math.sqrt(math.log(1.0 + k2))
    values = [math.exp(width * NormalDist().inv_cdf((i + 0.5) / count)) for i in range(count)]
    mean = fmean(values)
    return [value / mean for value in values]


def queue(times: Sequence[float], case: tuple[int, float, Routing], arrivals: int, seed: int) -> list[float]:
    """Times from arrival to the end of service, by simulation."""
    workers, load, routing = case
    rng = random.Random(seed)
    rate = load * workers / fmean(times)
    free = [0.0] * workers
    at, out = 0.0, []
    for number in range(arrivals):
        at += rng.expovariate(rate)
        if routing == "least_work":
            to = min(range(workers), key=free.__getitem__)
        else:
            to = number % workers if routing == "round_robin" else rng.randrange(workers)
        free[to] = max(at, free[to]) + rng.choice(times)
        out.append(free[to] - at)
    return out[arrivals // 10 :]


def wait_table() -> Iterator[str]:
    """p99 of wait and service together, in units of the mean service, against simulations of a queue."""
    yield "| times | workers | " + " | ".join(f"{load:.0%}" for load in LOADS) + " |"
    yield "|---|---|" + "---|" * len(LOADS)
    errors: list[float] = []
    kinds = (("equal", [1.0]), ("k2 = 1", lognormal(1.0)), ("k2 = 4", lognormal(4.0)))
    for (name, times), workers in product(kinds, WORKERS):
        cells = []
        for load in LOADS:
            arrivals = round(20_000 / (1.0 - load) ** 2)
            found = waits(service(times), workers, load * workers)
            assert found is not None
            few = times if len(times) == 1 else times[2::5]
            guess = crossing(
                lambda t, found=found, few=few: sum(found.tail(t - s) for s in few) / len(few),  # type: ignore[misc]
                0.01,
                1.0,
            )
            seen = fmean(
                at_share(queue(times, (workers, load, "least_work"), arrivals, seed), 0.99)
                for seed in range(2)
            )
            errors.append(guess / seen - 1.0)
            cells.append(f"{seen:.2f} {errors[-1]:+.0%}")
        yield f"| {name} | {workers} | " + " | ".join(cells) + " |"
    yield ""
    yield summary(errors)


def summary(errors: Sequence[float]) -> str:
    """How far off they are."""
    over = sum(abs(error) > 0.15 for error in errors)
    return f"Largest error {max(map(abs, errors)):.0%}, {over} of {len(errors)} over 15 %."


def mixed(count: int, prompt: float, answer: float) -> tuple[tuple[int, int], ...]:
    """Lengths of prompts and answers, lognormal, independent; prompts with a k2 of 0.6."""
    rng = random.Random(3)
    return tuple(
        (
            max(16, int(rng.lognormvariate(math.log(prompt), 0.7))),
            max(8, int(rng.lognormvariate(math.log(answer), 0.6))),
        )
        for _ in range(count)
    )


MIXES = (("4000 / 300", ((4000, 300),)), ("mixed 2000 / 150", mixed(500, 2000, 150)))


def service_table() -> Iterator[str]:
    """TTFT at p99 of whole services, prefill apart, against simulations of their steps."""
    yield "| prompts / answers | prefill workers | " + " | ".join(f"{load:.0%}" for load in LOADS) + " |"
    yield "|---|---|" + "---|" * len(LOADS)
    errors: list[float] = []
    small, large = machine(4), machine(8)
    for (name, lengths), workers in product(MIXES, WORKERS):
        cells = []
        for load in LOADS:
            mix = traffic(Demand(rate=1.0, lengths=lengths))
            reader = Disaggregated(small, mix, 4096, "least_work")
            demand = Demand(rate=load / reader.load(1.0, workers), lengths=lengths)
            decode = 1 + workers
            ask = Ask(
                sla=Sla(percentile=0.99),
                demand=demand,
                profiles={"decode": {Layout(tensor=8): large}},
                gpus=0,
            )
            talking = Offers(ask).writers[Layout(tensor=8)].talking(demand.rate, decode, 0.99)
            assert talking is not None
            reading = reader.reading(demand.rate, workers, 1.5 * talking.step_s)
            assert reading is not None
            option = Option(
                mode="disaggregated",
                pools=(pool("prefill", 4, workers, 4096), pool("decode", 8, decode, 8192)),
                predicted=NOTHING,
            )
            seen = fmean(
                at_share(
                    [
                        one.ttft_s
                        for one in simulate(option, {"prefill": small, "decode": large}, demand, 12_000, seed)
                    ],
                    0.99,
                )
                for seed in range(3)
            )
            errors.append(reading.ttft_s(0.99) / seen - 1.0)
            cells.append(f"{seen:.2f} s {errors[-1]:+.0%}")
        yield f"| {name} | {workers} | " + " | ".join(cells) + " |"
    yield ""
    yield summary(errors)


def pool(role: Role, tensor: int, replicas: int, batched: int, sequences: int = 256) -> Pool:
    """A pool of the machines above."""
    return Pool(
        role=role,
        layout=Layout(tensor=tensor),
        replicas=replicas,
        sequences=sequences,
        batched_tokens=batched,
        load=0.0,
    )


CASES = (
    ("8B, 4000/300, 1 s / 30 ms", 1, 0.12, ((4000, 300),), Sla(ttft_s=1.0, itl_s=0.03), 12.0),
    ("8B, 4000/300, 0.3 s / 12 ms", 1, 0.12, ((4000, 300),), Sla(ttft_s=0.3, itl_s=0.012), 8.0),
    ("8B, mixed 2000/150, 0.5 s / 15 ms", 1, 0.12, mixed(500, 2000, 150), Sla(ttft_s=0.5, itl_s=0.015), 20.0),
    ("8B, 500/500, 0.2 s / 20 ms", 1, 0.12, ((500, 500),), Sla(ttft_s=0.2, itl_s=0.02), 40.0),
    ("8B, 8000/100, 2 s / 15 ms", 1, 0.12, ((8000, 100),), Sla(ttft_s=2.0, itl_s=0.015), 6.0),
)


def choice_table() -> Iterator[str]:
    """The split that is chosen beside the smallest that keeps the SLA when it is simulated."""
    yield "| model, ISL/OSL, SLA (p95) | chosen | brute force | difference, GPUs |"
    yield "|---|---|---|---|"
    worst = 0
    for name, tensor, scale, lengths, sla, rate in CASES:
        layout, profile = Layout(tensor=tensor), machine(tensor, scale)
        demand = Demand(rate=rate, lengths=lengths)
        roles: tuple[Role, ...] = ("prefill", "decode", "aggregated")
        ask = Ask(sla=sla, demand=demand, profiles={role: {layout: profile} for role in roles}, gpus=16)
        chosen = choose(ask).chosen
        assert chosen is not None
        smallest = brute_force(ask, chosen, profile)
        worst = max(worst, abs(chosen.gpus - smallest.gpus))
        yield f"| {name} | {chosen.label} | {smallest.label} | {chosen.gpus - smallest.gpus:+d} |"
    yield ""
    yield f"Largest difference: {worst} GPUs."


def brute_force(ask: Ask, chosen: Option, profile: Profile) -> Option:
    """The smallest split, or aggregated workers, that keep the SLA over two seeds; all of one size tried."""
    offers = Offers(ask)
    layout = next(iter(offers.writers))
    seats, batched = offers.writers[layout].seats, offers.readers[layout].batched
    both = offers.both.get(layout)
    for total in range(1, 17):
        tried = [
            Option(
                mode="disaggregated",
                pools=(pool("prefill", 1, read, batched), pool("decode", 1, total - read, 8192, seats)),
                predicted=NOTHING,
            )
            for read in range(1, total)
        ]
        for size in (both.batched, 2048) if both else (2048,):
            one = pool("aggregated", 1, total, size)
            tried.append(Option(mode="aggregated", pools=(one,), predicted=NOTHING))
        for option in tried:
            if all(kept(option, profile, ask, seed) for seed in range(2)):
                return option
    raise AssertionError("nothing keeps it")


def kept(option: Option, profile: Profile, ask: Ask, seed: int) -> bool:
    """Whether a simulation of it keeps the SLA."""
    sla = ask.sla
    assert sla.ttft_s is not None
    assert sla.itl_s is not None
    out = simulate(option, {p.role: profile for p in option.pools}, ask.demand, 4000, seed)
    return (
        at_share([one.ttft_s for one in out], sla.percentile) <= sla.ttft_s
        and at_share([one.itl_s for one in out], sla.percentile) <= sla.itl_s
    )


SMALL = msgspec.structs.replace(DEFAULT, limits=Limits(kv_tokens=600_000, sequences=256, batched_tokens=8192))
"""Steps of about 6 ms, 8 % longer with each 16 more in the batch: an ITL leaves few seats."""
EVEN, UNEVEN = ((1000, 200),), mixed(500, 2000, 150)
SEATS = (
    ("1000/200, 0.3 s / 6.4 ms, 3 workers", EVEN, Sla(ttft_s=0.3, itl_s=0.0064), 3, 600_000),
    ("1000/200, 0.3 s / 7 ms, 2 workers", EVEN, Sla(ttft_s=0.3, itl_s=0.007), 2, 600_000),
    ("mixed 2000/150, 0.5 s / 8 ms, 3 workers", UNEVEN, Sla(ttft_s=0.5, itl_s=0.008), 3, 600_000),
    ("1000/200, 0.3 s / 9 ms, 3 workers, KV for 10", EVEN, Sla(ttft_s=0.3, itl_s=0.009), 3, 12_000),
    ("mixed 2000/150, 1 s / 12 ms, 2 workers, little KV", UNEVEN, Sla(ttft_s=1.0, itl_s=0.012), 2, 40_000),
)
Seated = tuple[str, tuple[tuple[int, int], ...], Sla, int, int]


def seats_table() -> Iterator[str]:
    """TTFT and ITL at p95 near the highest rate within the SLA, when as many may be in a batch as the ITL
    allows and as many as are written.
    """
    heads = "prompts / answers, SLA (p95)", "split", "seats", "TTFT, predicted", "simulated"
    yield f"| {' | '.join(heads)} | ITL, predicted | simulated |"
    yield "|---|---|---|---|---|---|---|"
    for case in SEATS:
        for option, ask, within in seated(case):
            for seats in (within, option.pools[-1].sequences):
                ttft_s, itl_s = times_of(limited(option, seats), ask)
                predicted = option.predicted
                yield (
                    f"| {case[0]} | {option.label} | {seats} | {predicted.ttft_s * 1e3:.0f} ms | "
                    f"{ttft_s * 1e3:.0f} ms | {predicted.itl_s * 1e3:.2f} ms | {itl_s * 1e3:.2f} ms |"
                )


def seated(case: Seated) -> Iterator[tuple[Option, Ask, int]]:
    """A case with one role and with two, at 97 % of the highest rate; and the seats within the ITL."""
    _, lengths, sla, workers, kv_tokens = case
    assert SMALL.limits is not None
    limits = msgspec.structs.replace(SMALL.limits, kv_tokens=kv_tokens)
    profile = msgspec.structs.replace(SMALL, limits=limits)
    costs = {Layout(): profile}
    both: tuple[tuple[Role, ...], ...] = (("aggregated",), ("prefill", "decode"))
    for roles in both:
        ask = Ask(
            sla=sla,
            demand=Demand(rate=1.0, lengths=lengths),
            profiles=dict.fromkeys(roles, costs),
            gpus=workers,
            most=True,
        )
        found = choose(ask).chosen
        assert found is not None
        rate = 0.97 * found.predicted.capacity
        ask = replace(ask, most=False, demand=Demand(rate=rate, lengths=lengths))
        offers = Offers(ask)
        writer = offers.writers[Layout()] if len(roles) == 2 else offers.both[Layout()].decode
        pools = [(one.layout, one.replicas) for one in found.pools]
        option = (
            offers.split(pools[0], pools[1], rate) if len(pools) == 2 else offers.together(pools[0], rate)
        )
        yield option, ask, writer.seats


def limited(option: Option, seats: int) -> Option:
    """The option with so many seats in each worker that writes."""
    last = msgspec.structs.replace(option.pools[-1], sequences=seats)
    return msgspec.structs.replace(option, pools=(*option.pools[:-1], last))


def times_of(option: Option, ask: Ask, requests: int = 12_000) -> tuple[float, float]:
    """(TTFT, ITL) at the percentile of a simulation."""
    layout = option.pools[0].layout
    profiles: dict[str, Profile] = {one.role: ask.profiles[one.role][layout] for one in option.pools}
    out = simulate(option, profiles, ask.demand, requests, seed=1)
    share = ask.sla.percentile
    return at_share([one.ttft_s for one in out], share), at_share([one.itl_s for one in out], share)


TABLES = {"waits": wait_table, "service": service_table, "choice": choice_table, "seats": seats_table}


def main() -> None:
    """Print the tables asked for, all by default."""
    for name in sys.argv[1:] or TABLES:
        start = time.monotonic()
        print(f"\n**{name}**\n")
        for line in TABLES[name]():
            print(line, flush=True)
        print(f"\n({time.monotonic() - start:.0f} s)", file=sys.stderr)


if __name__ == "__main__":
    main()
