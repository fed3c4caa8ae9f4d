"""The compiled steps of the hot path, where they were compiled and can be loaded; else why not.

Each has its like in Python, which does the same. Whoever needs one asks `compiled` at that moment. They are
compiled when dynctl is installed with a C compiler and Python's headers at hand (`hatch_build.py`); a module
of another machine, or of another state of its source, is passed over.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, Protocol, cast

OFF: Final = "DYNCTL_COMPILED"
"""Environment variable: "0" = Python only."""
FOLDER: Final = Path(__file__).parent
"""Where the C sources are, and beside them:"""
MODULE: Final = "_compiled.abi3.so"
FAILED: Final = "_failed.txt"
"""The module, or why it could not be compiled."""

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


class WordTable(Protocol):
    """See `frontend.prompt.words.PythonTable`."""

    def __len__(self) -> int: ...

    def learn(self, word: str, tokens: bytes) -> None: ...

    def join(self, text: str) -> bytes | None: ...


class Holders(Protocol):
    """See `kv.holders.PythonHolders`."""

    def __len__(self) -> int: ...

    def add(self, place: int, hashes: list[int], /) -> None: ...

    def discard(self, place: int, hashes: list[int], /) -> None: ...

    def count(self, place: int, /) -> int: ...

    def get(self, h: int, /) -> int: ...

    def evict(self, most: int, /) -> int: ...

    def touch(self, hashes: list[int], /) -> None: ...

    def clear(self, place: int, budget: int, /) -> int: ...

    def walk(self, hashes: list[int], alive: bytes, size: int, /) -> list[int]: ...


class Compiled(Protocol):
    """The compiled module."""

    SOURCE: str

    def Writer(self, fileno: Callable[[], int], waiting: Callable[[], int], rest: Feed) -> Writer: ...

    def Tap(self, fileno: Callable[[], int], taker: Taker) -> Tap: ...

    Lane: Callable[..., object]

    def WordTable(self, marks: tuple[bytes, ...], foreign: bool) -> WordTable: ...

    def Holders(self, seed: int) -> Holders: ...

    def walk(
        self,
        masks: dict[int, int],
        hashes: list[int],
        alive: int,
        found: list[int],
        shrinking: bool,
        places_of: Callable[[int], tuple[int, ...]],
    ) -> int: ...


def sources(folder: Path) -> list[Path]:
    """The C sources in a folder, headers among them, in order."""
    return sorted(folder.glob("*.[ch]"))


def digest(sources: Iterable[Path]) -> str:
    """What tells a compiled module which sources it was made of."""
    together = hashlib.sha256()
    for source in sources:
        together.update(hashlib.sha256(source.read_bytes()).digest())
    return together.hexdigest()[:16]


def _load() -> tuple[Compiled | None, str]:
    if os.environ.get(OFF) == "0":
        return None, f"{OFF}=0"
    try:
        module = importlib.import_module("dynctl.native._compiled")
    except ModuleNotFoundError:
        failed = FOLDER / FAILED
        why = failed.read_text("utf-8").strip() if failed.is_file() else "it was not compiled"
        return None, why
    except ImportError as error:
        return None, f"it cannot be loaded: {error}"
    found = cast(Compiled, module)
    if digest(sources(FOLDER)) != found.SOURCE:
        return None, "compiled from other sources: install dynctl again"
    return found, ""


compiled, missing = _load()
"""The module, or None and the reason."""


def told() -> str:
    """In a few words, for people."""
    return "compiled" if compiled is not None else f"in Python ({missing})"
