"""The own estimator: what a layout costs, from the model's sizes, the GPU's data sheet and calibrated
constants.
"""

from __future__ import annotations

from msgspec import structs

from dynctl.perfmodel.calibration import Calibration, EngineConstants, calibration, pass_s
from dynctl.perfmodel.gpus import Gpu
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.memory import EngineLimits, fit
from dynctl.perfmodel.precision import Precision
from dynctl.perfmodel.profile import (
    VERSION,
    DecodeGrid,
    Limits,
    PrefillCurve,
    Profile,
    Subject,
    Transfer,
)
from dynctl.perfmodel.shapes import ModelShape
from dynctl.perfmodel.work import Machine, decode_pass, prefill_pass, work_of

PROMPTS = (0, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
CONTEXTS = (0, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
HOP_LATENCY_S = 0.002
"""Until the first byte of a KV transfer moves: handshake and scheduling on both sides."""
_TRANSFER_SHARE = 0.8


class Roofline:
    """A `perfmodel.estimate.Estimator`. The same arguments give the same profile."""

    def __init__(
        self,
        shape: ModelShape,
        gpu: Gpu,
        backend: str,
        precision: Precision | None = None,
        limits: EngineLimits | None = None,
        constants: Calibration | None = None,
    ) -> None:
        """`backend` as in recipes; `precision` None = the one the model is published in, 16-bit KV."""
        self.shape = shape
        self.gpu = gpu
        self.backend = backend
        self.precision = precision or shape.native
        self.limits = limits or EngineLimits()
        self._constants = constants or calibration()

    @property
    def engine(self) -> EngineConstants:
        """The constants of the engine in use."""
        return self._constants.engine(self.backend)

    def prefill_s(self, layout: Layout, tokens: float, prompts: float = 1.0) -> float:
        """Seconds to read `prompts` prompts of `tokens` each on every attention rank, from empty contexts.

        With one prompt that is also what a prompt takes alone: the other ranks then wait. Stages count as
        busy all at once, each with another prompt.
        """
        work = work_of(self._machine(layout), prefill_pass(tokens, prompts))
        return pass_s(work, self._constants.hardware, self.engine.prefill)

    def decode_s(self, layout: Layout, batch: float, context: float) -> float:
        """Seconds of one step of `batch` sequences of the replica, its ranks together, with `context`
        tokens.
        """
        work = work_of(self._machine(layout), decode_pass(batch / layout.data, context))
        return pass_s(work, self._constants.hardware, self.engine.decode)

    def profile(self, layout: Layout) -> Profile:
        """Costs of one replica: times sampled from `prefill_s` and `decode_s`, limits from memory.

        Raises ProfileError with the reason why the layout cannot be.
        """
        room = fit(self.shape, self.gpu, self.precision, layout, self.limits)
        through = structs.replace(layout, pipeline=1)  # a prompt alone goes through one stage after the other
        prefill = tuple(self.prefill_s(through, tokens) for tokens in PROMPTS)
        decode = tuple(tuple(self.decode_s(layout, batch, c) for c in CONTEXTS) for batch in BATCHES)
        subject = Subject(
            model=self.shape.name,
            backend=self.backend,
            hardware=self.gpu.name,
            precision=self.precision.label,
            layout=layout,
        )
        return Profile(
            version=VERSION,
            name=f"{self.shape.name} {layout.label} on {self.gpu.name}",
            prefill=PrefillCurve(tokens=tuple(map(float, PROMPTS)), seconds=prefill),
            decode=DecodeGrid(
                batch=tuple(map(float, BATCHES)), context=tuple(map(float, CONTEXTS)), seconds=decode
            ),
            transfer=self.transfer(layout),
            limits=Limits(
                kv_tokens=room.kv_tokens,
                sequences=self.limits.sequences * layout.data,
                batched_tokens=self.limits.batched_tokens * layout.data,
            ),
            subject=subject,
            source="estimate",
        )

    def _machine(self, layout: Layout) -> Machine:
        return Machine(shape=self.shape, gpu=self.gpu, precision=self.precision, layout=layout)

    def transfer(self, layout: Layout) -> Transfer:
        """Each GPU of a rank sends its part of the KV through its own network card."""
        senders = layout.pipeline * (1 if self.shape.latent else min(layout.tensor, self.shape.kv_heads))
        return Transfer(
            bytes_per_token=self.shape.kv_bytes_per_token(self.precision),
            bytes_per_s=self.gpu.network * senders * _TRANSFER_SHARE,
            latency_s=HOP_LATENCY_S,
        )
