"""The table of words, in Python and compiled: a text is put together of known words, or not at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynctl.frontend.prompt.cuts import ANY, ASCII, Cuts
from dynctl.frontend.prompt.words import PythonTable, Words, splitter
from dynctl.kv.hashing import pack_tokens
from dynctl.native import load
from dynctl.native.load import WordTable

CUTS = Cuts(("<|im_end|>", "<|im_start|>", "[TOOL]", "«ü»"), before=ASCII)
ANYWHERE = Cuts(("<|", "é<"), before=ANY)
NESTED = Cuts(("<b", "<aé", "<a", "<aéb", "|b", "<мя"), before=ANY)
ODD = "ab <|é\n\t\x00\x1b\x1c\x7f\u0085\u00a0\u1680\u2003\u2028\u202f\u205f\u3000▁мя🙂"


def compiled(cuts: Cuts) -> WordTable:
    assert load.compiled is not None
    return load.compiled.WordTable(tuple(mark.encode() for mark in cuts.marks), cuts.before == ANY)


EACH = pytest.mark.parametrize("make", [PythonTable, pytest.param(compiled, marks=pytest.mark.compiled)])
Make = Callable[[Cuts], WordTable]


def learnt(make: Make, words: list[str], cuts: Cuts = CUTS) -> WordTable:
    table = make(cuts)
    for word in words:
        table.learn(word, f"{word};".encode())
    return table


@EACH
def test_known_words_are_joined(make: Make) -> None:
    table = learnt(make, ["the", " end", " of", "of"])
    assert table.join("the end of end") == b"the; end; of; end;"
    assert table.join(" of") == b" of;"
    assert table.join("") == b""
    assert len(table) == 4


@EACH
@pytest.mark.parametrize("text", ["the", "of the", "of  of", "of ", " ", "of\n", "OF", "o", "off", "\ud800"])
def test_a_text_with_an_unknown_word_is_not(make: Make, text: str) -> None:
    assert learnt(make, []).join(text) is None
    assert learnt(make, ["of", " of"]).join(text) is None


@EACH
def test_white_space_that_is_no_place_to_cut_is_part_of_a_word(make: Make) -> None:
    table = learnt(make, ["def", " f():\n    return", " x", "é b"])
    assert table.join("def f():\n    return x") == b"def; f():\n    return; x;"
    assert table.join("é b") == "é b;".encode()
    assert learnt(make, ["é", " b"]).join("é b") is None
    assert learnt(make, ["é", " b"], ANYWHERE).join("é b") == "é; b;".encode()


@EACH
def test_a_mark_begins_a_word_wherever_it_stands(make: Make) -> None:
    table = learnt(make, ["a", "<|im_end|>\n", "<|im_start|>user", "[TOOL]", " <", "«ü»x"])
    text = "a<|im_end|>\n<|im_start|>user[TOOL][TOOL] <«ü»x"
    wanted = "a;<|im_end|>\n;<|im_start|>user;[TOOL];[TOOL]; <;«ü»x;"
    assert table.join(text) == wanted.encode()
    assert table.join("a<|im_en") is None
    assert table.join("a<|") is None


@EACH
def test_a_word_learnt_twice_stays_as_it_was(make: Make) -> None:
    table = make(Cuts(before=ANY))
    table.learn("a", b"1")
    table.learn("a", b"2")
    assert table.join("a") == b"1"


@EACH
def test_a_word_of_no_tokens_adds_none(make: Make) -> None:
    table = make(Cuts(before=ANY))
    table.learn("a", b"")
    table.learn(" b", b"2")
    assert table.join("a") == b""
    assert table.join("a b b") == b"22"


@EACH
def test_thousands_of_words_are_told_apart(make: Make) -> None:
    words = [f" w{number}" for number in range(20_000)]
    table = learnt(make, words)
    assert len(table) == len(words)
    assert table.join("".join(reversed(words))) == "".join(f"{word};" for word in reversed(words)).encode()


def fnv(word: bytes) -> int:
    found = 0xCBF29CE484222325
    for byte in word:
        found = (found ^ byte) * 0x100000001B3 % 2**64
    return found ^ found >> 29 ^ found >> 47


@pytest.mark.compiled
def test_words_made_to_collide_are_not_kept_and_cost_no_more_than_others() -> None:
    table, every = compiled(Cuts(before=ANY)), 1 << 12
    chosen = [word for number in range(400_000) if fnv((word := f" {number}").encode()) % every == 7]
    for word in chosen:
        table.learn(word, word.encode())
    assert 32 <= len(table) < len(chosen)
    assert table.join(chosen[0]) == chosen[0].encode()
    assert table.join(chosen[-1]) is None


@pytest.mark.compiled
@pytest.mark.parametrize("cuts", [CUTS, ANYWHERE, NESTED])
@settings(max_examples=400, deadline=None)
@given(texts=st.lists(st.text(ODD, min_size=1, max_size=5), max_size=8), text=st.text(ODD, max_size=9))
def test_both_tables_cut_the_same(cuts: Cuts, texts: list[str], text: str) -> None:
    words = splitter(cuts)
    known = [word for one in texts for word in words(one)]
    for more in ([], words(text)):
        ours, theirs = learnt(PythonTable, [*known, *more], cuts), learnt(compiled, [*known, *more], cuts)
        for one in (text, "".join(texts), f"{texts} {text}"):
            assert ours.join(one) == theirs.join(one), one


@pytest.mark.compiled
@pytest.mark.timeout(20)
def test_thousands_of_marks_that_begin_alike_do_not_stall_who_looks_for_one() -> None:
    assert load.compiled is not None
    marks = [f"<unused{number}>" for number in range(50_000)]
    table = load.compiled.WordTable(tuple(mark.encode() for mark in marks), True)
    for mark in marks:
        table.learn(mark, mark.encode())
    text = "<u" * 50_000
    assert table.join(text) is None
    table.learn(text, b"long")
    assert table.join(f"{text}<unused49999>") == b"long<unused49999>"
    assert table.join("".join(marks)) == "".join(marks).encode()


@pytest.mark.compiled
def test_wrong_arguments_are_refused() -> None:
    assert load.compiled is not None
    make: Callable[..., WordTable] = load.compiled.WordTable
    for marks in ((b"x",), ("xy",), [b"xy"], (b"xy", 7)):
        with pytest.raises((TypeError, ValueError)):
            make(marks, False)
    table: WordTable = make((), True)
    with pytest.raises(TypeError):
        table.__init__((), True)  # type: ignore[misc]
    with pytest.raises(TypeError):
        table.join(b"bytes")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        table.learn("a", "b")  # type: ignore[arg-type]


def test_a_text_that_is_known_is_not_taken_for_the_beginning_of_a_longer_one() -> None:
    numbers: dict[str, int] = {}

    def tokenise(texts: list[str]) -> list[list[int]]:
        """An entry of the vocabulary goes over the space: `é b` is one token."""
        found = [text.replace("é b", "\0").split() for text in texts]
        return [[numbers.setdefault(one, len(numbers)) for one in words] for words in found]

    words = Words(tokenise, Cuts(before=ASCII))
    for known in ("é", "x", "x é", "x b", "é b", "x é b", "é b", "x é b"):
        wanted = pack_tokens(tokenise([known])[0])
        assert words.join([known]) in ([wanted], [None])
        assert words.tokens([known]) == [wanted]
