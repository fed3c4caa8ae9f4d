"""Profilings to report of: chosen by the real chooser on an invented law, with measurements made from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import msgspec

from dynctl.perfmodel.choice import Choice, Demand, Refused, Sla
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.offers import Ask
from dynctl.perfmodel.profile import DEFAULT, DecodeGrid, Limits, PrefillCurve, Profile, Subject
from dynctl.perfmodel.split import choose
from dynctl.profiler.outcome import Confirmed, DecodePoint, LayoutRun, Measurement, PrefillPoint, Refusal
from dynctl.profiler.report.told import Told

TIGHT = Sla(ttft_s=0.4, itl_s=0.012)
LOOSE = Sla(ttft_s=0.6, itl_s=0.03)
NEXT = "dynctl up profile-chat/recipe.yaml"


def law(tensor: int, *, slower: float = 1.0) -> Profile:
    """An 8B model or so on `tensor` GPUs, which halve the time less than twice."""
    gain = tensor**-0.8 * slower
    grid = tuple(tuple(x * gain for x in row) for row in DEFAULT.decode.seconds)
    return msgspec.structs.replace(
        DEFAULT,
        name=f"TP{tensor}",
        prefill=PrefillCurve(
            tokens=DEFAULT.prefill.tokens, seconds=tuple(x * gain for x in DEFAULT.prefill.seconds)
        ),
        decode=DecodeGrid(batch=DEFAULT.decode.batch, context=DEFAULT.decode.context, seconds=grid),
        limits=Limits(kv_tokens=200_000 * tensor, sequences=256, batched_tokens=8192),
        subject=Subject(
            model="acme/chat-8b",
            backend="mocker",
            backend_version="1.0",
            hardware="H200",
            precision="bf16",
            layout=Layout(tensor=tensor),
        ),
        source="estimate",
    )


def profiles(*tensors: int, slower: float = 1.0) -> dict[Layout, Profile]:
    return {Layout(tensor=size): law(size, slower=slower) for size in tensors}


@cache
def chosen(sla: Sla, tensors: tuple[int, ...], *, rate: float, gpus: int) -> Choice:
    """What the chooser says of 3000 and 300 tokens."""
    known = profiles(*tensors)
    refused = (Refused(layout=Layout(tensor=16), reason="16 GPUs, the nodes have 8", role="decode"),)
    return choose(
        Ask(
            sla=sla,
            demand=Demand(rate=rate, lengths=((3000, 300),)),
            profiles={"aggregated": known, "prefill": known, "decode": known},
            gpus=gpus,
            refused=refused,
        )
    )


def estimated(sla: Sla = TIGHT, *tensors: int, name: str = "chat", rate: float = 8.0) -> Told:
    """Chosen without a measurement."""
    tensors = tensors or (1, 2, 4, 8)
    return Told(
        name=name,
        recipe=f"{name}.yaml",
        choice=chosen(sla, tensors, rate=rate, gpus=16),
        profiles=profiles(*tensors),
        gpus=16,
        next_command=NEXT,
    )


def infeasible() -> Told:
    """No layout says its first token in time."""
    return replace(estimated(Sla(ttft_s=0.01, itl_s=0.02)), next_command="")


def alone() -> Told:
    """One layout and no other."""
    return estimated(LOOSE, 1, rate=0.5)


def none_at_all() -> Told:
    """Each layout is refused."""
    refused = tuple(Refused(layout=Layout(tensor=n), reason=f"does not fit on {n} GPUs") for n in (1, 2, 4))
    choice = Choice(
        sla=LOOSE,
        demand=Demand(rate=1.0, lengths=((3000, 300),)),
        chosen=None,
        refused=refused,
        why="no layout can be: each is refused with its reason",
    )
    return Told(name="chat", recipe="chat.yaml", choice=choice, gpus=4)


def measured(told: Told | None = None) -> Told:
    """The same after a measurement that came out 6 % slower, with a layout that died and a probe refused."""
    told = told or estimated()
    best = told.choice.chosen
    assert best is not None
    true = profiles(1, 2, 4, 8, slower=1.06)
    runs = [
        run_of(law(pool.layout.tensor), true[pool.layout])
        for pool in {pool.layout: pool for pool in best.pools}.values()
    ]
    died = LayoutRun(
        layout=Layout(tensor=8),
        estimated=law(8),
        failure="the engine ended with exit code 1 before it was ready",
        lines=(
            "INFO loading weights <1/4>",
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.31 GiB & failed",
        ),
        took_s=31.4,
    )
    round_ = Confirmed(
        option=best,
        rate=told.choice.demand.rate,
        requests=2400,
        ttft_s=best.predicted.ttft_s * 1.04,
        itl_s=best.predicted.itl_s * 0.97,
        attainment=0.968,
        attainment_low=0.960,
        attainment_high=0.975,
        goodput=told.choice.demand.rate * 0.968,
        output_rate=told.choice.demand.rate * 300,
        meets="yes",
        took_s=300.0,
    )
    found = Measurement(
        run_id="chat-7f3a",
        name=told.name,
        model="acme/chat-8b",
        backend="mocker",
        at=1_750_000_000.0,
        took_s=1312.0,
        budget_s=1800.0,
        estimate=told.choice,
        choice=told.choice,
        layouts=(*runs, died),
        rounds=(round_,),
        verdict=f"{best.label} keeps p95 TTFT and ITL at {told.choice.demand.rate:g} requests/s.",
        probes=19,
        reused=4,
        gpu_s=9100.0,
        unmeasured=("TP8 as prefill",),
    )
    return replace(told, measured=found)


def run_of(before: Profile, true: Profile) -> LayoutRun:
    """A candidate measured at three prompts and five batches."""
    assert before.subject is not None
    steps = ((1, 3150), (16, 3150), (64, 3150), (128, 3150), (16, 9000))
    return LayoutRun(
        layout=before.subject.layout,
        estimated=before,
        fitted=msgspec.structs.replace(true, source="measured"),
        prefill=tuple(
            PrefillPoint(
                isl=isl, seconds=at, low_s=at * 0.97, high_s=at * 1.05, requests=8, reused=isl == 1024
            )
            for isl in (1024, 3000, 8192)
            for at in (true.prefill.seconds[0] + true.prefill_s(0, isl),)
        ),
        decode=tuple(
            DecodePoint(
                batch=batch,
                context=context,
                seconds=true.decode_s(batch, context) * (1.03 if batch == 64 else 0.99),
                steps=400,
                cached=0.002,
            )
            for batch, context in steps
        ),
        refused=(Refusal(what="decode 256 x 3150", reason="the client was the bottleneck: 41 ms of lag"),),
        start_s=42.0,
        took_s=388.0,
    )


WHOLE: dict[str, Callable[[], Told]] = {
    "estimated": estimated,
    "measured": measured,
    "infeasible": infeasible,
    "alone": alone,
    "none_at_all": none_at_all,
}
