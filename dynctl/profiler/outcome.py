"""What a measuring profile run found: the file `measured.json` beside the recipe. Values only.

A report is made from this alone. Times in seconds, lengths in tokens. Curves are `perfmodel.profile.Profile`:
`estimated` before measuring, `fitted` after it, both whole, so that any point of either can be drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from dynctl.errors import CodecError
from dynctl.perfmodel.choice import Choice, Option, Sla
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.profile import Profile

VERSION = 1
FILE = "measured.json"
NOTHING_MEASURED = "no layout could be measured"
"""Why there is no choice then, whatever the SLA."""


class PrefillPoint(msgspec.Struct, frozen=True, kw_only=True):
    """Prompts of `isl` tokens read alone: median `seconds` to the first token of `requests`, the fastest and
    the slowest of them. `reused`: taken from the journal of an earlier run.
    """

    isl: float
    seconds: float
    low_s: float
    high_s: float
    requests: int
    reused: bool = False


class DecodePoint(msgspec.Struct, frozen=True, kw_only=True):
    """Steps of `batch` answers with `context` tokens each on average: median `seconds` of a step over `steps`
    steps. `cached`: share of the prompts' tokens found in the cache, None when the engine does not tell.
    """

    batch: int
    context: float
    seconds: float
    steps: int
    cached: float | None = None
    reused: bool = False


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """A probe that was measured twice and used neither time. `what`: in words, such as "decode 64 x 4250"."""

    what: str
    reason: str


class LayoutRun(msgspec.Struct, frozen=True, kw_only=True):
    """One candidate. `failure`: why its engine did not start or died, with its last error lines; `stopped`:
    why no more of it was measured, "" when all was. `start_s`: until its engine was ready.
    """

    layout: Layout
    estimated: Profile
    fitted: Profile | None = None
    prefill: tuple[PrefillPoint, ...] = ()
    decode: tuple[DecodePoint, ...] = ()
    refused: tuple[Refusal, ...] = ()
    failure: str = ""
    lines: tuple[str, ...] = ()
    stopped: str = ""
    start_s: float = 0.0
    took_s: float = 0.0


class Confirmed(msgspec.Struct, frozen=True, kw_only=True):
    """A split started whole and measured at `rate` with Poisson arrivals: figures at the SLA's percentile, to
    be held against `option.predicted`. `attainment`: share of the requests within the SLA, with its interval.
    `failure`: why there are no figures.
    """

    option: Option
    rate: float
    requests: int = 0
    ttft_s: float | None = None
    itl_s: float | None = None
    attainment: float | None = None
    attainment_low: float | None = None
    attainment_high: float | None = None
    goodput: float | None = None
    output_rate: float | None = None
    meets: Literal["yes", "no", "unsure", ""] = ""
    problems: tuple[str, ...] = ()
    failure: str = ""
    took_s: float = 0.0
    reused: bool = False

    def keeps(self, sla: Sla) -> bool:
        """Whether what was measured is within the SLA: TTFT and ITL each at the percentile."""
        if self.failure or self.ttft_s is None:
            return False
        pairs = ((sla.ttft_s, self.ttft_s), (sla.itl_s, self.itl_s))
        return all(wanted is None or value is None or value <= wanted for wanted, value in pairs)


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """A whole run. `estimate` is the choice before measuring, `choice` the one after all of it; `rounds` the
    splits that were confirmed, in turn. `verdict`: in one sentence, whether the SLA is kept, or what can be.

    `probes` were sent now, `reused` came from the journal. `unmeasured`: what the budget left open.
    `at`: Unix time of its begin.
    """

    run_id: str
    name: str
    model: str
    backend: str
    at: float
    took_s: float
    budget_s: float
    estimate: Choice
    choice: Choice
    layouts: tuple[LayoutRun, ...]
    rounds: tuple[Confirmed, ...] = ()
    verdict: str = ""
    probes: int = 0
    reused: int = 0
    gpu_s: float = 0.0
    unmeasured: tuple[str, ...] = ()
    version: int = VERSION


def encode(measurement: Measurement) -> bytes:
    """The stored form: JSON for people too."""
    return msgspec.json.format(msgspec.json.encode(measurement), indent=1) + b"\n"


def load(path: Path) -> Measurement:
    """What is in the file. Raises CodecError."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Measurement)
    except OSError as error:
        raise CodecError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except msgspec.MsgspecError as error:
        raise CodecError(f"not what dynctl profile measured: {error}", where=str(path)) from error
    if found.version != VERSION:
        raise CodecError(f"version {found.version} is not {VERSION}", where=str(path))
    return found
