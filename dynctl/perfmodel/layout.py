"""How one replica of a model is spread over GPUs. Pure."""

from __future__ import annotations

import msgspec


class Layout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, order=True):
    """Parallel sizes of one replica.

    `data`: data-parallel attention ranks inside it (each holds its own KV). `expert`: over how many GPUs the
    experts of a mixture-of-experts model are spread; 1 = each expert is cut like the other layers.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    expert: int = 1

    @property
    def gpus(self) -> int:
        """GPUs of one replica."""
        return self.tensor * self.pipeline * self.data

    def named(self, text: str) -> str:
        """`text` with the sizes in the place of {tensor}, {pipeline}, {data} and {expert}."""
        for name in ("tensor", "pipeline", "data", "expert"):
            text = text.replace(f"{{{name}}}", str(getattr(self, name)))
        return text

    @property
    def label(self) -> str:
        """As people write it: TP4, TP2·PP2, TP1·DP8·EP8."""
        more = (("PP", self.pipeline), ("DP", self.data), ("EP", self.expert))
        return "·".join([f"TP{self.tensor}", *(f"{name}{size}" for name, size in more if size > 1)])
