"""What a load's requests say: their length in tokens, what they share, and that a seed is kept."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from tokenizers import Tokenizer

from dynctl.errors import ProfileError
from dynctl.hub import ASSETS
from dynctl.perfmodel.trace import TraceRequest
from dynctl.profiler.load.prompts import Prompts, body
from dynctl.profiler.load.spec import Closed, Lengths, Load, Replay
from dynctl.profiler.load.words import COMMON, Words, words_of

TINY = ASSETS / "tiny"
EXACT = words_of(TINY)
LOAD = Load(
    arrivals=Closed(concurrency=1), requests=9, isl=Lengths(tokens=200), osl=Lengths(tokens=30), seed=1
)


def tokens(text: str) -> list[int]:
    ids: list[int] = Tokenizer.from_file(str(TINY / "tokenizer.json")).encode(text).ids
    return ids


def trace(*requests: tuple[int, tuple[int, ...]]) -> Load:
    made = tuple(
        TraceRequest(at_s=0, prompt_tokens=size, output_tokens=5, blocks=ids) for size, ids in requests
    )
    return Load(arrivals=Replay(requests=made), seed=1)


def test_prompts_have_exactly_as_many_tokens_as_asked_for() -> None:
    prompts = Prompts(LOAD, EXACT)
    assert {len(tokens(prompts.ask(number).text)) for number in range(20)} == {200}


def test_a_seed_gives_the_same_prompts_in_any_order() -> None:
    one, two = Prompts(LOAD, EXACT), Prompts(LOAD, EXACT)
    assert [one.ask(n) for n in range(5)] == [two.ask(n) for n in reversed(range(5))][::-1]
    other = Prompts(msgspec.structs.replace(LOAD, seed=2), EXACT)
    assert one.ask(0) != other.ask(0)


def test_prompts_share_no_beginning_by_accident() -> None:
    prompts = Prompts(LOAD, EXACT)
    assert len({tuple(prompts.ask(n).text.split()[:3]) for n in range(200)}) == 200


def test_lengths_spread_evenly_around_what_was_asked() -> None:
    wide = msgspec.structs.replace(
        LOAD, isl=Lengths(tokens=200, spread=0.5), osl=Lengths(tokens=10, spread=1.0)
    )
    asks = [Prompts(wide, EXACT).ask(n) for n in range(400)]
    sizes = [ask.input_tokens for ask in asks]
    assert 100 <= min(sizes) < 110
    assert 290 < max(sizes) <= 300
    assert sum(sizes) / len(sizes) == pytest.approx(200, rel=0.05)
    assert min(ask.output_tokens for ask in asks) >= 1
    assert all(len(ask.text.split()) == ask.input_tokens for ask in asks)


def test_shared_beginnings_are_as_many_and_as_long_as_asked_for() -> None:
    shared = msgspec.structs.replace(LOAD, shared_tokens=150, prefixes=3)
    said = [Prompts(shared, EXACT).ask(n).text.split() for n in range(60)]
    assert {len(words) for words in said} == {200}
    assert len({tuple(words[:150]) for words in said}) == 3
    assert len({tuple(words[:151]) for words in said}) > 40


def test_what_the_server_adds_is_left_out_of_the_prompt() -> None:
    assert EXACT.fitted((16, 36), (272, 292)).around == 20
    prompts = Prompts(LOAD, EXACT.fitted((16, 36), (272, 292)))
    assert len(tokens(prompts.ask(0).text)) == 180


def test_words_of_no_known_tokenizer_are_fitted_to_what_the_server_counts() -> None:
    words = COMMON.fitted((100, 130), (300, 370))
    assert words.per_word == pytest.approx(1.2)
    assert words.count_for(250) == 200
    assert not words.exact


def test_a_server_that_counts_nonsense_is_told_of() -> None:
    with pytest.raises(ProfileError, match="cannot be right"):
        COMMON.fitted((16, 40), (272, 40))


def test_equal_blocks_of_a_trace_are_equal_words_and_others_are_not() -> None:
    load = trace((1100, (1, 2, 3)), (1300, (1, 2, 9)), (512, (7,)), (300, (1,)))
    said = [Prompts(load, EXACT).ask(n).text.split() for n in range(4)]
    assert [len(words) for words in said] == [1100, 1300, 512, 300]
    assert said[0][:1024] == said[1][:1024]
    assert said[0][1024:1034] != said[1][1024:1034]
    assert said[2][:10] != said[0][:10]
    assert said[3] == said[0][:300]


def test_a_trace_without_blocks_shares_nothing() -> None:
    said = [Prompts(trace((50, ()), (50, ())), EXACT).ask(n).text for n in range(2)]
    assert said[0] != said[1]


def test_a_body_is_what_the_api_takes() -> None:
    chat = json.loads(body(LOAD, "m", ["a", "b", "c"], 7))
    assert chat["messages"] == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert (chat["max_tokens"], chat["stream_options"], chat["ignore_eos"]) == (
        7,
        {"include_usage": True},
        True,
    )
    plain = msgspec.structs.replace(LOAD, api="completions", ignore_eos=False)
    assert json.loads(body(plain, "m", ["a", "b"], 7))["prompt"] == "ab"
    assert "ignore_eos" not in json.loads(body(plain, "m", ["a"], 7))


def test_a_tokenizer_that_is_none_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"no tokenizer\.json"):
        words_of(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ProfileError, match="not a tokenizer"):
        words_of(tmp_path)


def test_a_vocabulary_without_words_cannot_be_used(tmp_path: Path) -> None:
    whole = json.loads((TINY / "tokenizer.json").read_text())
    whole["model"]["merges"] = []
    whole["model"]["vocab"] = {token: n for token, n in whole["model"]["vocab"].items() if len(token) == 1}
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(ProfileError, match="too few"):
        words_of(tmp_path)


def test_words_count_at_least_one() -> None:
    assert Words(("a",), around=50).count_for(10) == 1
