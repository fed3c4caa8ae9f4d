from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from dynctl.engines.mocker import assets_dir
from dynctl.errors import ContextTooLong, RequestError
from dynctl.frontend.body import Body
from dynctl.frontend.prompt.model_files import find_model_files
from dynctl.frontend.prompt.preprocess import (
    THREAD_CHARS,
    Kind,
    Preprocessor,
    PromptFacts,
)
from dynctl.frontend.prompt.token_cache import Begun, TokenCache
from dynctl.kv.hashing import OF_BYTES, root_hash, sequence_hashes
from dynctl.observability.metrics import Metrics
from dynctl.protocol.instances import ModelCard

WORDS = ["<unk>", "<s>", "user", "hello", "world", "again"]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}, "x_token": 3}')
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    )
    return tmp_path


async def prepare(
    card: ModelCard, kind: Kind, fields: dict[str, Any], block_size: int = 2, adapter: str = ""
) -> tuple[PromptFacts, str]:
    metrics = Metrics()
    preprocessor = Preprocessor(card, metrics)
    try:
        body = Body.parse(msgspec.json.encode(fields))
        facts = await preprocessor.prepare(kind, body, block_size, adapter)
    finally:
        preprocessor.close()
    return facts, metrics.render().decode()


def is_unknown(facts: PromptFacts) -> bool:
    return facts.tokens == 0 and facts.hashes is None


def chat(*contents: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content} for content in contents]}


async def test_chat_has_no_special_tokens_added_and_completions_have(model_dir: Path) -> None:
    card = ModelCard(name="m", path=str(model_dir))
    facts, _ = await prepare(card, "chat", chat("hello", "world"))
    assert facts.tokens == 4
    assert facts.hashes == sequence_hashes([2, 3, 2, 4], 2, root_hash())
    facts, _ = await prepare(card, "completions", {"prompt": "hello world"})
    assert facts.hashes == sequence_hashes([1, 3, 4], 2, root_hash())


async def test_token_ids_need_no_tokenizer(tmp_path: Path) -> None:
    card = ModelCard(name="m", path=str(tmp_path))
    for prompt in ([5, 6, 7, 8], [[5, 6, 7, 8]]):
        facts, _ = await prepare(card, "completions", {"prompt": prompt})
        assert facts == PromptFacts(tokens=4, hashes=sequence_hashes([5, 6, 7, 8], 2, root_hash()))


async def test_one_prompt_in_a_list_is_a_prompt(model_dir: Path) -> None:
    facts, _ = await prepare(ModelCard(name="m", path=str(model_dir)), "completions", {"prompt": ["hello"]})
    assert facts.tokens == 2


async def test_adapter_and_salt_change_the_hashes(model_dir: Path) -> None:
    card = ModelCard(name="m", path=str(model_dir))
    plain, _ = await prepare(card, "chat", chat("hello world"))
    salted, _ = await prepare(card, "chat", {**chat("hello world"), "cache_salt": "t"})
    tuned, _ = await prepare(card, "chat", chat("hello world"), adapter="ad1")
    assert len({tuple(facts.hashes or ()) for facts in (plain, salted, tuned)}) == 3


async def test_without_a_block_size_there_are_tokens_but_no_hashes(model_dir: Path) -> None:
    facts, _ = await prepare(ModelCard(name="m", path=str(model_dir)), "chat", chat("hello"), block_size=0)
    assert facts == PromptFacts(tokens=2)


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        ("completions", {"prompt": ["hello", "world"]}, "batch"),
        ("completions", {"prompt": [[1], [2]]}, "batch"),
        ("completions", {}, "prompt_missing"),
        ("completions", {"prompt": "hello", "truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
        ("completions", {"prompt_embeds": "xx"}, "prompt_embeds"),
        ("chat", {**chat("x"), "chat_template": "{{ 1 }}"}, "chat_template"),
        ("chat", chat([{"type": "image_url"}]), "multimodal"),
    ],
)
async def test_prompts_that_cannot_be_tokenised_are_counted_by_reason(
    model_dir: Path, kind: Kind, fields: dict[str, Any], reason: str
) -> None:
    facts, text = await prepare(ModelCard(name="m", path=str(model_dir)), kind, fields)
    assert is_unknown(facts)
    assert f'tokenize_fallbacks_total{{reason="{reason}"}} 1.0' in text


