"""The estimator's constants, fitted on measured serving points. `fit(rows)` is used by
tests/perf/estimator.py.

Two stages. The formulas' constants: robust least squares of the logarithms of predicted over measured TPOT
and TTFT, each constant held near a physical starting value and each engine's near that of all engines. Then
effects of what points have in common: ridge regression of what is left over. How strongly both are held was
chosen by leaving out whole models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from scipy.optimize import least_squares

from dynctl.perfmodel.calibration import (
    Calibration,
    ClosedLoop,
    Effect,
    EngineConstants,
    Hardware,
    Overhead,
)
from dynctl.perfmodel.serving import Deployment, Load, effect_terms, load_of, times_s
from dynctl.perfmodel.work import Work

HARDWARE = {
    "dense_read": 1.3, "dense_math": 1.7, "expert_read": 1.3, "expert_math": 3.0, "kv": 1.8, "attention": 2.0,
    "link": 1.3, "hop_s": 4e-6,
}  # fmt: skip
ENGINE = {
    "decode.layer_s": 30e-6, "decode.moe_layer_s": 15e-6, "decode.step_s": 0.5e-3,
    "prefill.layer_s": 40e-6, "prefill.moe_layer_s": 40e-6, "prefill.step_s": 5e-3,
    "agg.interference": 1.0, "agg.own": 1.1, "agg.queue": 0.09, "agg.steps": 5.0, "agg.rank_steps": 10.0,
    "agg.client_s": 10e-3, "agg.overflow": 0.4,
    "disagg.own": 1.2, "disagg.queue": 0.09, "disagg.steps": 3.0, "disagg.rank_steps": 10.0,
    "disagg.client_s": 50e-3,
}  # fmt: skip
"""Where the fit starts from and is held to, each in seconds or as a factor."""


@dataclass(frozen=True, slots=True)
class Held:
    """How strongly: shared constants to their start, engines' to the shared, effects to none; weight of TTFT;
    residual from which points count less."""

    shared: float = 32.0
    engine: float = 20.0
    effect: float = 1.5
    hardware_effect: float = 200.0
    ttft: float = 0.7
    robust: float = 0.1


@dataclass(frozen=True, slots=True)
class Point:
    """A measured point: times in seconds."""

    what: Deployment
    load: Load
    tpot_s: float
    ttft_s: float


def point(what: Deployment, tpot_ms: float, ttft_ms: float) -> Point:
    """Counts a deployment's passes once."""
    return Point(what, load_of(what), tpot_ms / 1e3, ttft_ms / 1e3)


def fit(points: Sequence[Point], source: str, held: Held = Held()) -> Calibration:
    """All constants, from these points."""
    engines = sorted({p.what.backend for p in points})
    groups = _groups(points, engines)
    usable = np.array([0.0 if p.what.guessed else 1.0 for p in points])
    width = len(HARDWARE) + len(ENGINE) * (1 + len(engines))
    hold = np.full(width, held.engine)
    hold[: len(HARDWARE) + len(ENGINE)] = held.shared

    def residuals(x: Any) -> Any:
        left = _left(groups, _constants(x, engines), len(points)) * usable[:, None]
        scaled = np.concatenate([left[:, 0], held.ttft * left[:, 1]]) / held.robust
        # Soft-L1 of the points only: what holds the constants stays quadratic.
        soft = np.sign(scaled) * np.sqrt(2 * (np.sqrt(1 + scaled**2) - 1)) * held.robust
        return np.concatenate([soft, hold * x * held.robust])

    x = least_squares(residuals, np.zeros(width), max_nfev=30).x
    constants = _constants(x, engines)
    left = _left(groups, constants, len(points))
    return Calibration(
        source=source,
        hardware=constants[0],
        engines=constants[1],
        other=constants[2],
        effects=_effects(points, left, held),
    )


def _stacked(loads: Sequence[Load]) -> Load:
    """Many loads as one whose numbers are arrays."""

    def arrays(kind: Any, items: Sequence[Any]) -> Any:
        fields: dict[str, Any] = {}
        for name in kind.__struct_fields__:
            values = [getattr(item, name) for item in items]
            fields[name] = arrays(Work, values) if isinstance(values[0], Work) else np.array(values)
        return kind(**fields)

    found: Load = arrays(Load, loads)
    return found


