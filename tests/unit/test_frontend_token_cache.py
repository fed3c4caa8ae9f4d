from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from dynctl.frontend.prompt.cuts import ANY, Cuts, cuts_of
from dynctl.frontend.prompt.patterns import keeps_apart
from dynctl.frontend.prompt.token_cache import Frame, TokenCache
from dynctl.frontend.prompt.words import Words
from dynctl.kv.hashing import pack_tokens, root_hash, sequence_hashes
from dynctl.native import load
from tests.make_tiny_tokenizer import CORPUS
from tests.tokenizers_zoo import CL100K, CUT_AT_WORDS, DEEPSEEK, MARKS, O200K, ZOO, made

Make = Callable[[], Tokenizer]
FRAME = Frame(4, root_hash())
WORDS = CORPUS.read_text(encoding="utf-8").split()
ODD = [
    " ", "  ", "   ", "\n", "\n\n", "\t", " \n ", "\u00a0", "\u3000", "\u200d", "\x00", "\r\n",
    "'s", "'LL", "3", "12345", "...", "?!\n", "<", "<|", "|>", "<|im_", "x" * 30, "▁", "Ġ",
    "<mask>", "[tool]", " [tool]  ", "the frontend", "worker",
    "é", "e\u0301", "\u0301", "\u037a", "\ufb01", "\uff21", "İ", "ß", "²", "Größe",
    "привет", "мир", "你好", "世界。", "🙂", "🏳️‍🌈",
]  # fmt: skip
PARTS = st.one_of(
    st.sampled_from(sorted(set(WORDS))[:200]),
    st.sampled_from([*MARKS, *ODD]),
    st.text(max_size=6),
)  # fmt: skip
TEXTS = st.lists(st.one_of(PARTS, PARTS.map(lambda part: " " + part)), max_size=40).map("".join)


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def cache_of(tokenizer: Tokenizer, least_chars: int, capacity_bytes: int = 1 << 24) -> TokenCache:
    return TokenCache(
        lambda texts: [ids(tokenizer, text) for text in texts],
        cuts_of(tokenizer.to_str().encode(), least_chars),
        capacity_bytes,
    )


def tokens_in_pieces(tokenizer: Tokenizer, cuts: Cuts, text: str) -> list[int]:
    found: list[int] = []
    at = 0
    while at < len(text):
        end = cuts.next(text, at)
        assert end > at
        found += ids(tokenizer, text[at:end])
        at = end
    return found


@pytest.mark.parametrize("make", ZOO, ids=lambda make: make.__name__)
@settings(max_examples=250, deadline=None)
@given(text=TEXTS, least=st.integers(2, 12))
def test_pieces_have_the_tokens_of_the_whole(make: Make, text: str, least: int) -> None:
    tokenizer = made(make)
    cuts = cuts_of(tokenizer.to_str().encode(), least)
    assert tokens_in_pieces(tokenizer, cuts, text) == ids(tokenizer, text)


@pytest.mark.parametrize("make", ZOO, ids=lambda make: make.__name__)
@settings(max_examples=100, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4), most=st.sampled_from([0, 3, 1000]))
def test_texts_put_together_from_known_words_have_the_tokens_of_the_whole(
    make: Make, texts: list[str], most: int
) -> None:
    tokenizer = made(make)
    cuts = cuts_of(tokenizer.to_str().encode())
    assert bool(cuts.before) == (make.__name__ in CUT_AT_WORDS)
    if cuts.before:
        for compiled in (load.compiled, None):
            with patch.object(load, "compiled", compiled):
                words = Words(lambda texts: [ids(tokenizer, text) for text in texts], cuts, most)
                for _ in range(2):
                    wanted = [pack_tokens(ids(tokenizer, text)) for text in texts]
                    joined = words.join(texts)
                    assert [one or two for one, two in zip(joined, wanted, strict=True)] == wanted
                    assert words.tokens(texts) == wanted


