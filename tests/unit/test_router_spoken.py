"""Tokens counted from a stream's events against those that were really made, over many tokenizers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders

from dynctl.frontend.prompt.preprocess import Preprocessor
from dynctl.frontend.prompt.vocabulary import known_tokens
from dynctl.observability.metrics import Metrics
from dynctl.protocol.instances import ModelCard
from dynctl.router.said import Said
from dynctl.router.spoken import Made, spoken_tokens
from tests.make_tiny_tokenizer import CORPUS
from tests.tokenizers_zoo import ZOO, made

UNLIKE = ("words_only", "gpt2_with_prefix_space", "compatibility_forms")
LIKE_REAL_ONES = [make for make in ZOO if make.__name__ not in UNLIKE]
"""Those that give back the text they were given."""
HALF = "\N{REPLACEMENT CHARACTER}"
STOP = "@@@@@@"
SAMPLES = 30


def counter(tokenizer: Tokenizer) -> Preprocessor:
    """A preprocessor with this tokenizer."""
    found = Preprocessor(ModelCard(name="m"), Metrics())
    found._tokenizer, found._is_token = tokenizer, known_tokens(tokenizer)
    return found


@cache
def speaking(make: Callable[[], Tokenizer]) -> Tokenizer:
    """The tokenizer with the decoder that published ones of its kind have."""
    tokenizer = Tokenizer.from_str(made(make).to_str())
    by_bytes = tokenizer.token_to_id("Ġ") is not None
    tokenizer.decoder = decoders.ByteLevel() if by_bytes else decoders.Metaspace()
    return tokenizer


@dataclass
class Stream:
    """An answer of so many tokens up to each place of its text, and what was told of it."""

    said: Said
    ends: list[int]

    def whole(self, chars: int) -> int:
        """How many tokens end within so many characters."""
        return max((number for number, end in enumerate(self.ends) if end <= chars), default=0)


def streamed(tokenizer: Tokenizer, ids: list[int], rng: Random, held: int, *, merges: bool) -> Stream:
    """Told as an engine does: no half characters, `held` characters late, several tokens if it `merges`."""
    said, ends, shown, number = Said(), [0], 0, 0
    text = ""
    for size in range(1, len(ids) + 1):
        now = tokenizer.decode(ids[:size])
        text = text if now.endswith(HALF) else now
        ends.append(len(text) if not now.endswith(HALF) else len(text) + 1)
    while number < len(ids):
        number += rng.choice([1, 1, 1, 2, 3]) if merges else 1
        now = tokenizer.decode(ids[:number])
        length = shown if now.endswith(HALF) else max(shown, len(now) - held)
        said.take({"choices": [{"index": 0, "text": now[shown:length], "finish_reason": None}]})
        shown = length
    return Stream(said, ends)


def natural(tokenizer: Tokenizer, rng: Random) -> list[int]:
    """Tokens as a trained model gives them."""
    text = CORPUS.read_text(encoding="utf-8") + " Größe 你好 \U0001f600 naïve\n\n"
    start = rng.randrange(len(text) - 200)
    ids: list[int] = tokenizer.encode(text[start : start + 200], add_special_tokens=False).ids
    return ids


def arbitrary(tokenizer: Tokenizer, rng: Random) -> list[int]:
    """Tokens as a model of random weights gives them: cut in no way a tokenizer would."""
    special = {"<unk>", *tokenizer.get_added_tokens_decoder()}
    ids = [rng.randrange(10, tokenizer.get_vocab_size()) for _ in range(60)]
    return [i for i in ids if i not in special and tokenizer.id_to_token(i) not in special]


def _broken_at(tokenizer: Tokenizer, ids: list[int]) -> int:
    """Where bytes are that will never be a character: no engine shows those alike."""
    return next(n for n in range(len(ids)) if HALF in tokenizer.decode(ids[: n + 1]).rstrip(HALF))


def errors(
    draw: Callable[[Tokenizer, Random], list[int]], held: int, *, merges: bool, trims: bool
) -> tuple[Counter[int], Counter[int]]:
    """How much more than was made was counted: by events, and by tokenising the text alone."""
    ours: Counter[int] = Counter()
    texts: Counter[int] = Counter()
    for make in LIKE_REAL_ONES:
        tokenizer = speaking(make)
        tokens = counter(tokenizer)
        for seed in range(SAMPLES):
            rng = Random(seed)
            ids = draw(tokenizer, rng)
            if HALF in tokenizer.decode(ids).rstrip(HALF):
                ids = ids[: _broken_at(tokenizer, ids)]
            ids = ids[: rng.randrange(1, len(ids) + 1)] if ids else ids
            stream = streamed(tokenizer, ids, rng, held, merges=merges)
            what = Made.plain(stream.said, trims=trims)
            truth = stream.whole(what.kept)
            ours[spoken_tokens(stream.said, what, held, tokens.count) - truth] += 1
            texts[len(tokens.encode(what.text[: what.kept]) or ()) - truth] += 1
    return ours, texts


def exact(found: Counter[int]) -> float:
    """The share of counts that were right."""
    return found[0] / found.total()


def off(found: Counter[int]) -> float:
    """By how many tokens counts were wrong, on average."""
    return sum(abs(error) * number for error, number in found.items()) / found.total()


@pytest.mark.parametrize("trims", [False, True])
@pytest.mark.parametrize(
    ("draw", "held", "least"),
    [(natural, 0, 0.98), (arbitrary, 0, 0.96), (natural, 5, 0.95), (arbitrary, 5, 0.8)],
)
def test_one_event_a_token_is_counted_nearly_exactly_whatever_the_tokenizer_would_have_made_of_the_text(
    draw: Any, held: int, least: float, trims: bool
) -> None:
    ours, texts = errors(draw, held, merges=False, trims=trims)
    assert exact(ours) >= least, ours
    assert off(ours) <= off(texts)
    assert off(ours) < 0.4


@pytest.mark.parametrize("trims", [False, True])
@pytest.mark.parametrize(("draw", "held"), [(natural, 0), (arbitrary, 0), (natural, 5), (arbitrary, 5)])
def test_several_tokens_in_an_event_are_counted_within_one_on_average(
    draw: Any, held: int, trims: bool
) -> None:
    ours, _ = errors(draw, held, merges=True, trims=trims)
    assert off(ours) < 0.85, ours


def one_each(text: str, start: int, end: int) -> int:
    return 1


def nobody(text: str, start: int, end: int) -> None:
    """There is no tokenizer."""


def told(*events: tuple[str, dict[str, Any]]) -> Said:
    said = Said()
    for text, more in events:
        said.take({"choices": [{"index": 0, "text": text, "finish_reason": None}], **more})
    return said


def count(said: Said, tokens: Any = nobody, window: int = 0, *, trims: bool = False) -> int:
    return spoken_tokens(said, Made.plain(said, trims=trims), window, tokens)


def test_usage_told_with_each_event_is_taken_as_far_as_text_was_told() -> None:
    usage = [{"usage": {"prompt_tokens": 4, "completion_tokens": made}} for made in (3, 5, 9)]
    assert count(told(("a", usage[0]), ("b", usage[1]), ("", usage[2]))) == 5
    assert count(told(("a", usage[0]), ("b ", usage[1]), (" ", usage[2])), trims=True) == 3
    assert count(told(("abc", usage[0]), ("d", usage[1]), ("efg", usage[2])), window=2) == 5


def test_without_a_tokenizer_an_event_is_a_token_also_one_that_shows_only_half_a_character() -> None:
    assert count(told(("a", {}), ("", {}), ("b", {}), ("", {}))) == 3


def test_a_leg_that_goes_on_is_counted_from_where_it_was_joined_on() -> None:
    said = told(("ab", {}), ("c", {}), (" ", {}))
    said.settle(3, count(said, trims=True))
    assert said.settled == (3, 2)
    said.beat()
    said.take({"choices": [{"index": 0, "text": "d", "finish_reason": None}]})
    assert count(said, one_each) == 4


def test_marks_of_reasoning_are_tokens_too() -> None:
    said = Said()
    for delta in ({"role": "assistant", "content": ""}, {"reasoning": "hm"}, {"content": "so"}):
        said.take({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
    whole = Made("<t>hm</t>so", 11, 3, 2, 4)
    words = lambda text, start, end: len(text[start:end].replace("<t>", ".").replace("</t>", ".")) // 2 + 1  # noqa: E731
    assert spoken_tokens(said, whole, 0, words) == 4