async def test_missing_and_broken_files_only_cost_the_tokens(tmp_path: Path) -> None:
    card = ModelCard(name="m", path=str(tmp_path))
    facts, text = await prepare(card, "chat", chat("x"))
    assert (is_unknown(facts), 'reason="template_missing"' in text) == (True, True)
    facts, text = await prepare(card, "completions", {"prompt": "x"})
    assert (is_unknown(facts), 'reason="tokenizer_missing"' in text) == (True, True)
    (tmp_path / "tokenizer.json").write_text("{}")
    facts, _ = await prepare(card, "completions", {"prompt": "x"})
    assert is_unknown(facts)
    (tmp_path / "tokenizer_config.json").write_text("[")
    facts, _ = await prepare(card, "completions", {"prompt": "x"})
    assert is_unknown(facts)


async def test_tokenizer_without_a_usable_template_still_serves_completions(model_dir: Path) -> None:
    (model_dir / "chat_template.jinja").write_text("{% for %}")
    card = ModelCard(name="m", path=str(model_dir))
    assert is_unknown((await prepare(card, "chat", chat("x")))[0])
    assert (await prepare(card, "completions", {"prompt": "hello"}))[0].tokens == 2
    (model_dir / "chat_template.jinja").unlink()
    assert is_unknown((await prepare(card, "chat", chat("x")))[0])


async def test_a_body_of_megabytes_is_not_even_searched_on_the_loop(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    begin = TokenCache.begin

    def watched(cache: TokenCache, text: str) -> Begun:
        seen.append(threading.current_thread() is threading.main_thread())
        return begin(cache, text)

    monkeypatch.setattr(TokenCache, "begin", watched)
    for text in ("hello", "hello" * 200_000):
        await prepare(ModelCard(name="m", path=str(model_dir)), "completions", {"prompt": text})
    assert seen == [True, False]


async def test_long_prompts_are_worked_on_in_a_thread_with_the_same_result(model_dir: Path) -> None:
    words = THREAD_CHARS // 6 + 10
    card = ModelCard(name="m", path=str(model_dir))
    facts, _ = await prepare(card, "completions", {"prompt": "hello " * words})
    assert facts.tokens == words + 1
    facts, text = await prepare(card, "completions", {"prompt": ["hello " * words, "x"]})
    assert 'reason="batch"' in text


async def test_wrong_types_are_the_clients_fault_not_a_fallback(model_dir: Path) -> None:
    card = ModelCard(name="m", path=str(model_dir))
    with pytest.raises(RequestError, match="cache_salt"):
        await prepare(card, "chat", {**chat("x"), "cache_salt": 1})
    with pytest.raises(RequestError, match="tools"):
        await prepare(card, "chat", {**chat("x"), "tools": "x"})


async def test_a_model_without_files_or_with_odd_ones_is_routed_without_tokens(model_dir: Path) -> None:
    assert is_unknown((await prepare(ModelCard(name="m"), "completions", {"prompt": "x"}))[0])
    (model_dir / "chat_template.jinja").unlink()
    odd = '{"chat_template": [{"name": "default"}]}'
    (model_dir / "tokenizer_config.json").write_text(odd)
    card = ModelCard(name="m", path=str(model_dir))
    assert is_unknown((await prepare(card, "chat", chat("x")))[0])


def test_template_is_found_where_models_keep_it(model_dir: Path, tmp_path: Path) -> None:
    card = ModelCard(name="m", path=str(model_dir))
    assert "m.role" in find_model_files(card).template_source
    assert find_model_files(card).special_tokens == {"bos_token": "<s>"}
    (model_dir / "chat_template.jinja").unlink()
    (model_dir / "tokenizer_config.json").write_text('{"chat_template": "one"}')
    assert find_model_files(card).template_source == "one"
    named = (
        '{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "two"}]}'
    )
    (model_dir / "tokenizer_config.json").write_text(named)
    assert find_model_files(card).template_source == "two"
    (model_dir / "chat_template.json").write_text('{"chat_template": "three"}')
    assert find_model_files(card).template_source == "three"
    own = tmp_path / "own.jinja"
    own.write_text("four")
    assert find_model_files(ModelCard(name="m", path="x", chat_template=str(own))).template_source == "four"


def test_tokenizer_may_be_a_file_of_its_own(model_dir: Path) -> None:
    file = model_dir / "tokenizer.json"
    files = find_model_files(ModelCard(name="m", path="org/other", tokenizer=str(file)))
    assert files.tokenizer_json == file
    assert "m.role" in files.template_source


def test_downloaded_models_are_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    card = ModelCard(name="m", path="org/name")
    assert find_model_files(card).tokenizer_json is None
    snapshot = tmp_path / "hub/models--org--name/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").write_text("{}")
    refs = tmp_path / "hub/models--org--name/refs"
    refs.mkdir()
    (refs / "main").write_text("abc\n")
    assert find_model_files(card).tokenizer_json == snapshot / "tokenizer.json"
    assert find_model_files(ModelCard(name="m", path="org/name", revision="abc")).tokenizer_json is not None
    assert find_model_files(ModelCard(name="m", path="org/name", revision="def")).tokenizer_json is None


