"""Profiles as NVIDIA Dynamo's planner and mocker read them: two npz files.

Arrays and units as documented of its profiler: prefill_isl in tokens, prefill_ttft in ms,
prefill_thpt_per_gpu in tokens/s; x_kv_usage 0..1, y_context_length in tokens, z_itl in ms, z_thpt_per_gpu
in tokens/s, max_kv_tokens.
"""

from __future__ import annotations

from pathlib import Path

from dynctl.errors import ProfileError
from dynctl.perfmodel.profile import Profile

PREFILL = "selected_prefill_interpolation"
DECODE = "selected_decode_interpolation"
_ISL_POINTS = 16
_CONTEXTS = 6
_USES = 6
_OSL = 500


def write_npz(folder: Path, prefill: Profile, decode: Profile, longest: int) -> None:
    """Write both files below `folder`. `longest`: tokens of the longest context; above 2 * 512.

    Raises ProfileError when numpy is not installed or the profile lacks limits.
    """
    try:
        import numpy
    except ImportError as error:
        raise ProfileError("numpy is not installed", hint="pip install 'dynctl[profile]'") from error
    for name, arrays in (
        (PREFILL, prefill_arrays(prefill, longest)),
        (DECODE, decode_arrays(decode, longest)),
    ):
        (folder / name).mkdir(parents=True, exist_ok=True)
        made = {key: numpy.asarray(values, dtype=float) for key, values in arrays.items()}
        numpy.savez(folder / name / "raw_data.npz", **made)  # type: ignore[arg-type]


def prefill_arrays(profile: Profile, longest: int) -> dict[str, list[float]]:
    """Times of prompts read alone, evenly from 100 tokens to the longest less 512."""
    layout = profile.subject.layout if profile.subject else None
    gpus, ranks = (layout.gpus, layout.data) if layout else (1, 1)
    step = (longest - 512 - 100) / (_ISL_POINTS - 1)
    isl = [round(100 + step * i) for i in range(_ISL_POINTS)]
    ttft = [(profile.prefill.seconds[0] + profile.prefill_s(0, one)) * 1000.0 for one in isl]
    return {
        "prefill_isl": [float(one) for one in isl],
        "prefill_ttft": ttft,
        "prefill_thpt_per_gpu": [one / t / gpus * 1000.0 * ranks for one, t in zip(isl, ttft, strict=True)],
    }


def decode_arrays(profile: Profile, longest: int) -> dict[str, list[float]]:
    """Steps of six batches for each of six prompts, up to all the KV there is."""
    if profile.limits is None:
        raise ProfileError("the profile tells no limits")
    layout = profile.subject.layout if profile.subject else None
    gpus, kv = layout.gpus if layout else 1, profile.limits.kv_tokens
    rows: list[tuple[float, float, float, float]] = []
    for i in range(_CONTEXTS):
        isl = round(100 + (longest - _OSL - 100) / (_CONTEXTS - 1) * i)
        context = isl + _OSL / 2
        most = min(int(kv // (isl + _OSL)), profile.limits.sequences)
        for batch in sorted({max(1, round(most * (j + 1) / _USES)) for j in range(_USES)}) if most else ():
            step_s = profile.decode_s(batch, context)
            rows.append((context * batch / kv, context, step_s * 1000.0, batch / step_s / gpus))
    if not rows:
        raise ProfileError("no sequence of the shortest prompt fits the KV of this layout")
    names = ("x_kv_usage", "y_context_length", "z_itl", "z_thpt_per_gpu")
    made = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    return {**made, "max_kv_tokens": [float(kv)]}
