"""Numbering, keeping and repeating of a rank's KV batches."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import pytest

from dynctl.errors import CodecError
from dynctl.protocol.kv_events import Cleared, EngineKvBatch, EngineStored, KvBatch, KvSync, Shown, Stored
from dynctl.transport.engine_events import EngineEventSource, EnginePublisher
from dynctl.worker.kv_relay import GATHER_S, KvRelay, RankMemory, RankRelay, until_told


def stored(name: int) -> EngineKvBatch:
    event = EngineStored(block_hashes=[name], parent=None, token_ids=[name] * 4, block_size=4)
    return EngineKvBatch(timestamp=float(name), rank=0, events=[event])


def relay(sent: list[KvBatch], kept: int = 4) -> RankRelay:
    """One that publishes each change by itself."""
    rank = RankRelay("w", 3, 0, publish=sent.append, gathers=lambda: rank.flush(), kept=kept)
    return rank


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


def test_changes_that_come_together_go_out_as_one_batch() -> None:
    sent: list[KvBatch] = []
    rank = RankRelay("w", 3, 0, publish=sent.append, gathers=lambda: None, kept=4)
    for name in (1, 2):
        rank.feed(stored(name))
    assert sent == []
    rank.flush()
    rank.flush()
    assert [(batch.seq, len(batch.events)) for batch in sent] == [(0, 2)]


def test_a_reader_that_syncs_is_told_what_was_gathered_just_now() -> None:
    sent: list[KvBatch] = []
    rank = RankRelay("w", 3, 0, publish=sent.append, gathers=lambda: None, kept=4)
    rank.feed(stored(1))
    assert rank.sync(0).batches == sent
    assert len(sent) == 1


def test_what_was_gathered_before_a_reset_is_not_told_after_it() -> None:
    sent: list[KvBatch] = []
    rank = RankRelay("w", 3, 0, publish=sent.append, gathers=lambda: None, kept=4)
    rank.feed(stored(1))
    rank.reset("lost")
    rank.flush()
    assert sent[0].events == [Cleared()]


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


@pytest.mark.parametrize("told", [2, 4, 8])
def test_block_size_is_as_told_until_events_show_it(told: int) -> None:
    sent: list[KvBatch] = []
    rank = relay(sent)
    rank.begin(told, again=False)
    assert rank.sync(0).block_size == told
    rank.feed(stored(1))
    assert rank.sync(0).block_size == sent[0].block_size == 4
    assert len(stored_in(sent[0].events[0])) == 1


def test_engine_that_comes_back_with_smaller_blocks_is_believed() -> None:
    sent: list[KvBatch] = []
    rank = relay(sent)
    rank.begin(4, again=False)
    rank.feed(stored(1))
    rank.begin(0, again=True)
    event = EngineStored(block_hashes=[9], parent=None, token_ids=[1, 2], block_size=2)
    rank.feed(EngineKvBatch(timestamp=1.0, rank=0, events=[event]))
    assert sent[1].events == [Cleared()]
    assert len(stored_in(sent[2].events[0])) == 1
    assert rank.sync(0).block_size == 2


class Dialect:
    """A reader whose payload is the name of a block; b"" is none."""

    def read(self, payload: bytes, now_s: float) -> list[EngineKvBatch]:
        if not payload:
            raise CodecError("nothing")
        return [stored(payload[0])]


def whole(sent: list[KvBatch], *, polled: bool) -> KvRelay:
    return KvRelay("w", 3, [], polled=polled, new_reader=Dialect, publish=sent.append)


async def test_polled_engine_has_one_rank_and_others_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    sent: list[KvBatch] = []
    made = whole(sent, polled=True)
    made.attach(0)
    elsewhere = EngineKvBatch(timestamp=1.0, rank=1, events=stored(2).events)
    made.take([stored(1), elsewhere])
    made.take([elsewhere])
    await asyncio.sleep(2 * GATHER_S)
    assert [(batch.rank, batch.seq) for batch in sent] == [(0, 0)]
    assert caplog.text.count("rank_ignored") == 1
    made.reset("lost")
    made.detach()
    assert sent[1].events == [Cleared()]
    assert made.sync(KvSync(rank=0, from_seq=2)).resets == 1


def test_engine_without_events_has_no_rank() -> None:
    sent: list[KvBatch] = []
    made = whole(sent, polled=False)
    made.attach(16)
    made.detach()
    made.attach(16)
    made.beat()
    assert sent == []
    assert made.sync(KvSync(rank=0, from_seq=0)).next_seq == 0


def orphan(name: int) -> EngineKvBatch:
    event = EngineStored(block_hashes=[name], parent=10_000, token_ids=[name] * 4, block_size=4)
    return EngineKvBatch(timestamp=0.0, rank=0, events=[event])


def tail(name: int) -> EngineKvBatch:
    event = EngineStored(block_hashes=[name], parent=None, token_ids=[name] * 2, block_size=2)
    return EngineKvBatch(timestamp=0.0, rank=0, events=[event])


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    found = [(r.levelno, r.getMessage()) for r in caplog.records]
    caplog.clear()
    return found


def test_skipped_blocks_are_a_warning_once_a_streak(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dynctl.worker.kv_relay")
    rank = relay([])
    rank.feed(stored(1))
    rank.beat()
    assert said(caplog) == []
    for name in (2, 3, 4):
        rank.feed(orphan(name))
        rank.feed(orphan(name))
        rank.beat()
    counts = "worker=w rank=0 unknown_parent={} malformed=0 partial=0"
    assert said(caplog) == [(logging.WARNING, "kv_events.skipped " + counts.format(2))]
    rank.beat()
    rank.beat()
    assert said(caplog) == [(logging.INFO, "kv_events.skipped_no_more " + counts.format(6))]
    rank.feed(orphan(5))
    rank.beat()
    assert said(caplog) == [(logging.WARNING, "kv_events.skipped " + counts.format(7))]


def test_partial_blocks_alone_do_not_alarm_nor_hide_lost_ones(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dynctl.worker.kv_relay")
    rank = relay([])
    rank.feed(stored(1))
    for name in (2, 3):
        rank.feed(tail(name))
        rank.beat()
    assert [level for level, _ in said(caplog)] == [logging.INFO]
    rank.feed(tail(4))
    rank.feed(orphan(5))
    rank.beat()
    text = "kv_events.skipped worker=w rank=0 unknown_parent=1 malformed=0 partial=3"
    assert said(caplog) == [(logging.WARNING, text)]


def test_images_are_told_of_once_and_again_to_readers_that_missed_it() -> None:
    sent: list[KvBatch] = []
    rank = relay(sent, kept=1)
    for name, tokens, place in ((1, [5, 9, 9, 9], 1), (2, [9, 9, 9, 5], 0), (3, [5, 9, 9, 9], 1)):
        event = EngineStored(
            block_hashes=[name], parent=None, token_ids=tokens, block_size=4, shown=[[("cat", place)]]
        )
        rank.feed(EngineKvBatch(timestamp=0.0, rank=0, events=[event]))
    image = Shown("cat", [(9, 3)])
    assert [batch.shown for batch in sent] == [[], [image]]  # the third holds nothing new
    reply = rank.sync(0)
    assert reply.snapshot is not None
    assert reply.shown == [image]
    assert rank.sync(1).batches[0].shown == [image]


class ChainReader:
    """Each payload is a number: that block, which follows on the one before."""

    def read(self, payload: bytes, now_s: float) -> list[EngineKvBatch]:
        name = int(payload)
        event = EngineStored(
            block_hashes=[name], parent=name - 1 if name else None, token_ids=[name] * 4, block_size=4
        )
        return [EngineKvBatch(timestamp=float(name), rank=0, events=[event])]


async def test_a_relay_that_goes_on_knows_what_the_engine_does_not_tell_again() -> None:
    """An engine repeats its last events only, and of a prompt whose beginning is not known nothing is."""
    publisher = EnginePublisher(
        EngineEventSource("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", "kv"), buffer_steps=2
    )
    live, replay = publisher.start()
    source = EngineEventSource(live, replay, "kv")

    def listening(memories: Sequence[RankMemory] = ()) -> KvRelay:
        made = KvRelay("w", 1, [source], polled=False, new_reader=ChainReader, publish=lambda batch: None)
        made.recall(memories)
        made.attach(4)
        return made

    async def held(one: KvRelay, count: int) -> list[Stored]:
        async with asyncio.timeout(10):
            while True:
                reply = one.sync(KvSync(rank=0, from_seq=99))
                assert reply.snapshot is not None
                if sum(len(stored.hashes) for stored in reply.snapshot) >= count:
                    return reply.snapshot
                await asyncio.sleep(0.01)

    former = listening()
    await asyncio.sleep(0.2)
    for number in range(6):
        publisher.publish(b"%d" % number)
    await held(former, 6)
    memories = former.memory()
    former.detach()
    assert memories[0].next_batch == 6
    publisher.publish(b"6")  # while nobody listens
    after, stranger = listening(memories), listening()
    publisher.publish(b"7")
    whole = await held(after, 8)
    assert after.sync(KvSync(rank=0, from_seq=0)).snapshot == whole
    assert after.sync(KvSync(rank=0, from_seq=0)).resets == 0
    assert stranger.sync(KvSync(rank=0, from_seq=99)).snapshot == []
    after.detach()
    stranger.detach()
    publisher.close()


@pytest.mark.parametrize("now_s", [0.0, 0.05, 0.2, 1_800_000_000.0, 1_800_000_000.199, 1_800_000_123.456])
def test_all_workers_tell_at_the_same_moments_by_their_clocks(now_s: float) -> None:
    wait_s = until_told(now_s)
    assert 0 < wait_s <= GATHER_S
    moment = (now_s + wait_s) / GATHER_S
    assert moment == pytest.approx(round(moment), abs=1e-4)
