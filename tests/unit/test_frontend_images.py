"""Images in chats: named for the engine, and put into prompts token for token once they are known."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from dynctl.errors import RequestError
from dynctl.frontend.body import Body
from dynctl.frontend.prompt.alike import alike
from dynctl.frontend.prompt.images import ImageNames
from dynctl.frontend.prompt.pictured import GUESSED_TOKENS, pictured
from dynctl.frontend.prompt.preprocess import Preprocessor, PromptFacts
from dynctl.kv.hashing import OF_BYTES, pack_tokens, root_hash, sequence_hashes
from dynctl.kv.media import Layouts
from dynctl.mocker.requests import Serving, parse_generation
from dynctl.mocker.tokens import Vocabulary
from dynctl.observability.metrics import Metrics
from dynctl.protocol.instances import ModelCard
from dynctl.protocol.kv_events import Shown
from tests.pictured_model import IMAGE, image, text, write

NAMES = ImageNames("uuid", b"secret")
BLOCK = 16


def chat(*parts: Any, **fields: Any) -> Body:
    message = {"role": "user", "content": list(parts)}
    return Body.parse(json.dumps({"model": "m", "messages": [message], **fields}).encode())


def content(body: Body) -> list[Any]:
    found: list[Any] = json.loads(body.original)["messages"][0]["content"]
    return found


def test_images_in_the_request_are_named_by_what_is_in_them() -> None:
    body = chat(text("a"), image(1), image(2), image(1), temperature=0.25)
    named = NAMES.named(body)
    ids = [part.get("uuid") for part in content(named)]
    assert ids[0] is None
    assert ids[1] == ids[3] != ids[2]
    assert NAMES.known_by(named) == ids[1:]
    for part in (parts := content(named)):
        part.pop("uuid", None)
    assert parts == content(body)
    assert json.loads(named.original)["temperature"] == 0.25
    plain = {"type": "image_url", "image_url": image(1)["image_url"]["url"]}
    assert content(NAMES.named(chat(plain)))[0]["uuid"] == ids[1]


def test_names_cannot_be_guessed_by_clients() -> None:
    other = ImageNames("uuid", b"another deployment's")
    assert content(other.named(chat(image(1))))[0]["uuid"] != content(NAMES.named(chat(image(1))))[0]["uuid"]


@pytest.mark.parametrize(
    "url", ['{"url":"VICTIM","url":"EVIL"}', '{"x":"VICTIM","url":"EVIL"}', '{"url":"EVIL","x":"VICTIM"}']
)
def test_an_image_is_not_named_as_another_one_whatever_is_beside_it(url: str) -> None:
    victim, evil = (image(number)["image_url"]["url"] for number in (1, 2))
    raw = url.replace("VICTIM", victim).replace("EVIL", evil)
    part = '{"type":"image_url","image_url":' + raw + "}"
    body = Body.parse(('{"messages":[{"role":"user","content":[' + part + "]}]}").encode())
    (sent,) = content(named := NAMES.named(body))
    assert sent["image_url"]["url"] == evil
    assert named.original.count(b'"url"') == 1
    assert sent["uuid"] == content(NAMES.named(chat(image(2))))[0]["uuid"]


@pytest.mark.parametrize("value", ["1e400", "9" * 5000, "{}", "[1e400]", "null", '"\\u0000"'])
@pytest.mark.parametrize("field", ["type", "uuid", "image_url", "text"])
async def test_an_odd_part_is_no_fault_of_ours(field: str, value: str, tmp_path: Path) -> None:
    write(tmp_path)
    preprocessor = Preprocessor(ModelCard(name="m", path=str(tmp_path)), Metrics(), names=NAMES)
    odd = {"type": '"image_url"', "image_url": '{"url":"data:x"}', field: value}
    part = "{" + ",".join(f'"{name}":{raw}' for name, raw in odd.items()) + "}"
    whole = json.dumps(image(1))
    body = Body.parse(f'{{"messages":[{{"role":"user","content":[{part},{whole}]}}]}}'.encode())
    try:
        with contextlib.suppress(RequestError):
            facts = await preprocessor.prepare("chat", await preprocessor.named(body), BLOCK)
            assert facts.approximate is not None or facts.hashes is not None
    finally:
        preprocessor.close()


def test_what_is_behind_a_url_and_what_clients_name_keeps_its_name() -> None:
    far = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    own = {**image(1), "uuid": "mine"}
    body = chat(
        far, own, {"type": "image_url"}, {"type": "audio_url", "audio_url": {"url": "data:x"}}, "text"
    )
    assert NAMES.named(body) is body
    first, second, third = NAMES.known_by(body)
    assert second == "mine"
    assert first.startswith("\0")
    assert third.startswith("\0")
    assert first != third
    without = chat(text("image_url"))
    assert NAMES.named(without) is without
    assert NAMES.known_by(without) == []
    words = Body.parse(b'{"messages":[{"role":"user","content":"\\"image_url\\""},{"role":"assistant"}]}')
    assert NAMES.named(words) is words


def test_a_prompt_with_other_placeholders_than_images_is_not_known() -> None:
    packed = pack_tokens([1, 9, 2])
    assert pictured(packed, 9, ["a", "b"], lambda _: [(9, 2)], 2, root_hash()) is None
    known = pictured(packed, 9, ["a"], lambda _: [(9, 2)], 0, root_hash())
    assert known is not None
    assert (known.tokens, known.hashes, known.exact) == (4, [], True)


def test_up_to_an_unknown_image_blocks_are_those_of_the_text() -> None:
    packed = pack_tokens([*range(10, 15), 9, 3, 9, 4])
    found = pictured(packed, 9, ["a", "b"], {"b": [(9, 2)]}.get, 2, root_hash())
    assert found is not None
    assert (found.tokens, found.exact) == (9 - 2 + GUESSED_TOKENS + 2, False)
    assert found.hashes[:2] == sequence_hashes([10, 11, 12, 13], 2, root_hash())
    assert all(h >= OF_BYTES for h in found.hashes[2:])
    other = pictured(packed, 9, ["c", "b"], {"b": [(9, 2)]}.get, 2, root_hash())
    assert other is not None
    assert not set(found.hashes[2:]) & set(other.hashes)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictured")
    write(folder)
    return folder


async def prepared(
    model: Path, body: Body, layouts: Layouts, context: int = 0
) -> tuple[PromptFacts, str, Body]:
    metrics = Metrics()
    preprocessor = Preprocessor(ModelCard(name="m", path=str(model)), metrics, names=NAMES, layouts=layouts)
    try:
        body = await preprocessor.named(body)
        facts = await preprocessor.prepare("chat", body, BLOCK, context=context)
    finally:
        preprocessor.close()
    return facts, metrics.render().decode(), body


@pytest.mark.parametrize("size_bytes", [300, 500_000])
async def test_a_prompt_with_known_images_is_as_long_as_the_engines(model: Path, size_bytes: int) -> None:
    body = chat(text("look " * 30), image(1, size_bytes), text("and "), image(2, size_bytes), text("?"))
    layouts = Layouts()
    guess, told, body = await prepared(model, body, layouts)
    assert (guess.tokens, guess.hashes) == (0, None)
    assert guess.approximate is not None
    assert guess.approximate[0] < OF_BYTES <= guess.approximate[-1]
    assert 'tokenize_fallbacks_total{reason="multimodal"} 1.0' in told
    vocabulary = Vocabulary(model)
    asked = parse_generation(body.original, True, Serving("m", vocabulary, 100_000, 16))
    token = vocabulary.image_token
    assert token is not None
    for media in asked.media:
        layouts.learn(Shown(media.name, [(token, media.end - media.start)]))
    facts, told, _ = await prepared(model, body, layouts)
    assert facts.tokens == len(asked.prompts[0])
    assert facts.hashes is not None
    assert len(facts.hashes) == facts.tokens // BLOCK
    assert "tokenize_fallbacks_total" not in told
    assert facts.hashes[0] == guess.approximate[0]
    # What may be too long is the engine's to refuse.
    long, told, _ = await prepared(model, body, layouts, context=facts.tokens - 1)
    assert (long.tokens, long.estimate) == (0, facts.tokens)
    assert 'tokenize_fallbacks_total{reason="multimodal"} 1.0' in told


async def test_text_that_looks_like_an_image_makes_a_prompt_approximate(model: Path) -> None:
    facts, told, _ = await prepared(model, chat(text(f"an {IMAGE} of words"), image(1)), Layouts())
    assert (facts.tokens, facts.hashes) == (0, None)
    assert 'tokenize_fallbacks_total{reason="multimodal"} 1.0' in told


async def test_without_a_template_or_a_token_for_images_they_are_left_as_they_are(tmp_path: Path) -> None:
    for without in ("chat_template.jinja", "config.json"):
        write(tmp_path)
        (tmp_path / without).unlink()
        body = chat(text("look"), image(1))
        facts, told, sent = await prepared(tmp_path, body, Layouts())
        assert sent is body
        assert facts.hashes is None
        assert 'tokenize_fallbacks_total{reason="' in told


def test_an_image_counts_for_what_engines_make_of_it_not_for_its_bytes() -> None:
    _, small = alike(chat(image(1, 30_000)), BLOCK, root_hash())
    hashes, large = alike(chat(image(1, 3_000_000)), BLOCK, root_hash())
    assert small == large < 700
    other, _ = alike(chat(image(2, 3_000_000)), BLOCK, root_hash())
    assert hashes[-1] != other[-1]
    after, _ = alike(
        chat(image(1, 3_000_000), text("tell me more of it, in as many words as you can find")),
        BLOCK,
        root_hash(),
    )
    assert hashes[: len(hashes) - 2] == after[: len(hashes) - 2]
    assert hashes != after
