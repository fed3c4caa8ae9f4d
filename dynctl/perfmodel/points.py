"""One load point of a table of measurements, in words of the model: a row → a deployment. Pure.

Columns as in tests/data/serving_points.README.md. What was measured (`ttft_ms`, `tpot_ms` and the throughputs
derived from them) is never looked at. Where a layout is not stated in full, or contradicts itself, the
likeliest is taken and the deployment marked as `guessed`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from dynctl.errors import ProfileError
from dynctl.perfmodel.gpus import gpu_named
from dynctl.perfmodel.guess import NODE, guessed_pools, spread
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.precision import FORMATS, Precision
from dynctl.perfmodel.serving import Deployment
from dynctl.perfmodel.shapes import ModelShape
from dynctl.perfmodel.work import Machine

NEEDED = ("model", "system", "backend", "mode", "isl", "osl", "concurrency", "tp")
"""Columns a table must have; the others may be left out."""

Row = Mapping[str, str]
Shapes = Callable[[str], ModelShape]


def deployment_of(row: Row, shapes: Shapes) -> Deployment:
    """What a row describes. Raises ProfileError that names the column at fault and what it holds.

    `shapes` finds a model's shape by its name or raises ProfileError.
    """
    model = row.get("model", "").strip()
    if not model:
        raise ProfileError("model is blank", hint="a directory with config.json, or a known id")
    shape = shapes(model)
    mode = row.get("mode", "").strip()
    if mode not in ("agg", "disagg"):
        raise ProfileError(f"mode is {mode!r}", hint="agg or disagg")
    backend = row.get("backend", "").strip()
    if not backend:
        raise ProfileError("backend is blank", hint="the engine's name")
    concurrency, isl = _count(row, "concurrency"), _count(row, "isl")
    gpu, precision = gpu_named(row.get("system", "")), _precision(row, shape)
    guessed = row.get("layout_status", "").strip() in ("partial", "suspect")
    prefill, workers = None, (1, 1)
    if mode == "agg":
        decode, odd = _aggregated(row, shape, concurrency)
        guessed = guessed or odd
    elif guessed or not row.get("decode_workers", "").strip():
        machine = Machine(shape=shape, gpu=gpu, precision=precision, layout=Layout())
        sizes = (_gpus(row, "prefill_"), _gpus(row, "decode_"))
        pools = guessed_pools(machine, sizes, isl, concurrency)
        prefill, decode, workers, guessed = pools.prefill, pools.decode, pools.workers, True
    else:
        prefill, decode = _pool(row, "prefill_", shape), _pool(row, "decode_", shape)
        workers = (_count(row, "prefill_workers", 1), _count(row, "decode_workers", 1))
    version, date = row.get("backend_version", "").strip(), row.get("measured_on", "").strip()
    return Deployment(
        shape=shape,
        gpu=gpu,
        backend=backend,
        precision=precision,
        isl=isl,
        osl=_count(row, "osl"),
        concurrency=float(concurrency),
        decode=decode,
        prefill=prefill,
        workers=workers,
        guessed=guessed,
        campaign=f"{version}@{date}",
    )


def _count(row: Row, column: str, default: int = 0) -> int:
    """A whole number of 1 or more; blank = `default`, unless that is 0."""
    text = (row.get(column) or "").strip()
    if not text and default:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1 <= value < 1e9 or value != int(value):
        raise ProfileError(
            f"{column} is {text!r}" if text else f"{column} is blank", hint="a whole number of 1 or more"
        )
    return int(value)


def _precision(row: Row, shape: ModelShape) -> Precision:
    """As stated; blank = as the model is published. A quantised model caches in 8 bit. Models of experts in
    4 bit keep attention wider: 8 bit with latent attention, else 16.
    """
    weights = _format(row, "weight_quant") or _format(row, "precision")
    experts = _format(row, "moe_quant") or weights
    if not weights:
        return shape.native
    if shape.experts and experts == "fp4":
        weights = "fp8" if shape.latent else "bf16"
    cache = "fp8" if experts in ("fp8", "fp4") else "bf16"
    held = Precision.named(weights, cache)
    return Precision(weights=held.weights, experts=Precision.named(experts).experts, kv=held.kv)


def _format(row: Row, column: str) -> str:
    text = (row.get(column) or "").strip().lower()
    found = next((name for name in (*FORMATS, "float16") if name in text), "")
    if text and not found:
        raise ProfileError(f"{column} is {text!r}", hint=f"one of {', '.join(FORMATS)}")
    return {"float16": "fp16"}.get(found, found)


def _aggregated(row: Row, shape: ModelShape, concurrency: int) -> tuple[Layout, bool]:
    """The layout of the one engine, and whether it had to be guessed."""
    tp, pp = _count(row, "tp", 1), _count(row, "pp", 1)
    stated = bool((row.get("attention_dp") or "").strip())
    data = _count(row, "attention_dp", 1)
    moe_tp, ep = _count(row, "moe_tp", 1), _count(row, "moe_ep", 1)
    batch = _count(row, "batch", max(1, concurrency // data))
    if shape.experts is None:
        return Layout(tensor=tp, pipeline=pp), data > 1
    if tp > NODE and tp & (tp - 1):
        # Not the ranks of one engine but the GPUs of something larger.
        return spread(tp), True
    if not stated and concurrency >= 2 * batch and tp % (concurrency // batch) == 0:
        data = concurrency // batch
        return Layout(tensor=tp // data, pipeline=pp, data=data, expert=ep), True
    if moe_tp * ep > tp * data and not stated:
        return Layout(tensor=moe_tp * ep // data, pipeline=pp, data=data, expert=ep), True
    odd = (tp * data) % ep != 0
    return Layout(tensor=tp, pipeline=pp, data=data, expert=1 if odd else ep), odd


def _gpus(row: Row, role: str) -> int:
    """GPUs of one worker of a pool."""
    return _count(row, role + "tp", 1) * _count(row, role + "pp", 1) * _count(row, role + "attention_dp", 1)


def _pool(row: Row, role: str, shape: ModelShape) -> Layout:
    """The layout of one worker of a pool, as stated."""
    tp, data = _count(row, role + "tp", 1), _count(row, role + "attention_dp", 1)
    pp, ep = _count(row, role + "pp", 1), _count(row, role + "moe_ep", 1)
    if shape.experts is None or (tp * data) % ep:
        ep = 1
    return Layout(tensor=tp, pipeline=pp, data=data, expert=ep)
