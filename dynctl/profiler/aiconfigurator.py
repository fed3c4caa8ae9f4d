"""AIConfigurator (NVIDIA, Apache-2.0) as an estimator: times interpolated from its kernel measurements.

It runs in a Python of its own (`aiconfigurator_child`), so its dependencies need not agree with ours. KV is
held in 16 bit and moved over the network as the roofline has it: both estimators answer the same question.
"""

from __future__ import annotations

from importlib import resources
from typing import Any, TypeVar

import msgspec

from dynctl.errors import ProcessExited, ProfileError
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.memory import check_divides
from dynctl.perfmodel.profile import (
    VERSION,
    DecodeGrid,
    Limits,
    PrefillCurve,
    Profile,
    Subject,
    parse_profile,
)
from dynctl.perfmodel.roofline import BATCHES, CONTEXTS, PROMPTS, Roofline
from dynctl.perfmodel.shapes import shape_of
from dynctl.profiler.line_child import LineChild

PINNED = "0.12.0"
DEADLINE_S = 180.0
"""For one answer: reading its tables takes seconds, a layout about two."""
_BATCHES = tuple(batch for batch in BATCHES if batch <= 1024)
_MODES = {"bf16": "bfloat16", "fp16": "bfloat16", "fp8": "fp8", "fp4": "nvfp4"}
Answer = TypeVar("Answer")
_DEFAULT = "without --estimator the roofline answers"
_SAME = ("layers", "hidden", "heads", "kv_heads", "head_dim", "dense_layers", "latent", "experts")


class Opened(msgspec.Struct, frozen=True, kw_only=True):
    """The child's first answer. `database`: the engine's version that was measured."""

    absent: bool = False
    refused: str = ""
    hint: str = ""
    version: str = ""
    database: str = ""
    model: str = ""
    config: dict[str, Any] = {}


class Sampled(msgspec.Struct, frozen=True, kw_only=True):
    """The child's answer for a layout; `kv_tokens` of one rank, `gemm` the format it took weights to have."""

    refused: str = ""
    kv_tokens: int = 0
    gemm: str = ""
    prefill_ms: tuple[float, ...] = ()
    decode_ms: tuple[tuple[float, ...], ...] = ()


