"""In how many bits a model's parts are held. Pure."""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

from dynctl.errors import ProfileError

Format = Literal["bf16", "fp16", "fp8", "fp4"]
FORMATS: tuple[str, ...] = get_args(Format)
BYTES: dict[str, float] = {"bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "fp4": 0.5625}
"""Of one value; fp4 with its scale, one byte for 16 values (NVFP4)."""


class Precision(msgspec.Struct, frozen=True, kw_only=True):
    """`weights`: attention and dense feed-forward, `experts`: routed ones, `kv`: the cache."""

    weights: Format = "bf16"
    experts: Format = "bf16"
    kv: Format = "bf16"

    @classmethod
    def named(cls, name: str, kv: str = "bf16") -> Precision:
        """All weights in one format. Raises ProfileError that lists the formats."""
        for given in (name, kv):
            if given not in FORMATS:
                raise ProfileError(f"unknown precision {given!r}", hint=f"one of {', '.join(FORMATS)}")
        return msgspec.convert({"weights": name, "experts": name, "kv": kv}, cls)

    @property
    def weight_bytes(self) -> float:
        """Of one weight outside experts."""
        return BYTES[self.weights]

    @property
    def expert_bytes(self) -> float:
        """Of one weight of a routed expert."""
        return BYTES[self.experts]

    @property
    def kv_bytes(self) -> float:
        """Of one cached value."""
        return BYTES[self.kv]

    @property
    def label(self) -> str:
        """As a profile's subject states it: "fp8", "bf16+fp4 experts", "fp8, kv fp8"."""
        weights = self.weights if self.weights == self.experts else f"{self.weights}+{self.experts} experts"
        return weights if self.kv in ("bf16", "fp16") else f"{weights}, kv {self.kv}"
