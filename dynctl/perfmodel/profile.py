"""What one engine replica costs in time, as one small JSON file. Pure but for `load_profile`.

    {"version": 1, "name": "...",
     "prefill": {"tokens": [0, 512, ...], "seconds": [0.004, 0.03, ...]},
     "decode": {"batch": [1, 8, ...], "context": [0, 4096, ...], "seconds": [[...], ...]},
     "transfer": {"bytes_per_token": 131072, "bytes_per_s": 2.5e10, "latency_s": 0.002},
     "limits": {"kv_tokens": 400000, "sequences": 256, "batched_tokens": 8192},
     "subject": {"model": "...", "backend": "...", "hardware": "...", ...}, "source": "estimate"}

`prefill.seconds[i]` is the time to read `tokens[i]` prompt tokens alone, from an empty context; the value at
0 is the fixed cost of a step. `decode.seconds[i][j]` is one step of `batch[i]` sequences of `context[j]`
tokens on average. Between points straight lines are drawn, beyond them the last ones are prolonged.
`limits`, `subject` and `source` may be left out: the simulated engine has its own flags for the limits.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Literal

import msgspec

from dynctl.errors import ProfileError
from dynctl.perfmodel.interpolate import bilinear, linear
from dynctl.perfmodel.layout import Layout

VERSION = 1


class PrefillCurve(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Prompt tokens → seconds, alone and from an empty context."""

    tokens: tuple[float, ...]
    seconds: tuple[float, ...]


class DecodeGrid(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """(Sequences in the batch, mean context in tokens) → seconds of one step."""

    batch: tuple[float, ...]
    context: tuple[float, ...]
    seconds: tuple[tuple[float, ...], ...]


class Transfer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Moving KV from one engine to another."""

    bytes_per_token: float
    bytes_per_s: float
    latency_s: float = 0.0


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one replica takes at once, all its ranks together: tokens whose KV it holds, sequences in a batch,
    tokens computed in one step.
    """

    kv_tokens: int
    sequences: int
    batched_tokens: int


class Subject(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was measured or estimated. `hardware`: the GPU's name in `perfmodel.gpus`, or "cpu", "mocker"."""

    model: str
    backend: str
    backend_version: str = ""
    hardware: str = ""
    precision: str = ""
    layout: Layout = Layout()

    def differences(self, other: Subject) -> list[str]:
        """What is not the same, in words, what is not stated in one of them and layouts left out."""
        names = ("model", "backend", "backend_version", "hardware", "precision")
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return [
            f"{name} {mine}, not {theirs}"
            for name, mine, theirs in pairs
            if mine and theirs != mine and theirs
        ]


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The costs of one replica. Build by `parse_profile`, which checks the shapes."""

    version: int
    name: str
    prefill: PrefillCurve
    decode: DecodeGrid
    transfer: Transfer
    limits: Limits | None = None
    subject: Subject | None = None
    source: Literal["", "estimate", "measured"] = ""

    def prefill_s(self, start: int, count: int) -> float:
        """Seconds to read `count` prompt tokens after `start` computed ones, the fixed cost left out."""
        curve = self.prefill
        until = linear(curve.tokens, curve.seconds, start + count)
        return max(0.0, until - linear(curve.tokens, curve.seconds, start))

    def decode_s(self, batch: int, context: float) -> float:
        """Seconds of one step of `batch` sequences with `context` tokens each on average."""
        grid = self.decode
        return max(0.0, bilinear(grid.batch, grid.context, grid.seconds, batch, context))

    def step_s(self, prefill_work_s: float, batch: int, context: float) -> float:
        """Seconds of one step that decodes `batch` sequences and does `prefill_work_s` of prompt reading.

        A mixed step is taken as the decode step plus the prompt work; a step without decode pays the fixed
        cost of a prefill instead.
        """
        base = self.decode_s(batch, context) if batch else self.prefill.seconds[0]
        return base + prefill_work_s

    def transfer_s(self, tokens: int) -> float:
        """Seconds to move the KV of `tokens` tokens."""
        return self.transfer.latency_s + tokens * self.transfer.bytes_per_token / self.transfer.bytes_per_s


def parse_profile(text: bytes, where: str) -> Profile:
    """A checked profile. Raises ProfileError that names `where` and the field at fault."""
    try:
        profile = msgspec.json.decode(text, type=Profile)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise ProfileError(f"not a profile: {error}", where=where, hint=f"version {VERSION}, JSON") from error
    if profile.version != VERSION:
        raise ProfileError(f"version {profile.version} is not known", where=where, hint=f"version {VERSION}")
    for name, axis in (
        ("prefill.tokens", profile.prefill.tokens),
        ("decode.batch", profile.decode.batch),
        ("decode.context", profile.decode.context),
    ):
        if len(axis) < 2 or any(b <= a for a, b in itertools.pairwise(axis)):
            raise ProfileError(f"{name} must hold at least two strictly rising values", where=where)
    grid = profile.decode.seconds
    values = [*profile.prefill.seconds, *itertools.chain.from_iterable(grid)]
    if len(profile.prefill.seconds) != len(profile.prefill.tokens):
        raise ProfileError("prefill.seconds needs one value per entry of prefill.tokens", where=where)
    if [len(row) for row in grid] != [len(profile.decode.context)] * len(profile.decode.batch):
        raise ProfileError("decode.seconds needs a row per batch and a value per context", where=where)
    if min(values) < 0 or profile.transfer.bytes_per_s <= 0 or profile.prefill.tokens[0] != 0:
        raise ProfileError(
            "times must not be negative, prefill.tokens must begin with 0, "
            "transfer.bytes_per_s must be above 0",
            where=where,
        )
    return profile


def load_profile(path: Path) -> Profile:
    """The profile in a file. Raises ProfileError when it cannot be read or is none."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ProfileError(f"cannot read the profile: {error.strerror}", where=str(path)) from error
    return parse_profile(text, str(path))


DEFAULT = Profile(
    version=VERSION,
    name="default",
    prefill=PrefillCurve(tokens=(0, 1024, 4096, 16384), seconds=(0.004, 0.034, 0.130, 0.640)),
    decode=DecodeGrid(
        batch=(1, 16, 64, 256),
        context=(0, 4096, 16384),
        seconds=(
            (0.0060, 0.0061, 0.0064),
            (0.0066, 0.0078, 0.0114),
            (0.0080, 0.0128, 0.0272),
            (0.0140, 0.0332, 0.0908),
        ),
    ),
    transfer=Transfer(bytes_per_token=131072, bytes_per_s=25e9, latency_s=0.002),
)
"""An invented machine, about an 8-billion-parameter model on one large GPU, for tests and trials only:
128 KiB of KV a token (32 layers, 8 KV heads of 128, 16 bit), moved at 200 Gbit/s."""