class AiConfigurator:
    """A `perfmodel.estimate.Estimator`. The same arguments give the same profile."""

    def __init__(
        self, roofline: Roofline, model: str, python: str, *, deadline_s: float = DEADLINE_S
    ) -> None:
        """`roofline`: the same question for the built-in estimator; `model`: id or directory of config.json.

        Raises ProfileError when `python` lacks the package, or the package has no figures for model, GPU or
        engine; NotReady and ProcessExited when it does not answer.
        """
        self._roofline = roofline
        script = str(resources.files("dynctl.profiler").joinpath("aiconfigurator_child.py"))
        self._child = LineChild("AIConfigurator", [python, "-I", script], deadline_s)
        self.opened = self._open(model, python)

    @property
    def label(self) -> str:
        """What estimates: AIConfigurator 0.12.0 with its figures of vllm 0.24.0."""
        return (
            f"AIConfigurator {self.opened.version} with its figures of {self._roofline.backend} "
            f"{self.opened.database}"
        )

    def close(self) -> None:
        """End the child; it also ends with the last reference to this."""
        self._child.close()

    def profile(self, layout: Layout) -> Profile:
        """Costs of one replica.

        Raises ProfileError with the reason why the layout cannot be, AIConfigurator's own when it has one;
        NotReady and ProcessExited when it does not answer.
        """
        roofline = self._roofline
        check_divides(roofline.shape, layout)
        found = self._ask(Sampled, {"sizes": _sizes(layout, experts=roofline.shape.experts is not None),
                                    "prompts": [max(1, tokens) for tokens in PROMPTS],
                                    "batches": _BATCHES,
                                    "contexts": [max(1, tokens) for tokens in CONTEXTS]})  # fmt: skip
        if found.refused:
            raise ProfileError(f"{layout.label}: AIConfigurator: {found.refused}")
        self._check_format(layout, found)
        if found.kv_tokens < roofline.limits.batched_tokens:
            raise ProfileError(
                f"{layout.label}: only {found.kv_tokens} tokens of KV are left, as AIConfigurator counts",
                hint=f"room for one step of {roofline.limits.batched_tokens} tokens is the least",
            )
        return self._checked(layout, found)

    def _open(self, model: str, python: str) -> Opened:
        roofline = self._roofline
        own = roofline.precision == roofline.shape.native
        question = {
            "model": model,
            "gpu": roofline.gpu.name.lower(),
            "backend": roofline.backend,
            "gemm": None if own else _MODES[roofline.precision.weights],
            "moe": None if own else _MODES[roofline.precision.experts],
            "memory_share": roofline.limits.memory_share,
            "sequences": roofline.limits.sequences,
            "batched_tokens": roofline.limits.batched_tokens,
        }
        opened = self._ask(Opened, question)
        install = f"pip install aiconfigurator=={PINNED} in an environment of its own"
        if opened.absent:
            raise ProfileError("has no AIConfigurator", where=python, hint=f"{install}, and name its Python")
        if opened.version != PINNED:
            raise ProfileError(f"has AIConfigurator {opened.version}", where=python, hint=install)
        if opened.refused:
            raise ProfileError(f"AIConfigurator: {opened.refused}", hint=opened.hint or _DEFAULT)
        theirs = shape_of(opened.config, opened.model)
        other = [name for name in _SAME if getattr(theirs, name) != getattr(roofline.shape, name)]
        if other:
            raise ProfileError(
                f"AIConfigurator's {opened.model} is not {model}: {', '.join(other)} differ",
                hint="a directory with the model's config.json",
            )
        return opened

    def _ask(self, kind: type[Answer], question: dict[str, Any]) -> Answer:
        line = self._child.ask(msgspec.json.encode(question))
        try:
            return msgspec.json.decode(line, type=kind)
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            raise ProcessExited(f"AIConfigurator's answer cannot be read: {error}: {line[:80]!r}") from error

    def _check_format(self, layout: Layout, found: Sampled) -> None:
        """Weights must have the format that memory and labels are told."""
        wanted = self._roofline.precision.weights.replace("fp16", "bf16")
        taken = next((name for name in ("fp4", "fp8") if name in found.gemm), "bf16")
        if taken != wanted:
            raise ProfileError(
                f"{layout.label}: AIConfigurator takes weights to be {found.gemm}, dynctl {wanted}",
                hint="--precision",
            )

    def _checked(self, layout: Layout, found: Sampled) -> Profile:
        roofline = self._roofline
        at_once = layout.data * layout.pipeline  # each rank and stage has such a batch of its own
        batches = [float(batch * at_once) for batch in _BATCHES]
        steps = [tuple(ms / 1000.0 for ms in row) for row in found.decode_ms]
        if at_once > 1:  # a single sequence takes as long as one on each
            batches, steps = [1.0, *batches], [*steps[:1], *steps]
        made = Profile(
            version=VERSION,
            name=f"{roofline.shape.name} {layout.label} on {roofline.gpu.name}, {self.label}",
            prefill=PrefillCurve(
                tokens=tuple(map(float, PROMPTS)), seconds=tuple(ms / 1000.0 for ms in found.prefill_ms)
            ),
            decode=DecodeGrid(
                batch=tuple(batches), context=tuple(map(float, CONTEXTS)), seconds=tuple(steps)
            ),
            transfer=roofline.transfer(layout),
            limits=Limits(
                kv_tokens=found.kv_tokens * layout.data,
                sequences=roofline.limits.sequences * layout.data,
                batched_tokens=roofline.limits.batched_tokens * layout.data,
            ),
            subject=Subject(
                model=roofline.shape.name,
                backend=roofline.backend,
                hardware=roofline.gpu.name,
                precision=roofline.precision.label,
                layout=layout,
            ),
            source="estimate",
        )
        return parse_profile(msgspec.json.encode(made), "AIConfigurator's answer")


def _sizes(layout: Layout, *, experts: bool) -> dict[str, int]:
    """A layout in AIConfigurator's words: experts are spread over some GPUs and cut over the rest."""
    sizes = {"tp_size": layout.tensor, "pp_size": layout.pipeline, "attention_dp_size": layout.data}
    if experts:
        sizes["moe_ep_size"] = layout.expert
        sizes["moe_tp_size"] = layout.tensor * layout.data // layout.expert
    return sizes
