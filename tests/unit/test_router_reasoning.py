from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynctl.router.reasoning import Marks, Splitter, marks_of

PLAIN = {"<|im_end|>": True, "<tool_call>": False, "</tool_call>": False}


@pytest.mark.parametrize(
    ("opening", "closing"),
    [
        ("<think>", "</think>"),
        ("[THINK]", "[/THINK]"),
        ("<seed:think>", "</seed:think>"),
        ("◁think▷", "◁/think▷"),
        ("<|thinking|>", "<|/thinking|>"),
    ],
)
def test_marks_are_those_of_the_models_own_tokenizer_or_else_of_its_template(
    opening: str, closing: str
) -> None:
    added = {**PLAIN, opening: False, closing: True}
    assert marks_of(added, "") == Marks(opening, closing, True, ("<|im_end|>",))
    template = f"{{{{ '{opening}' + thoughts + '{closing}' }}}}"
    assert marks_of(PLAIN, template) == Marks(opening, closing, False, ("<|im_end|>",))


def test_no_marks_are_guessed() -> None:
    assert marks_of(PLAIN, "<|channel|>analysis<|message|>") is None
    assert marks_of({**PLAIN, "</think>": False}, "") is None
    assert marks_of({}, "{{ content.split('</think>')[-1] }}") is None
    two = {"<think>": False, "</think>": False, "<reasoning>": False, "</reasoning>": False}
    assert marks_of(two, "") is None
    assert marks_of(two, "<think></think>") == Marks("<think>", "</think>")


TEXT = "a < b </thin </think>\n\nso </think> <|im_end|>"
SPECIALS = ("<|im_end|>", "<|im")


@given(st.lists(st.integers(0, len(TEXT)), max_size=12), st.booleans())
def test_reasoning_ends_at_its_mark_wherever_the_text_is_cut(cuts: list[int], strips: bool) -> None:
    splitter = Splitter("</think>", SPECIALS if strips else ())
    places = [0, *sorted(cuts), len(TEXT)]
    told = [splitter.take(TEXT[start:end]) for start, end in pairwise(places)]
    told.append(splitter.rest())
    thoughts, texts = ("".join(parts) for parts in zip(*told, strict=True))
    assert thoughts == "a < b </thin "
    assert texts == "\n\nso </think> " + ("" if strips else "<|im_end|>")


def test_what_may_become_a_mark_waits_and_is_told_at_the_end() -> None:
    splitter = Splitter("</think>")
    assert splitter.take("hm</thi") == ("hm", "")
    assert splitter.rest() == ("</thi", "")
    assert splitter.take("<") == ("", "")
    assert splitter.take("x") == ("<x", "")
    assert splitter.take("</think>") == ("", "")
    assert splitter.take("</") == ("", "</")


def test_a_text_after_reasoning_is_left_alone() -> None:
    splitter = Splitter("")
    assert splitter.take("a</think>b<") == ("", "a</think>b<")
    assert splitter.rest() == ("", "")
