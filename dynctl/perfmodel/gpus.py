"""What each kind of GPU can do, from its maker's data sheet: dense rates, without sparsity. Pure.

Sources: NVIDIA data sheets of A100 80GB SXM, H100 SXM, H200 SXM, L40S, HGX B200 and B300, GB200 and GB300
NVL72 (figures of one GPU); AMD data sheet of MI300X. `link`: NVLink, Infinity Fabric or PCIe, bytes/s in one
direction.
"""

from __future__ import annotations

import difflib
import re

import msgspec

from dynctl.errors import ProfileError


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU: bytes, bytes/s, floating-point operations/s by format.

    Formats that its tensor cores lack are widened to 16 bit on the way. `per_node`: GPUs that `link` joins;
    beyond them each has `network` bytes/s.
    """

    name: str
    memory_bytes: float
    bandwidth: float
    bf16: float
    fp8: float
    fp4: float
    link: float
    per_node: int = 8
    network: float = 50e9

    def flops(self, format_: str) -> float:
        """Operations/s with operands of this format."""
        return {"fp8": self.fp8, "fp4": self.fp4}.get(format_, self.bf16)

    def link_within(self, gpus: int) -> float:
        """Bytes/s between so many GPUs of one replica."""
        return self.link if gpus <= self.per_node else self.network


_T, _G = 1e12, 1e9
_TABLE = (
    Gpu(name="A100", memory_bytes=80 * _G, bandwidth=2.039 * _T,
        bf16=312 * _T, fp8=312 * _T, fp4=312 * _T, link=300 * _G, network=25 * _G),
    Gpu(name="H100", memory_bytes=80 * _G, bandwidth=3.35 * _T,
        bf16=989 * _T, fp8=1979 * _T, fp4=989 * _T, link=450 * _G),
    Gpu(name="H200", memory_bytes=141 * _G, bandwidth=4.8 * _T,
        bf16=989 * _T, fp8=1979 * _T, fp4=989 * _T, link=450 * _G),
    Gpu(name="B200", memory_bytes=180 * _G, bandwidth=8.0 * _T,
        bf16=2250 * _T, fp8=4500 * _T, fp4=9000 * _T, link=900 * _G),
    Gpu(name="B300", memory_bytes=270 * _G, bandwidth=8.0 * _T,
        bf16=2250 * _T, fp8=4500 * _T, fp4=13500 * _T, link=900 * _G, network=100 * _G),
    Gpu(name="GB200", memory_bytes=186 * _G, bandwidth=8.0 * _T,
        bf16=2500 * _T, fp8=5000 * _T, fp4=10000 * _T, link=900 * _G, per_node=72),
    Gpu(name="GB300", memory_bytes=279 * _G, bandwidth=8.0 * _T,
        bf16=2500 * _T, fp8=5000 * _T, fp4=15000 * _T, link=900 * _G, per_node=72, network=100 * _G),
    Gpu(name="MI300X", memory_bytes=192 * _G, bandwidth=5.3 * _T,
        bf16=1307 * _T, fp8=2615 * _T, fp4=1307 * _T, link=448 * _G),
    Gpu(name="L40S", memory_bytes=48 * _G, bandwidth=0.864 * _T,
        bf16=362 * _T, fp8=733 * _T, fp4=362 * _T, link=32 * _G, network=25 * _G),
)  # fmt: skip
GPUS: dict[str, Gpu] = {gpu.name: gpu for gpu in _TABLE}


def gpu_named(text: str) -> Gpu:
    """The GPU that a name means: "H200", "h200_sxm", "NVIDIA H200", "NVIDIA H100 80GB HBM3".

    Raises ProfileError that lists the known ones.
    """
    words = [word for word in re.split(r"[^A-Z0-9]+", text.upper()) if word]
    for word in words:
        if word in GPUS:
            return GPUS[word]
    close = difflib.get_close_matches("".join(words), GPUS, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ProfileError(f"unknown GPU {text!r}", hint=f"{hint}known: {', '.join(sorted(GPUS))}")
