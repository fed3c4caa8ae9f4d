"""Tokenizers built like the published ones, each small: what a test of exact tokens must hold for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tests.make_tiny_tokenizer import ASSETS, CORPUS

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MARKS = ("<|begin|>", "<|im_start|>", "<|im_end|>", "<|im_end|>more")
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def _marks(**more: Any) -> list[AddedToken]:
    return [AddedToken(mark, special=True, normalized=False, **more) for mark in MARKS]


def _lines() -> list[str]:
    return [
        *CORPUS.read_text(encoding="utf-8").splitlines(keepends=True),
        "Größe Ünïcode привет мир 你好 世界\n",
    ] * 2


def _trained(
    pre_tokenizer: Any, normalizer: Any = None, alphabet: list[str] | None = None, **model: Any
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**model))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        show_progress=False,
        initial_alphabet=alphabet or [],
        special_tokens=["<unk>", *_marks()],
    )
    tokenizer.train_from_iterator(_lines(), trainer)
    return tokenizer


def _split(pattern: str, behavior: str = "isolated", invert: bool = False) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior, invert=invert)


def _bytes(*before: Any) -> Any:
    return pre_tokenizers.Sequence(
        [*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def gpt2_like() -> Tokenizer:
    return Tokenizer.from_file(str(ASSETS / "tokenizer.json"))


def gpt2_with_prefix_space() -> Tokenizer:
    return _trained(pre_tokenizers.ByteLevel(add_prefix_space=True), alphabet=_BYTES)


def llama3_like() -> Tokenizer:
    tokenizer = _trained(_bytes(_split(CL100K)), alphabet=_BYTES, ignore_merges=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
    )
    return tokenizer


def qwen_like() -> Tokenizer:
    return _trained(_bytes(_split(CL100K)), normalizers.NFC(), alphabet=_BYTES)


def o200k_like() -> Tokenizer:
    return _trained(_bytes(_split(O200K, "removed", True)), alphabet=_BYTES)


def deepseek_like() -> Tokenizer:
    return _trained(
        _bytes(_split(r"\p{N}{1,3}"), _split("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"), _split(DEEPSEEK)),
        alphabet=_BYTES,
    )


def metaspace_unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(
        _lines(),
        trainers.UnigramTrainer(
            vocab_size=500, show_progress=False, unk_token="<unk>", special_tokens=["<unk>", *_marks()]
        ),
    )
    return tokenizer


def mistral_like() -> Tokenizer:
    tokenizer = _trained(pre_tokenizers.Metaspace(prepend_scheme="first"), unk_token="<unk>", fuse_unk=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def llama2_like() -> Tokenizer:
    tokenizer = _trained(pre_tokenizers.Metaspace(), unk_token="<unk>", fuse_unk=True)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _without_pre_tokenizer(tokenizer)


def gemma_like() -> Tokenizer:
    tokenizer = _trained(pre_tokenizers.Metaspace(prepend_scheme="never"), unk_token="<unk>", fuse_unk=True)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return tokenizer


def compatibility_forms() -> Tokenizer:
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return _trained(_bytes(_split(CL100K)), normalizer, alphabet=_BYTES)


def merges_over_spaces() -> Tokenizer:
    """Its vocabulary has whole phrases: no space is a safe place."""
    return _trained(_bytes(_split(r"[^\n]+|\n+")), alphabet=_BYTES)


def odd_added_tokens() -> Tokenizer:
    tokenizer = _trained(_bytes(_split(CL100K)), alphabet=_BYTES)
    tokenizer.add_tokens(
        [
            AddedToken("the frontend", normalized=False),
            AddedToken("worker", normalized=True, single_word=True),
            AddedToken("<mask>", normalized=False, lstrip=True),
            AddedToken("[tool]", normalized=False, rstrip=True),
            AddedToken("  ", normalized=True),
        ]
    )
    return tokenizer


def greedy_added_tokens() -> Tokenizer:
    tokenizer = _trained(_bytes(_split(CL100K)), alphabet=_BYTES)
    tokenizer.add_tokens(
        [AddedToken("[tool]", normalized=False, rstrip=True), AddedToken("   ", normalized=True)]
    )
    return tokenizer


def words_only() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "a": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def _without_pre_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    import json

    layout = json.loads(tokenizer.to_str())
    layout["pre_tokenizer"] = None
    return Tokenizer.from_str(json.dumps(layout))


ZOO: tuple[Callable[[], Tokenizer], ...] = (
    gpt2_like,
    gpt2_with_prefix_space,
    llama3_like,
    qwen_like,
    o200k_like,
    deepseek_like,
    metaspace_unigram,
    mistral_like,
    llama2_like,
    gemma_like,
    compatibility_forms,
    merges_over_spaces,
    odd_added_tokens,
    greedy_added_tokens,
    words_only,
)
CUT_AT_WORDS = frozenset(
    (
        "gpt2_like",
        "gpt2_with_prefix_space",
        "llama3_like",
        "qwen_like",
        "o200k_like",
        "deepseek_like",
        "metaspace_unigram",
        "mistral_like",
        "gemma_like",
        "compatibility_forms",
    )
)
"""Of these it can be shown that a space after another character is a safe place."""


@cache
def made(make: Callable[[], Tokenizer]) -> Tokenizer:
    """The tokenizer, built once in a test run."""
    return make()
