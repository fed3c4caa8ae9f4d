"""What images look like in prompts: which tokens stand for each, learnt from the engines' KV events. Pure.

Only an engine's own processor knows how many tokens an image becomes. Its events show them: a block's tokens,
and which media begin where in it. So once an engine has computed an image, other prompts with it can be put
together token for token. A wrong guess of where it ends costs hits and never makes one: hashes would differ.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from dynctl.kv.hashing import extra_bytes
from dynctl.protocol.kv_events import EngineHash, EngineStored, Runs, Shown

MOST_KNOWN = 65_536
"""Images whose tokens are remembered; those learnt longest ago are forgotten first."""
_MOST_SEEN = 4_096
_MOST_BEGUN = 256


class Layouts:
    """The tokens of each image known by its name, as runs of (token, how often)."""

    def __init__(self, most: int = MOST_KNOWN) -> None:
        self._most = most
        self._known: OrderedDict[str, Runs] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def learn(self, shown: Shown) -> bool:
        """Take over what an engine has shown. Returns whether it is new."""
        new = self._known.get(shown.name) != shown.runs
        self._known[shown.name] = shown.runs
        self._known.move_to_end(shown.name)
        if len(self._known) > self._most:
            self._known.popitem(last=False)
        return new

    def get(self, name: str) -> Runs | None:
        """The tokens of an image; None = no engine has shown it."""
        return self._known.get(name)

    def all(self) -> list[Shown]:
        """All that is known, oldest first."""
        return [Shown(name, runs) for name, runs in self._known.items()]


@dataclass(slots=True)
class Sightings:
    """Puts images together from the blocks of one engine's events, which tell of them piece by piece."""

    known: Layouts = field(default_factory=lambda: Layouts(_MOST_SEEN))
    _new: list[Shown] = field(default_factory=list)
    _begun: OrderedDict[str, list[int]] = field(default_factory=OrderedDict)
    _to_go_on: tuple[EngineHash, str] | None = None

    def take(self) -> list[Shown]:
        """The images that have come to be known since the last call."""
        new, self._new = self._new, []
        return new

    def feed(self, event: EngineStored) -> None:
        """Look at blocks that the engine has stored."""
        if not event.shown and self._to_go_on is None:
            return
        size = event.block_size
        shown = event.shown or [[] for _ in event.block_hashes]
        before, open_ = self._to_go_on or (None, "")
        last = open_ if before is not None and event.parent == before else ""
        for number, media in enumerate(shown):
            names = [name for name, _ in media]
            if last and last not in names:
                self._ended(last)
            tokens = event.token_ids[number * size : (number + 1) * size]
            last = ""
            ends = [at for _, at in media[1:]] + [size] * bool(media)
            for (name, offset), end in zip(media, ends, strict=True):
                if self._goes_on(name, max(0, -offset), tokens[max(0, offset) : end], whole=end < size):
                    last = name
        self._to_go_on = (event.block_hashes[-1], last) if last else None

    def _goes_on(self, name: str, start: int, tokens: list[int], *, whole: bool) -> bool:
        """Take a part of an image, from its token `start` on. Returns whether the next block may go on."""
        row = self._begun.setdefault(name, [])
        if start > len(row) or not tokens:
            del self._begun[name]
            return False
        row[start:] = tokens
        while len(self._begun) > _MOST_BEGUN:
            self._begun.popitem(last=False)
        if whole:
            self._ended(name)
        elif row[-1] != _commonest(row):
            self._tell(name, row)
        return not whole

    def _ended(self, name: str) -> None:
        """All of it is there, and perhaps some of the text after it."""
        row = self._begun.pop(name, [])
        if row:
            self._tell(name, row)

    def _tell(self, name: str, row: Sequence[int]) -> None:
        """It ends, as it looks, with the last of the tokens that it mostly consists of."""
        common = _commonest(row)
        end = max(at for at, token in enumerate(row, 1) if token == common)
        shown = Shown(name, [(token, len(list(same))) for token, same in groupby(row[:end])])
        if self.known.learn(shown):
            self._new.append(shown)


@dataclass(frozen=True, slots=True)
class Span:
    """An image in a prompt: its name, and which tokens are its own."""

    name: str
    start: int
    end: int


def put_in(
    tokens: Sequence[int], places: Sequence[int], images: Sequence[tuple[str, Runs]]
) -> tuple[list[int], list[Span]]:
    """`tokens` with an image's tokens in place of each one at `places` (rising), and where they are then."""
    out: list[int] = []
    spans: list[Span] = []
    at = 0
    for place, (name, runs) in zip(places, images, strict=True):
        out += tokens[at:place]
        start = len(out)
        for token, count in runs:
            out += [token] * count
        spans.append(Span(name, start, len(out)))
        at = place + 1
    out += tokens[at:]
    return out, spans


def extras_of(spans: Sequence[Span], blocks: int, block_size: int) -> list[bytes]:
    """For each block what its hash depends on beside its tokens (`kv.hashing.extra_bytes`)."""
    keys: list[list[tuple[str, int]]] = [[] for _ in range(blocks)]
    for span in spans:
        for number in range(span.start // block_size, min(blocks, -(-span.end // block_size))):
            keys[number].append((span.name, span.start - number * block_size))
    return [extra_bytes(media) if media else b"" for media in keys]


def _commonest(row: Sequence[int]) -> int:
    return Counter(row).most_common(1)[0][0]
