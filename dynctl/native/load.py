"""The compiled steps of the relay, where they were compiled and can be loaded; else why not.

Each has its like in Python, which does the same. Whoever needs one asks `compiled` at that moment. They are
compiled when dynctl is installed with a C compiler and Python's headers at hand (`hatch_build.py`); a module
of another machine, or of another state of its source, is passed over.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol, cast

OFF: Final = "DYNCTL_COMPILED"
"""Environment variable: "0" = Python only."""
SOURCE: Final = Path(__file__).parent / "relay.c"
MODULE: Final = "_relay.abi3.so"
FAILED: Final = "_failed.txt"
"""Beside it: the module, or why it could not be compiled."""

Feed = Callable[[bytes], object]


class Writer(Protocol):
    """See `http.direct.writer`."""

    def write(self, data: bytes) -> None: ...


class Taker(Protocol):
    """What a tap needs of its connection. `body_received` may take any piece, `between_chunks` tells after it
    whether the next byte of a chunked body begins a chunk. `taking_failed`: a taker of bytes has raised.
    """

    def body_received(self, data: bytes) -> None: ...

    def between_chunks(self) -> bool: ...

    def reading_ended(self) -> None: ...

    def reading_failed(self, error: OSError) -> None: ...

    def taking_failed(self, error: Exception) -> None: ...


class Tap(Protocol):
    """See `http.direct.PythonTap`."""

    feed: Feed | None
    active: bool
    heard: bool

    def begin(self, feed: Feed | None) -> None: ...

    def readable(self) -> None: ...


class Compiled(Protocol):
    """The compiled module."""

    SOURCE: str

    def Writer(self, fileno: Callable[[], int], waiting: Callable[[], int], rest: Feed) -> Writer: ...

    def Tap(self, fileno: Callable[[], int], taker: Taker) -> Tap: ...

    Lane: Callable[..., object]


def digest(source: bytes) -> str:
    """What tells a compiled module which source it was made of."""
    return hashlib.sha256(source).hexdigest()[:16]


def _load() -> tuple[Compiled | None, str]:
    if os.environ.get(OFF) == "0":
        return None, f"{OFF}=0"
    try:
        module = importlib.import_module("dynctl.native._relay")
    except ModuleNotFoundError:
        failed = SOURCE.with_name(FAILED)
        why = failed.read_text("utf-8").strip() if failed.is_file() else "it was not compiled"
        return None, why
    except ImportError as error:
        return None, f"it cannot be loaded: {error}"
    found = cast(Compiled, module)
    if digest(SOURCE.read_bytes()) != found.SOURCE:
        return None, "compiled from another relay.c: install dynctl again"
    return found, ""


compiled, missing = _load()
"""The module, or None and the reason."""


def told() -> str:
    """In a few words, for people."""
    return "compiled" if compiled is not None else f"in Python ({missing})"
