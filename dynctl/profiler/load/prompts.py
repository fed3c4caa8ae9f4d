"""What requests say. Pure: a request's words depend on the load's seed and its own number alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec

from dynctl.profiler.load.spec import Lengths, Load, Replay
from dynctl.profiler.load.words import Words

_KEPT_BLOCKS = 20_000


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to be made: what the user adds, how many prompt tokens that is, and tokens wanted back."""

    text: str
    input_tokens: int
    output_tokens: int


class Prompts:
    """The requests of a load, each by its number (and the turn of its conversation)."""

    def __init__(self, load: Load, words: Words) -> None:
        self._load = load
        self._words = words
        self._prefix = lru_cache(maxsize=None)(self._make_prefix)
        self._block = lru_cache(maxsize=_KEPT_BLOCKS)(self._make_block)

    def ask(self, number: int, turn: int = 0) -> Ask:
        """The request of that number."""
        if isinstance(self._load.arrivals, Replay):
            return self._replayed(self._load.arrivals, number)
        load, words = self._load, self._words
        rng = random.Random(f"{load.seed}/{number}/{turn}")
        tokens, wanted = _drawn(load.isl, rng), _drawn(load.osl, rng)
        count = words.count_for(tokens) if turn == 0 else max(1, round(tokens / words.per_word))
        begin = ""
        if load.shared_tokens and turn == 0:
            begin = self._prefix(rng.randrange(load.prefixes))
            count = max(1, count - round(load.shared_tokens / words.per_word))
        return Ask(begin + self._say(rng, count), tokens, wanted)

    def _replayed(self, replay: Replay, number: int) -> Ask:
        """A prompt of a trace: equal block ids are equal words, the last block as long as is needed."""
        request, words = replay.requests[number], self._words
        size = round(replay.block_tokens / words.per_word)
        left = words.count_for(request.prompt_tokens)
        said = []
        for block in request.blocks:
            if left < size:
                break
            said.append(self._block(block, size))
            left -= size
        if left:
            last = request.blocks[len(said)] if len(said) < len(request.blocks) else f"own/{number}"
            said.append(self._say(random.Random(f"{self._load.seed}/block/{last}"), left))
        return Ask("".join(said), request.prompt_tokens, request.output_tokens)

    def _make_block(self, block: int, size: int) -> str:
        return self._say(random.Random(f"{self._load.seed}/block/{block}"), size)

    def _make_prefix(self, which: int) -> str:
        count = round(self._load.shared_tokens / self._words.per_word)
        return self._say(random.Random(f"{self._load.seed}/prefix/{which}"), count)

    def _say(self, rng: random.Random, count: int) -> str:
        return " " + " ".join(rng.choices(self._words.words, k=count))


def body(load: Load, model: str, said: Sequence[str], output_tokens: int) -> bytes:
    """The request that carries a conversation: what the user and the model said in turn, the user last."""
    asked: dict[str, Any] = {
        "model": model,
        "max_tokens": output_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if load.ignore_eos:
        asked["ignore_eos"] = True
    if load.api == "chat":
        roles = ("user", "assistant")
        asked["messages"] = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
    else:
        asked["prompt"] = "".join(said)
    return msgspec.json.encode(asked)


def _drawn(lengths: Lengths, rng: random.Random) -> int:
    factor = rng.uniform(1 - lengths.spread, 1 + lengths.spread) if lengths.spread else 1.0
    return max(1, round(lengths.tokens * factor))
