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
import math
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


class EngineConstants(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of one engine. `interference`: how much of other requests' prompt reading decoding feels when both
    share the engine; `queue`: growth of the TTFT in a closed loop with each doubling of the requests of a
    rank.
    """

    decode: Overhead
    prefill: Overhead
    interference: float
    queue: float


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All constants. `other` stands for engines that were not measured."""

    source: str
    hardware: Hardware
    engines: dict[str, EngineConstants]
    other: EngineConstants

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
    return math.cbrt(x**3 + y**3)
