"""The mocker's metrics as Prometheus text, under vLLM's names with labels `model_name` and `engine` (rank).

Written by hand rather than with a client library: a value is read where it lives, nothing is counted twice,
and the process starts without importing one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Final

_SECONDS: Final = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_LONG: Final = (
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    480.0,
)
_TOKEN: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)


class Histogram:
    """Counts by upper bound."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, `times` times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def lines(self, name: str, labels: str) -> Iterable[str]:
        """The samples of one label set."""
        total = 0
        for bound, count in zip(self._bounds, self._counts, strict=False):
            total += count
            yield f'{name}_bucket{{{labels},le="{bound}"}} {total}'
        total += self._counts[-1]
        yield f'{name}_bucket{{{labels},le="+Inf"}} {total}'
        yield f"{name}_count{{{labels}}} {total}"
        yield f"{name}_sum{{{labels}}} {self._sum:.9g}"


class Latencies:
    """The histograms of one rank, in seconds of the wall clock."""

    def __init__(self) -> None:
        self.ttft = Histogram(_SECONDS)
        self.itl = Histogram(_TOKEN)
        self.e2e = Histogram(_LONG)
        self.queue = Histogram(_LONG)
        self.prefill = Histogram(_LONG)
        self.decode = Histogram(_LONG)

    def named(self) -> Mapping[str, Histogram]:
        """Metric name → histogram."""
        return {
            "vllm:time_to_first_token_seconds": self.ttft,
            "vllm:inter_token_latency_seconds": self.itl,
            "vllm:e2e_request_latency_seconds": self.e2e,
            "vllm:request_queue_time_seconds": self.queue,
            "vllm:request_prefill_time_seconds": self.prefill,
            "vllm:request_decode_time_seconds": self.decode,
        }


class Page:
    """Builds the text: a metric's lines stay together, its TYPE once."""

    def __init__(self) -> None:
        self._families: dict[str, list[str]] = {}

    def value(self, kind: str, name: str, labels: str, value: float) -> None:
        """One sample of a "gauge", or of a "counter" whose `name` ends in _total."""
        self._family(kind, name).append(f"{name}{{{labels}}} {value:.10g}")

    def histogram(self, name: str, labels: str, histogram: Histogram) -> None:
        """All samples of a histogram."""
        self._family("histogram", name).extend(histogram.lines(name, labels))

    def text(self) -> bytes:
        """The page."""
        return "".join(f"{line}\n" for lines in self._families.values() for line in lines).encode()

    def _family(self, kind: str, name: str) -> list[str]:
        return self._families.setdefault(name, [f"# TYPE {name} {kind}"])


def escape(value: str) -> str:
    """A label's value as it stands between quotes."""
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
