"""What engines say of themselves: metrics, model lists, logs, polled events."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dynctl.engines import catalog
from dynctl.engines.base import EngineInfo, EngineLoad
from dynctl.engines.log_lines import error_lines
from dynctl.engines.prometheus import samples
from dynctl.engines.trtllm_kv import PollReader
from dynctl.errors import CodecError
from dynctl.protocol.kv_events import EngineCleared, EngineKvEvent, EngineRemoved, EngineStored

VLLM = b"""\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="1",model_name="tiny"} 2.0
vllm:num_requests_running{engine="0",model_name="tiny"} 3.0
vllm:num_requests_waiting{engine="0",model_name="tiny"} 1.0
vllm:kv_cache_usage_perc{engine="0",model_name="a \\"quoted\\\\ name"} 0.25
vllm:prefix_cache_queries_total{engine="0",model_name="tiny"} 288.0
vllm:prefix_cache_hits_total{engine="0",model_name="tiny"} 64.0
vllm:num_preemptions_total{engine="0",model_name="tiny"} 5.0
vllm:cache_config_info{block_size="32",engine="0",num_gpu_blocks="128",swap="None"} 1.0
"""
SGLANG = b"""\
sglang:num_running_reqs{model_name="m",tp_rank="0",dp_rank="1"} 4
sglang:num_running_reqs{model_name="m",tp_rank="1",dp_rank="1"} 4
sglang:num_queue_reqs{model_name="m",tp_rank="0",dp_rank="1"} 2
sglang:token_usage{model_name="m",tp_rank="0",dp_rank="1"} 0.5
"""
TRTLLM = json.dumps(
    [
        {"numActiveRequests": 1},
        {
            "numActiveRequests": 3,
            "numQueuedRequests": 2,
            "kvCacheStats": {"usedNumBlocks": 25, "maxNumBlocks": 100, "tokensPerBlock": 32},
        },
    ]
).encode()
MODELS = b'{"object":"list","data":[{"id":"tiny","max_model_len":2048,"permission":[]},{"id":"ad1"}]}'


def test_load_of_vllm_by_rank() -> None:
    assert catalog.get("vllm").load(VLLM) == [
        EngineLoad(
            rank=0,
            running=3,
            waiting=1,
            kv_usage=0.25,
            kv_blocks=128,
            prefix_queries=288,
            prefix_hits=64,
            preemptions=5,
        ),
        EngineLoad(rank=1, running=2, waiting=0, kv_usage=0.0),
    ]


def test_load_of_sglang_is_not_counted_per_tensor_rank() -> None:
    expected = [EngineLoad(rank=1, running=4, waiting=2, kv_usage=0.5)]
    assert catalog.get("sglang").load(SGLANG) == expected


def test_load_of_trtllm_is_the_latest_iteration() -> None:
    expected = [EngineLoad(rank=0, running=3, waiting=2, kv_usage=0.25, kv_blocks=100)]
    assert catalog.get("trtllm").load(TRTLLM) == expected


@pytest.mark.parametrize("body", [VLLM, SGLANG, TRTLLM])
def test_external_recognises_any(body: bytes) -> None:
    assert catalog.get("external").load(body)


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b"<html>", b"[1]", b'{"kvCacheStats": 3}', b"other 1\n"])
@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm", "external"])
def test_no_load_in_other_answers(engine: str, body: bytes) -> None:
    assert catalog.get(engine).load(body) == []


def test_load_of_trtllm_with_other_keys() -> None:
    body = b'[{"numActiveRequests": 1, "kvCacheStats": null, "numQueuedRequests": "?"}]'
    assert catalog.get("trtllm").load(body) == [EngineLoad(rank=0, running=1, waiting=0, kv_usage=0.0)]


def test_samples_skip_what_is_no_number() -> None:
    text = b'a{x="1\\n2"} 1 1700000000\na NaN\na +Inf\na x\n{} 1\nb 2\n'
    (sample,) = samples(text, ["a"])
    assert (sample.labels, sample.value) == ({"x": "1\n2"}, 1.0)


def test_info() -> None:
    expected = EngineInfo(block_size=32, max_model_len=2048, kv_blocks=128)
    assert catalog.get("vllm").info(MODELS, VLLM) == catalog.get("external").info(MODELS, VLLM) == expected
    assert catalog.get("sglang").info(MODELS, SGLANG) == EngineInfo(max_model_len=2048)
    assert catalog.get("trtllm").info(MODELS, TRTLLM) == EngineInfo(32, 2048, 100)
    assert catalog.get("vllm").info(b"<html>", b"") == EngineInfo()


VLLM_LOG = """\
(APIServer pid=1) INFO 11-21 06:58:10 [loggers.py:335] Engine 000: Avg prompt throughput: 0.0 tokens/s
(APIServer pid=1) WARNING 11-21 06:57:35 [system_utils.py:255] Found ulimit of 20000 and failed, error 1
(EngineCore pid=2) WARNING 11-21 06:57:35 [cpu.py:1] numactl is not installed: Error: no numa
(EngineCore pid=2) ERROR 11-21 06:58:21 [core.py:1512] Traceback (most recent call last):
(EngineCore pid=2) ERROR 11-21 06:58:21 [core.py:1512]     raise ValueError("no")
(EngineCore pid=2) ERROR 11-21 06:58:21 [core.py:1512] ValueError: No common block size for 16.
(EngineCore pid=2) ValueError: No common block size for 16.
(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.
nanobind: leaked 4 instances!
 - leaked type "triton._C.libtriton.ir.location"
/usr/lib/python3.11/multiprocessing/resource_tracker.py:254: UserWarning: resource_tracker: leaked
  warnings.warn('resource_tracker: There appear to be %d '
""".splitlines()


def test_root_cause_is_found_under_its_consequences() -> None:
    assert error_lines(VLLM_LOG, 5) == ["ValueError: No common block size for 16."]


@pytest.mark.parametrize(
    "line",
    [
        "OSError: [Errno 98] error while attempting to bind on address ('127.0.0.1', 80): in use",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "vllm serve: error: unrecognized arguments: --nope",
        "ImportError: libcuda.so.1: cannot open shared object file: No such file or directory",
        "Segmentation fault (core dumped)",
        "huggingface_hub.errors.RepositoryNotFoundError: 404 Client Error.",
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
        "AssertionError",
        "bash: line 1: trtllm-serve: command not found",
    ],
)
def test_lines_that_tell_a_cause(line: str) -> None:
    log = ["INFO 11-21 06:58:10 [x.py:1] fine", line, "nanobind: leaked 1 types!", "INFO: done"]
    assert error_lines(log, 3) == [line]


def test_consequence_alone_is_better_than_nothing() -> None:
    log = ["ok", "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue."]
    assert error_lines(log, 3) == log[1:]


def test_log_without_an_error_gives_its_last_lines() -> None:
    assert error_lines(["one", "", "two", " - leaked instance"], 5) == ["one", "two"]
    assert error_lines(["one", "two"], 1) == ["two"]
    assert error_lines(["one"], 0) == error_lines([], 3) == []


def test_colours_and_prefixes_are_left_out() -> None:
    log = ["\x1b[1;36m(EngineCore pid=2)\x1b[0;0m ERROR 11-21 06:58:21 [core.py:15] KeyError: 'x'"]
    log += ["[2026-11-21 06:58:21 TP0] RuntimeError: no memory"]
    assert error_lines(log, 3) == ["KeyError: 'x'", "RuntimeError: no memory"]
    for name in ("vllm", "sglang", "trtllm", "external"):
        assert catalog.get(name).error_lines(log, 1) == ["RuntimeError: no memory"]


class Poll:
    """A worker's answers to polls, numbered."""

    def __init__(self) -> None:
        self.reader = PollReader(tokens_per_block=2)
        self.number = 0

    def __call__(self, *data: dict[str, Any], window: int = 4096, rank: int = 0) -> list[EngineKvEvent]:
        items = []
        for item in data:
            items.append(
                {"event_id": self.number, "window_size": window, "attention_dp_rank": rank, "data": item}
            )
            self.number += 1
        batches = self.reader.read(json.dumps(items).encode(), 1.0)
        assert all(batch.rank == rank for batch in batches)
        return [event for batch in batches for event in batch.events]


def polled_block(name: int, *tokens: int, level: int = 0, **more: Any) -> dict[str, Any]:
    ids = [{"type": "unique_token", "token_id": token, "token_extra_id": 0} for token in tokens]
    return {"type": "stored_block", "block_hash": name, "cache_level": level, "tokens": ids, **more}


def polled(parent: int | None, *blocks: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "stored", "parent_hash": parent, "blocks": list(blocks), **more}


def kept(name: int, parent: int | None, tokens: list[int], **more: Any) -> EngineStored:
    return EngineStored(block_hashes=[name], parent=parent, token_ids=tokens, block_size=2, **more)


class TestTrtllmPoll:
    def test_blocks_are_chained_and_tiers_kept(self) -> None:
        events = Poll()(polled(None, polled_block(1, 5, 6), polled_block(2, 7, 8, level=1), lora_name="ad"))
        assert events == [
            kept(1, None, [5, 6], lora_name="ad"),
            kept(2, 1, [7, 8], tier="G2", lora_name="ad"),
        ]

    def test_partial_blocks_and_their_removal_are_hidden(self) -> None:
        poll = Poll()
        assert poll(polled(None, polled_block(1, 5, 6), polled_block(2, 7))) == [kept(1, None, [5, 6])]
        assert poll({"type": "removed", "block_hashes": [2, 1, 9]}) == [EngineRemoved(block_hashes=[1])]

    def test_blocks_with_media_are_named_apart_and_what_follows_them_is_kept(self) -> None:
        seen = []
        for key in ({"hash": "a"}, {"hash": "b"}):
            media = polled_block(1, 5, 6, mm_keys=[key])
            first, then = Poll()(polled(None, media, polled_block(2, 7, 8)))
            assert isinstance(first, EngineStored)
            assert then == kept(2, 1, [7, 8])
            seen += first.extras
        extra = {**polled_block(1), "tokens": [{"token_id": 1, "token_extra_id": 9}, {"token_id": 2}]}
        (embedded,) = Poll()(polled(None, extra))
        assert isinstance(embedded, EngineStored)
        assert len({*seen, *embedded.extras}) == 3

    def test_plain_token_lists_and_unknown_levels(self) -> None:
        plain = {**polled_block(1), "tokens": [5, 6]}
        assert Poll()(polled(None, plain)) == [kept(1, None, [5, 6])]
        assert Poll()(polled(None, polled_block(1, 5, 6, level=7))) == []

    def test_move_between_tiers(self) -> None:
        poll = Poll()
        poll(polled(None, polled_block(1, 5, 6)))
        move = {"type": "updated", "block_hash": 1, "cache_level": {"old_value": 0, "new_value": 1}}
        assert poll(move) == [kept(1, None, [5, 6], tier="G2"), EngineRemoved(block_hashes=[1])]
        assert poll(move) == []
        assert poll({"type": "updated", "block_hash": 1, "priority": {"old_value": 1}}) == []
        assert poll({**move, "block_hash": 3}) == []
        assert poll({"type": "removed", "block_hashes": [1]}) == [EngineRemoved(block_hashes=[1], tier="G2")]

    def test_gap_empties_the_index(self) -> None:
        poll = Poll()
        poll(polled(None, polled_block(1, 5, 6)))
        poll.number += 1
        assert poll(polled(None, polled_block(2, 7, 8))) == [EngineCleared(), kept(2, None, [7, 8])]
        assert poll({"type": "removed", "block_hashes": [1]}) == []

    def test_only_the_largest_window_counts(self) -> None:
        poll = Poll()
        poll(polled(None, polled_block(1, 5, 6)), window=512)
        assert poll(polled(None, polled_block(2, 5, 6))) == [EngineCleared(), kept(2, None, [5, 6])]
        assert poll(polled(None, polled_block(3, 5, 6)), window=512) == []

    def test_other_events_say_nothing(self) -> None:
        assert Poll()({"type": "created", "num_blocks_per_cache_level": [1, 2]}, rank=3) == []

    @pytest.mark.parametrize("body", [b"x", b"7", b"[7]", b'[{"event_id": 1}]', b'[{"event_id": "x"}]'])
    def test_answers_that_are_no_events(self, body: bytes) -> None:
        with pytest.raises(CodecError):
            PollReader(32).read(body, 0.0)