def test_known_words_are_not_put_together_at_a_space_that_is_no_place_to_cut() -> None:
    numbers: dict[str, int] = {}

    def tokenise(texts: list[str]) -> list[list[int]]:
        """A run of white space is one token with the word after it."""
        found = [re.findall(r"\s*\S+|\s+", text) for text in texts]
        return [[numbers.setdefault(one, len(numbers)) for one in words] for words in found]

    words = Words(tokenise, Cuts(before=ANY))
    for text in ("the end ", "the end\n", "a b\t", "the end  a b", "the end\n b", "the  end a", " end  b "):
        for _ in range(2):
            wanted = pack_tokens(tokenise([text])[0])
            assert words.join([text]) in ([wanted], [None]), repr(text)
            assert words.tokens([text]) == [wanted], repr(text)


def spaces_written_out() -> Tokenizer:
    """Two spaces in a row are one token, as published vocabularies have them."""
    vocabulary = {token: number for number, token in enumerate(("<unk>", "▁", "▁▁", "a", "b", "▁b"))}
    model = models.BPE(vocabulary, [("▁", "▁"), ("▁", "b")], unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    return tokenizer


def control_characters_with_spaces() -> Tokenizer:
    """A vocabulary that holds a space after NUL and after DEL."""
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĀĠ", "ġĠ"]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ā", "Ġ"), ("ġ", "Ġ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return tokenizer


@pytest.mark.parametrize("make", [spaces_written_out, control_characters_with_spaces])
@pytest.mark.parametrize("text", ["a▁ b", "a▁▁ b é b", "a\x00 b", "a\x7f b \x00", "é\x7f b a"])
def test_a_space_is_not_cut_from_a_character_it_is_merged_with(
    make: Callable[[], Tokenizer], text: str
) -> None:
    tokenizer = make()
    cuts = cuts_of(tokenizer.to_str().encode(), 2)
    assert cuts.before
    assert tokens_in_pieces(tokenizer, cuts, text) == ids(tokenizer, text)
    words = Words(lambda texts: [ids(tokenizer, text) for text in texts], cuts)
    for _ in range(2):
        assert words.tokens([text]) == [pack_tokens(ids(tokenizer, text))]
        assert words.join([text]) == words.tokens([text])


@pytest.mark.parametrize("make", ZOO, ids=lambda make: make.__name__)
def test_prose_is_cut_between_words_where_that_can_be_shown_to_be_safe(make: Make) -> None:
    tokenizer = made(make)
    cuts = cuts_of(tokenizer.to_str().encode(), 8)
    prose = " ".join(word for word in WORDS if word.isalpha())[:2000]
    assert (cuts.next(prose, 0) < 30) == (make.__name__ in CUT_AT_WORDS)
    assert tokens_in_pieces(tokenizer, cuts, prose) == ids(tokenizer, prose)


@settings(max_examples=200, deadline=None)
@given(text=st.text("ab <|é", max_size=60), least=st.integers(2, 5), window=st.integers(1, 9))
def test_a_place_is_found_wherever_a_window_ends(text: str, least: int, window: int) -> None:
    text, cuts = text + "the end", Cuts(("<|", "éb"), least, ANY)
    whole = cuts.next(text, 0)
    with patch("dynctl.frontend.prompt.cuts._WINDOW_CHARS", window):
        assert cuts.next(text, 0) == whole
    places = [found.start() for found in re.finditer(r"<\||éb|(?<=\S) ", text)]
    assert whole == next((place for place in places if least - 1 <= place), len(text))


@pytest.mark.parametrize("make", ZOO[:-1], ids=lambda make: make.__name__)
def test_chats_are_cut_at_special_tokens(make: Make) -> None:
    cuts = cuts_of(made(make).to_str().encode(), 8)
    text = "1234567890<|im_end|>1234567890"
    # A token that takes the spaces before it makes all that begin as it does unfit.
    assert cuts.next(text, 0) == (len(text) if make.__name__ == "odd_added_tokens" else 10)


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(st.tuples(st.integers(0, 40), TEXTS), min_size=2, max_size=8),
    capacity=st.sampled_from([0, 3000, 1 << 24]),
    size=st.integers(1, 5),
)
def test_cached_tokens_and_hashes_are_those_of_the_uncached_text(
    texts: list[tuple[int, str]], capacity: int, size: int
) -> None:
    tokenizer = made(ZOO[0])
    cache = cache_of(tokenizer, 5, capacity)
    last = ""
    for kept, text in texts:
        last = last[:kept] + text
        frames = [
            Frame(size, root_hash()),
            Frame(size + 1, root_hash("adapter")),
            Frame(size, root_hash(), pack_tokens([1, 2]), pack_tokens([3])),
        ]
        for frame, around in zip(frames, (((), ()), ((), ()), ((1, 2), (3,))), strict=True):
            found = cache.complete(cache.begin(last), frame)
            whole = [*around[0], *ids(tokenizer, last), *around[1]]
            assert found.tokens == len(whole)
            assert found.hashes == sequence_hashes(whole, frame.block_size, frame.root)
        assert cache.size_bytes <= capacity


