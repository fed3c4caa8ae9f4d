"""From the words of a failure to the checks that may explain it."""

from __future__ import annotations

import pytest

from dynctl.doctor.checks import CHECKS
from dynctl.doctor.hints import _WORDS, KINDS, topics_of


@pytest.mark.parametrize(
    ("error", "first"),
    [
        ("OSError: [Errno 98] Address already in use", "ports"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "gpus"),
        ("ValueError: Free memory on device (3.1/79.2 GiB) on startup is less than desired", "gpus"),
        ("RuntimeError: No CUDA GPUs are available", "gpus"),
        ("OSError: [Errno 28] No space left on device: '/root/.cache/vllm'", "disk"),
        ("OSError: [Errno 24] Too many open files", "open files"),
        ("ibv_reg_mr failed: Cannot allocate memory", "rdma"),
        ("vllm: error: unrecognized arguments: --max-len 3", "engine"),
        ("ModuleNotFoundError: No module named 'vllm'", "engine"),
        ("OSError: /m does not appear to have a file named config.json", "model"),
        ("Bus error (core dumped)", "shm"),
        ("killed by SIGKILL", "gpus"),
        ("PermissionError: [Errno 13] Permission denied: '/models/x'", "model"),
    ],
)
def test_the_most_telling_check_comes_first(error: str, first: str) -> None:
    assert topics_of("exit", error)[0] == first


def test_the_kind_goes_before_the_words() -> None:
    assert topics_of("port_in_use", "out of memory") == ("ports", "gpus", "gpu use")


def test_a_failure_that_nothing_explains_asks_nothing() -> None:
    assert topics_of("exit", "KeyError: 'x'") == ()


def test_every_check_named_is_one() -> None:
    named = {topic for topics in KINDS.values() for topic in topics} | {t for _, ts in _WORDS for t in ts}
    assert named <= set(CHECKS)