def _groups(points: Sequence[Point], engines: list[str]) -> list[tuple[str, bool, Any, Load, Any]]:
    found = []
    for name in engines:
        for agg in (True, False):
            where = [
                i for i, p in enumerate(points) if p.what.backend == name and (p.what.prefill is None) == agg
            ]
            if where:
                measured = np.array([(points[i].tpot_s, points[i].ttft_s) for i in where])
                loads = _stacked([points[i].load for i in where])
                found.append((name, agg, np.array(where), loads, measured))
    return found


def _constants(x: Any, engines: list[str]) -> tuple[Hardware, dict[str, EngineConstants], EngineConstants]:
    """The constants that a vector of logarithms over the starting values means."""
    h, e = len(HARDWARE), len(ENGINE)
    hardware = Hardware(**{n: v * math.exp(d) for (n, v), d in zip(HARDWARE.items(), x[:h], strict=True)})
    shared = x[h : h + e]
    own = {name: shared + x[h + e * (1 + i) : h + e * (2 + i)] for i, name in enumerate(engines)}
    return hardware, {name: _engine(values) for name, values in own.items()}, _engine(shared)


def _engine(values: Any) -> EngineConstants:
    named = {n: v * math.exp(d) for (n, v), d in zip(ENGINE.items(), values, strict=True)}
    part = {
        room: {n.split(".")[1]: v for n, v in named.items() if n.startswith(room + ".")}
        for room in ("decode", "prefill", "agg", "disagg")
    }
    return EngineConstants(
        decode=Overhead(**part["decode"]),
        prefill=Overhead(**part["prefill"]),
        agg=ClosedLoop(**part["agg"]),
        disagg=ClosedLoop(**part["disagg"], interference=0.0, overflow=0.0),
    )


def _left(groups: Any, constants: Any, count: int) -> Any:
    """Logarithms of predicted over measured, a row (TPOT, TTFT) per point."""
    hardware, engines, _ = constants
    found = np.zeros((count, 2))
    for name, agg, where, load, measured in groups:
        engine = engines[name]
        tpot, ttft = times_s(load, hardware, engine, engine.agg if agg else engine.disagg)
        found[where] = np.log(np.stack([tpot, ttft], axis=1) / measured)
    return found


def _effects(points: Sequence[Point], left: Any, held: Held) -> dict[str, Effect]:
    """Ridge regression of what is left on indicators of what points have in common, robust by reweighting."""
    keys = sorted({key for p in points for key in effect_terms(p.what)})
    index = {key: i for i, key in enumerate(keys)}
    design = np.zeros((len(points), len(keys)))
    # Of engine and GPU alone there are few different models: one must not speak for all.
    general = {next(iter(effect_terms(p.what))) for p in points}
    hold = np.diag([held.hardware_effect if key in general else held.effect for key in keys])
    for i, p in enumerate(points):
        for key, much in effect_terms(p.what).items():
            design[i, index[key]] = much
    columns = []
    for target in (0, 1):
        wanted, weight = -left[:, target], np.ones(len(points))
        effect = np.zeros(len(keys))
        for _ in range(8):
            weighted = design * weight[:, None]
            effect = np.linalg.solve(weighted.T @ design + hold, weighted.T @ wanted)
            weight = 1 / np.maximum(1.0, np.abs(wanted - design @ effect) / 0.15)
        columns.append(effect)
    return {
        key: Effect(tpot=round(float(columns[0][i]), 4), ttft=round(float(columns[1][i]), 4))
        for key, i in index.items()
    }


def rounded(constants: Calibration) -> bytes:
    """As written to calibration.json: four digits."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: short(v) for k, v in value.items()}
        return float(f"{value:.4g}") if isinstance(value, float) else value

    return msgspec.json.format(msgspec.json.encode(short(msgspec.to_builtins(constants))), indent=1) + b"\n"
