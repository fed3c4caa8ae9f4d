"""The mocker's language: tokens that survive being text, answers that go on where they were cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dynctl.errors import UsageError
from dynctl.mocker.tokens import BUILTIN, Vocabulary, max_positions

VOCABULARY = Vocabulary(BUILTIN)


def say(prompt: list[int], count: int, eos_every: int = 0) -> list[int]:
    source = VOCABULARY.source(prompt, eos_every)
    return [source.next(True) for _ in range(count)]


@pytest.mark.parametrize("text", ["hello", "Hello wor", "ends with a space ", "newline\n", "", "ünï 漢字 🙂"])
@pytest.mark.parametrize("cut", [1, 7, 30])
def test_an_answer_cut_anywhere_goes_on_the_same_from_its_text(text: str, cut: int) -> None:
    for opening in (f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n", f"say: {text}"):
        prompt = VOCABULARY.encode(opening)
        whole = say(prompt, 40)
        spoken = "".join(VOCABULARY.texts[token] for token in whole[:cut])
        again = VOCABULARY.encode(opening + spoken)
        assert again == prompt + whole[:cut]
        assert say(again, 40 - cut) == whole[cut:]
        assert VOCABULARY.decode(whole[:cut]) == spoken


def test_other_prompts_and_lost_tokens_give_other_answers() -> None:
    whole = say([10, 11, 12], 20)
    assert say([10, 11, 13], 20) != whole
    assert say([10, 11, 12, *whole[:3], *whole[4:6]], 10) != whole[6:16]


def test_answers_end_by_themselves_at_about_the_mean() -> None:
    lengths = []
    for number in range(200):
        source = VOCABULARY.source([number], 20)
        length = 1
        while source.next(True) != VOCABULARY.eos:
            length += 1
        lengths.append(length)
    assert 12 < sum(lengths) / len(lengths) < 30
    assert VOCABULARY.eos not in say([1], 200, 0)


def test_an_end_that_is_not_allowed_is_a_word() -> None:
    source = VOCABULARY.source([1], 1)
    assert source.next(False) in VOCABULARY.words
    assert source.next(True) == VOCABULARY.eos


def test_the_template_opens_and_resumes_turns() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " a b "}]
    assert VOCABULARY.render(messages[:1], generate=True, resume=False) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert VOCABULARY.render(messages, generate=False, resume=True).endswith("assistant\n a b ")
    silent = [{"role": "assistant", "content": None}]
    assert VOCABULARY.render(silent, generate=False, resume=False) == "<|im_start|>assistant\n<|im_end|>\n"


def model(tmp_path: Path, **files: str) -> Path:
    (tmp_path / "tokenizer.json").write_bytes((BUILTIN / "tokenizer.json").read_bytes())
    for name, text in files.items():
        (tmp_path / name.replace("__", ".")).write_text(text)
    return tmp_path


def test_a_template_may_stand_in_the_tokenizer_config_or_in_a_file_of_its_own(tmp_path: Path) -> None:
    config = {"chat_template": "{{ bos_token }}A", "bos_token": {"content": "<s>"}}
    directory = model(tmp_path, tokenizer_config__json=json.dumps(config))
    assert Vocabulary(directory).render([], generate=True, resume=False) == "<s>A"
    (tmp_path / "t.jinja").write_text("B")
    given = Vocabulary(directory, str(tmp_path / "t.jinja"))
    assert given.render([], generate=True, resume=False) == "B"
    assert given.eos == -1


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"tokenizer_config__json": "{"}, "not JSON"),
        ({"tokenizer_config__json": "[]"}, "object is needed"),
    ],
)
def test_a_broken_model_directory_is_named(tmp_path: Path, files: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        Vocabulary(model(tmp_path, **files))
    assert "tokenizer_config.json" in caught.value.where


def test_a_missing_tokenizer_or_template_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no tokenizer\.json"):
        Vocabulary(tmp_path)
    with pytest.raises(UsageError, match="cannot read the chat template"):
        Vocabulary(BUILTIN, str(tmp_path / "none.jinja"))


def test_a_vocabulary_without_words_is_refused(tmp_path: Path) -> None:
    tokenizer = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match="no whole lower-case words"):
        Vocabulary(tmp_path)


def test_the_context_length_comes_from_the_models_config(tmp_path: Path) -> None:
    assert max_positions(BUILTIN) == 8192
    assert max_positions(tmp_path) == 0
    (tmp_path / "config.json").write_text('{"max_position_embeddings": "many"}')
    assert max_positions(tmp_path) == 0