def test_a_shared_prefix_is_tokenised_once() -> None:
    tokenizer = made(ZOO[0])
    cache = cache_of(tokenizer, 64)
    shared = " ".join(WORDS[:600])
    first = cache.complete(cache.begin(shared + " alpha beta"), FRAME)
    second = cache.complete(cache.begin(shared + " gamma delta"), FRAME)
    assert first.cached == 0
    assert second.cached > 0.95 * second.tokens
    assert cache.complete(cache.begin(shared + " alpha beta"), FRAME).cached == first.tokens


def test_the_longest_unused_go_first_and_memory_stays_bounded() -> None:
    cache = cache_of(made(ZOO[0]), 32, capacity_bytes=60_000)
    rng = random.Random(1)
    hot = " ".join(rng.choices(WORDS, k=60))
    for _ in range(200):
        assert cache.size_bytes <= 60_000
        cache.complete(cache.begin(hot), FRAME)
        cache.complete(cache.begin(" ".join(rng.choices(WORDS, k=60))), FRAME)
    assert not cache.begin(hot).pieces
    assert len(cache) < 100


@pytest.mark.parametrize("block_size", [1, 16])
def test_hashes_of_small_blocks_are_part_of_the_memory(block_size: int) -> None:
    rng = random.Random(2)
    cache, frame = cache_of(made(ZOO[0]), 512, 100_000), Frame(block_size, root_hash())
    for _ in range(40):
        cache.complete(cache.begin(" ".join(rng.choices(WORDS, k=400))), frame)
    hashes = sum(len(node.chain[1]) for node in cache._nodes.values() if node.chain is not None)
    assert 0 < hashes * sys.getsizeof(1 << 63) <= cache.size_bytes <= 100_000


def test_threads_get_the_same_hashes() -> None:
    tokenizer = made(ZOO[0])
    cache = cache_of(tokenizer, 16, capacity_bytes=200_000)
    rng = random.Random(2)
    shared = " ".join(WORDS[:100])
    texts = [f"{shared} {' '.join(rng.choices(WORDS, k=30))}" for _ in range(200)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda text: cache.complete(cache.begin(text), FRAME), texts))
    for text, one in zip(texts, found, strict=True):
        assert one.hashes == sequence_hashes(ids(tokenizer, text), FRAME.block_size, FRAME.root)


@pytest.mark.parametrize("pattern", [CL100K, O200K, DEEPSEEK, r"\p{N}{1,3}(?=(\d{3})+(?!\d))", "[一-龥]+"])
def test_patterns_of_published_tokenizers_keep_words_apart(pattern: str) -> None:
    assert keeps_apart(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        r"\w+ \w+", ".+", r"[^\n]+", r"\p{L}+\s*", r"(\p{L}| )+", r"\S+\s?",  # hold a letter and a space
        r"\p{L}+(?=\s)", r"\p{L}+$", r"\p{L}+(?! )", r"a\b", r"(?<=x)y", r"^x",  # look around
        r"[\p{L}&&[a-z]]", r"\p{Cyrillic}", r"[[:alpha:]]", r"a{x}", "(a", "[a",  # not read
        r"\p{L", r"\1", "a)", r"\pL",
    ],
)  # fmt: skip
def test_patterns_that_may_cross_a_space_or_are_not_understood_are_not_trusted(pattern: str) -> None:
    assert not keeps_apart(pattern)


@pytest.mark.parametrize("layout", [b"", b"[]", b'{"model":{"type":"BPE","dropout":0.1}}', b"{}"])
def test_an_unknown_layout_is_never_cut(layout: bytes) -> None:
    text = "some words of prose " * 100
    assert cuts_of(layout, 4).next(text, 0) == len(text)
