"""What clients in a closed loop see of a deployment: TPOT and TTFT from the passes of its engines. Pure.

A closed loop keeps `concurrency` requests in flight, all sent at once at first. With B of them on a rank, of
which as many run as the KV has room for (R), O answer tokens, and p the time of a prompt in a full step:

    TPOT = decode(R) + interference · (R - 1) · p / O
    TTFT = own · prefill + queue · R · p + (steps + rank_steps, if attention is data-parallel) · decode(R)
           + client_s + overflow · (B - R)/R · O · TPOT

With prefill and decode apart, R and p of the TTFT are those of the prefill ranks and nothing interferes.
"""

from __future__ import annotations

import math

import msgspec

from dynctl.errors import ProfileError
from dynctl.perfmodel.calibration import Calibration, ClosedLoop, EngineConstants, Hardware, pass_s
from dynctl.perfmodel.gpus import Gpu
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.memory import check_divides, kv_room_tokens, weights_bytes
from dynctl.perfmodel.precision import Precision
from dynctl.perfmodel.shapes import ModelShape
from dynctl.perfmodel.work import Machine, Work, decode_pass, prefill_pass, work_of

STEP_TOKENS = 8192
"""Prompt tokens that an engine takes into one step when there are enough."""


LEAST_RUNNING = 8.0
"""Requests for which an engine that was measured at all must have found room."""


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """What was or would be measured. `workers`: of (prefill, decode); aggregated: the one engine is `decode`.

    `guessed`: the layout was not stated in full. `campaign`: engine version and date, "" when unknown.
    """

    shape: ModelShape
    gpu: Gpu
    backend: str
    precision: Precision
    isl: int
    osl: int
    concurrency: float
    decode: Layout
    prefill: Layout | None = None
    workers: tuple[int, int] = (1, 1)
    guessed: bool = False
    campaign: str = ""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """A deployment in numbers: one pass of each kind, and the factors of the formulas above."""

    decode: Work
    prefill: Work
    full_step: Work
    prompts_per_step: float
    running: float
    waiting: float
    queued: float
    others_per_token: float
    parallel_ranks: float
    osl: float


def load_of(what: Deployment) -> Load:
    """Count a deployment's passes. Raises ProfileError with the reason for a layout that cannot be."""
    check_divides(what.shape, what.decode)
    decode = Machine(shape=what.shape, gpu=what.gpu, precision=what.precision, layout=what.decode)
    batch = max(1.0, what.concurrency / (what.workers[1] * what.decode.data))
    weights = weights_bytes(what.shape, what.precision, what.decode)
    if weights > what.gpu.memory_bytes and not what.guessed:
        raise ProfileError(
            f"{what.decode.label}: {weights / 1e9:.0f} GB of weights a GPU do not fit on "
            f"{what.gpu.memory_bytes / 1e9:.0f} GB {what.gpu.name}",
            hint="more GPUs a replica or a smaller precision",
        )
    room = math.inf if what.guessed else kv_room_tokens(what.shape, what.gpu, what.precision, what.decode)
    running = min(batch, max(LEAST_RUNNING, room / (what.isl + what.osl)))
    reading, queued = decode, running
    if what.prefill is not None:
        check_divides(what.shape, what.prefill)
        reading = Machine(shape=what.shape, gpu=what.gpu, precision=what.precision, layout=what.prefill)
        queued = max(1.0, what.concurrency / (what.workers[0] * what.prefill.data))
    prompts = max(1.0, STEP_TOKENS / what.isl)
    return Load(
        decode=work_of(decode, decode_pass(running, what.isl + what.osl / 2)),
        prefill=work_of(reading, prefill_pass(what.isl)),
        full_step=work_of(reading, prefill_pass(what.isl, prompts)),
        prompts_per_step=prompts,
        running=running,
        waiting=batch / running - 1.0,
        queued=queued,
        others_per_token=0.0 if what.prefill else (running - 1.0) / what.osl,
        parallel_ranks=1.0 if reading.layout.data > 1 else 0.0,
        osl=float(what.osl),
    )


def times_s(load: Load, hardware: Hardware, engine: EngineConstants, loop: ClosedLoop) -> tuple[float, float]:
    """(TPOT, TTFT) in seconds by the formulas alone."""
    decode = pass_s(load.decode, hardware, engine.decode)
    prefill = pass_s(load.prefill, hardware, engine.prefill)
    prompt = pass_s(load.full_step, hardware, engine.prefill) / load.prompts_per_step
    tpot = decode + loop.interference * load.others_per_token * prompt
    ttft = (
        loop.own * prefill
        + loop.queue * load.queued * prompt
        + (loop.steps + loop.rank_steps * load.parallel_ranks) * decode
        + loop.client_s
        + loop.overflow * load.waiting * load.osl * tpot
    )
    return tpot, ttft


def effect_terms(what: Deployment) -> dict[str, float]:
    """What a deployment has in common with others that its times may depend on beyond the formulas, and how
    much of it: engine and GPU; with the model and its precision; engine version and date, with ranks in
    parallel or not; with the layout. Where the layout is guessed, also requests a GPU, as the guess misses in
    proportion.
    """
    mode = ("agg" if what.prefill is None else "disagg") + ("?" if what.guessed else "")
    spread = "ranks" if what.decode.data > 1 else ""
    model = f"{what.shape.layers}x{what.shape.hidden}"
    hardware = f"{mode} {what.backend} {what.gpu.name}"
    campaign = f"{mode} {what.backend} {what.campaign} {model} {spread}"
    layout = f"{what.prefill.label} + {what.decode.label}" if what.prefill else what.decode.label
    terms = {
        hardware: 1.0,
        f"{hardware} {model} {what.precision.experts}": 1.0,
        campaign: 1.0,
        f"{campaign} {what.gpu.name} {layout}": 1.0,
    }
    if what.guessed:
        density = math.log2(what.concurrency / what.decode.gpus) / 4
        terms |= {f"{mode} {what.backend} by requests a GPU": density, f"{campaign} by requests": density}
    return terms


def predict_s(what: Deployment, constants: Calibration) -> tuple[float, float]:
    """(TPOT, TTFT) in seconds. Raises ProfileError with the reason for a layout that cannot be."""
    engine = constants.engine(what.backend)
    loop = engine.agg if what.prefill is None else engine.disagg
    tpot, ttft = times_s(load_of(what), constants.hardware, engine, loop)
    for key, much in effect_terms(what).items():
        effect = constants.effects.get(key)
        if effect is not None:
            tpot, ttft = tpot * math.exp(effect.tpot * much), ttft * math.exp(effect.ttft * much)
    return tpot, ttft
