"""Images at the simulated engine: vLLM's names, places and extra keys of blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dynctl.mocker.blocks import BlockPool, block_hash, media_keys
from dynctl.mocker.events import encode_batch
from dynctl.mocker.leases import PinBoard
from dynctl.mocker.pictures import LEAST_TOKENS, MOST_TOKENS, Picture, placed
from dynctl.mocker.requests import ApiError, Generation, Serving, parse_generation
from dynctl.mocker.scheduler import Limits, Scheduler, Sequence
from dynctl.mocker.tokens import Vocabulary
from tests.pictured_model import END, IMAGE, START, image, text, write

BLOCK = 16


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Serving:
    folder: Path = tmp_path_factory.mktemp("pictured")
    write(folder)
    return Serving("m", Vocabulary(folder), 4096, 16)


def asked(serving: Serving, *parts: Any, **fields: Any) -> Generation:
    messages = [{"role": "user", "content": list(parts)}]
    return parse_generation(json.dumps({"messages": messages, **fields}).encode(), True, serving)


def test_images_take_the_places_of_their_tokens_in_the_prompt(serving: Serving) -> None:
    vocabulary = serving.vocabulary
    made = asked(serving, text("see "), {**image(1), "uuid": "cat"}, text("and "), image(2), image(2))
    cat, *dogs = made.media
    assert cat.name == "cat"
    assert dogs[0].name == dogs[1].name != image(2)["image_url"]["url"]
    lengths = [one.end - one.start for one in made.media]
    assert lengths[1] == lengths[2]
    assert all(LEAST_TOKENS <= length < MOST_TOKENS for length in lengths)
    (tokens,) = made.prompts
    for one, length in zip(made.media, lengths, strict=True):
        assert tokens[one.start : one.end] == [vocabulary.image_token] * length
        assert tokens[one.start - 1 : one.start] == vocabulary.encode(START, special=False)
        assert tokens[one.end : one.end + 1] == vocabulary.encode(END, special=False)
    assert asked(serving, text("see ")).media == ()


def test_placeholders_without_images_are_refused(serving: Serving) -> None:
    with pytest.raises(ApiError, match="placeholders"):
        asked(serving, text(IMAGE))


def test_a_chat_with_an_image_can_be_continued(serving: Serving) -> None:
    messages = [
        {"role": "user", "content": [text("see "), image(1)]},
        {"role": "assistant", "content": [text("a cat")]},
    ]
    body = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    made = parse_generation(json.dumps(body).encode(), True, serving)
    assert serving.vocabulary.decode(made.prompts[0]).endswith("a cat")


def test_blocks_with_images_have_keys_as_vllm_publishes_them() -> None:
    tokens, media = placed([1, 2, 9, *range(10, 40)], 9, [Picture("cat", 20)])
    assert media_keys(media, 0, BLOCK) == (("cat", 2),)
    pool = BlockPool(10, BLOCK)
    scheduler = Scheduler(Limits(4, 1000), pool, PinBoard(30))
    scheduler.add(Sequence("a", tokens, 1, Says(), salt="s", adapter="ad", media=media), 0.0)
    step = scheduler.begin(0.0)
    assert step is not None
    scheduler.commit(step, 0.0)
    _, (event,), _ = msgspec.msgpack.decode(encode_batch(0.0, pool.take_events(), 0, BLOCK))
    assert event["extra_keys"] == [["ad", ["cat", 2], "s"], ["ad", ["cat", -14]], ["ad"]]
    one, other = (block_hash(b"", (1,), media=[("cat", at)]) for at in (0, 1))
    assert block_hash(b"", (1,)) != one != other


class Says:
    def next(self, eos_allowed: bool) -> int:
        return 5