async def test_a_text_far_beyond_the_context_is_refused_by_its_first_slices(model_dir: Path) -> None:
    preprocessor = Preprocessor(ModelCard(name="m", path=str(model_dir)), Metrics())
    body = Body.parse(msgspec.json.encode(chat("hello " * 100_000)))
    with pytest.raises(ContextTooLong) as caught:
        await preprocessor.prepare("chat", body, 2, context=500)
    preprocessor.close()
    told = caught.value.message
    assert "maximum context length is 500 tokens" in told
    assert int(told.partition("more than ")[2].split()[0]) < 20_000


async def test_a_text_of_many_characters_and_few_tokens_is_not_refused(model_dir: Path) -> None:
    preprocessor = Preprocessor(ModelCard(name="m", path=str(model_dir)), Metrics())
    body = Body.parse(msgspec.json.encode(chat("x" * 200_000)))
    facts = await preprocessor.prepare("chat", body, 2, context=50)
    preprocessor.close()
    assert facts.tokens == 2


async def test_a_prompt_beyond_the_context_is_counted_and_not_hashed(model_dir: Path) -> None:
    preprocessor = Preprocessor(ModelCard(name="m", path=str(model_dir)), Metrics())
    body = Body.parse(msgspec.json.encode({"prompt": [3] * 1000}))
    assert await preprocessor.prepare("completions", body, 2, context=999) == PromptFacts(tokens=1000)
    facts = await preprocessor.prepare("completions", body, 2, context=1000)
    preprocessor.close()
    assert facts.hashes is not None


async def test_other_requests_go_on_while_a_long_prompt_is_tokenised() -> None:
    preprocessor = Preprocessor(ModelCard(name="m", path=str(assets_dir())), Metrics())
    await preprocessor.warm()
    text = " ".join(f"word{number}" for number in range(100_000))
    body = Body.parse(msgspec.json.encode(chat(text)))
    task = asyncio.create_task(preprocessor.prepare("chat", body, 16))
    turns = 0
    while not task.done():
        turns += 1
        await asyncio.sleep(0.001)
    preprocessor.close()
    assert (await task).tokens > 200_000
    assert turns > 20


async def test_prompts_that_cannot_be_tokenised_are_known_by_their_bytes(model_dir: Path) -> None:
    card = ModelCard(name="m", path=str(model_dir))

    async def known(text: str, image: str, adapter: str = "") -> list[int]:
        fields = chat([{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": image}}])
        facts, _ = await prepare(card, "chat", fields, 16, adapter)
        assert facts.approximate is not None
        assert all(found >= OF_BYTES for found in facts.approximate)
        assert len(facts.approximate) <= facts.estimate // 16 <= len(facts.approximate) + 1
        return list(facts.approximate)

    shared = "the same words again " * 40
    one, other = await known(shared, "data:1" * 40), await known(shared, "data:2" * 40)
    same = [a == b for a, b in zip(one, other, strict=True)]
    assert same == sorted(same, reverse=True)
    assert 10 < sum(same) < len(same)
    assert not set(one) & set(await known(shared, "data:1" * 40, "adapter"))
