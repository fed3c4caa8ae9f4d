"""Numbering, keeping and repeating of a rank's KV batches."""

from __future__ import annotations

from dynctl.protocol.kv_events import Cleared, EngineKvBatch, EngineStored, KvBatch, Stored
from dynctl.worker.kv_relay import RankRelay


def stored(name: int) -> EngineKvBatch:
    event = EngineStored(block_hashes=[name], parent=None, token_ids=[name] * 4, block_size=4)
    return EngineKvBatch(timestamp=float(name), rank=0, events=[event])


def relay(sent: list[KvBatch], kept: int = 4) -> RankRelay:
    return RankRelay("w", 3, 0, publish=sent.append, kept=kept)


def test_batches_are_numbered_without_holes_and_repeats_change_nothing() -> None:
    sent: list[KvBatch] = []
    rank = relay(sent)
    for name in (1, 1, 2):
        rank.feed(stored(name))
    assert [(batch.worker, batch.incarnation, batch.rank, batch.seq) for batch in sent] == [
        ("w", 3, 0, 0),
        ("w", 3, 0, 1),
    ]
    assert sent[0].block_size == 4


def test_sync_gives_batches_while_they_are_kept_and_else_the_whole() -> None:
    sent: list[KvBatch] = []
    rank = relay(sent, kept=2)
    for name in range(5):
        rank.feed(stored(name))
    assert rank.sync(5).batches == []
    assert rank.sync(5).snapshot is None
    assert rank.sync(3).batches == sent[3:]
    whole = rank.sync(2)
    assert whole.batches == []
    assert whole.next_seq == 5
    assert whole.snapshot == [Stored([h for batch in sent for e in batch.events for h in stored_in(e)])]
    assert rank.sync(6).snapshot == whole.snapshot


def stored_in(event: object) -> list[int]:
    assert isinstance(event, Stored)
    return event.hashes


def test_reset_is_a_numbered_clear() -> None:
    sent: list[KvBatch] = []
    rank = relay(sent)
    rank.feed(stored(1))
    rank.reset("lost")
    assert sent[1].seq == 1
    assert sent[1].events == [Cleared()]
    assert rank.sync(99).snapshot == []
    assert rank.sync(0).resets == 1


def test_beat_repeats_the_last_batch_only_when_quiet() -> None:
    sent: list[KvBatch] = []
    rank = relay(sent)
    rank.beat()
    rank.beat()
    assert sent == []
    rank.feed(stored(1))
    rank.beat()
    assert len(sent) == 1
    rank.beat()
    assert sent == [sent[0], sent[0]]


def test_block_size_told_before_the_first_event_stays() -> None:
    sent: list[KvBatch] = []
    rank = relay(sent)
    rank.set_block_size(0)
    rank.set_block_size(4)
    rank.set_block_size(8)
    assert rank.sync(0).block_size == 4
