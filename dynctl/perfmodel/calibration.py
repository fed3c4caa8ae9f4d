"""Constants between what hardware could do and what engines do, and the time of one pass with them.

They are fitted on measured serving points by `tests/perf/estimator.py`, which writes calibration.json beside
this file. Formula, from the parts of `perfmodel.work` (a roofline with a soft corner, and what no roofline
shows):

    pass = corner(dense_read·a, dense_math·b) + corner(expert_read·c, expert_math·d) + kv·e + attention·f
           + link·g + hops·h + layers·layer_s + moe_layers·moe_layer_s + step_s
    corner(x, y) = (x³ + y³)^⅓
"""

from __future__ import annotations

import functools
from importlib import resources

import msgspec

from dynctl.perfmodel.work import Work


class Hardware(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """By how much each part takes longer than at the hardware's peak, the same for all engines; `hop_s`: one
    collective between two GPUs.
    """

    dense_read: float
    dense_math: float
    expert_read: float
    expert_math: float
    kv: float
    attention: float
    link: float
    hop_s: float


class Overhead(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds an engine adds: to each layer, to each layer with experts, to each pass."""

    layer_s: float
    moe_layer_s: float
    step_s: float


class ClosedLoop(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an engine under a closed loop of clients differs from its passes alone (`perfmodel.serving`).

    `interference`: share of other requests' prompt reading that decoding feels; `own`: of its own prefill and
    `queue`: of all others' of its rank, that a request waits for its first token; `steps`: decode steps it
    waits for, `rank_steps`: more of them when ranks wait for each other; `client_s`: on the way; `overflow`:
    share of a turn that requests wait for which there is no KV room.
    """

    interference: float
    own: float
    queue: float
    steps: float
    rank_steps: float
    client_s: float
    overflow: float


class EngineConstants(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of one engine; `agg` with both roles in one, `disagg` with prefill and decode apart."""

    decode: Overhead
    prefill: Overhead
    agg: ClosedLoop
    disagg: ClosedLoop


class Effect(msgspec.Struct, frozen=True, array_like=True):
    """What measured points say beyond the formulas: logarithms of factors on TPOT and TTFT."""

    tpot: float = 0.0
    ttft: float = 0.0


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All constants. `other` stands for engines that were not measured.

    `effects`: by what they are tied to (`perfmodel.serving.effect_terms`); those not met in the points are
    none.
    """

    source: str
    hardware: Hardware
    engines: dict[str, EngineConstants]
    other: EngineConstants
    effects: dict[str, Effect] = {}

    def engine(self, name: str) -> EngineConstants:
        """Constants of an engine by its name in recipes."""
        return self.engines.get(name, self.other)


def pass_s(work: Work, hardware: Hardware, overhead: Overhead) -> float:
    """Seconds of one pass."""
    dense = _corner(work.dense_read_s * hardware.dense_read, work.dense_math_s * hardware.dense_math)
    routed = _corner(work.expert_read_s * hardware.expert_read, work.expert_math_s * hardware.expert_math)
    return (
        dense
        + routed
        + work.kv_s * hardware.kv
        + work.attention_s * hardware.attention
        + work.link_s * hardware.link
        + work.hops * hardware.hop_s
        + work.layers * overhead.layer_s
        + work.moe_layers * overhead.moe_layer_s
        + overhead.step_s
    )


@functools.cache
def calibration() -> Calibration:
    """The constants that come with dynctl."""
    text = resources.files("dynctl.perfmodel").joinpath("calibration.json").read_bytes()
    return msgspec.json.decode(text, type=Calibration)


def _corner(x: float, y: float) -> float:
    corner: float = (x**3 + y**3) ** (1 / 3)
    return corner
