from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynctl.kv.index import Index
from dynctl.kv.media import Layouts
from dynctl.protocol.kv_events import Cleared, KvBatch, KvEvent, KvSyncReply, Removed, Shown, Stored
from dynctl.router import indexer as indexer_module
from dynctl.router.indexer import Indexer, Sync


@dataclass
class Worker:
    """A worker that publishes numbered batches, keeps the last `kept` of them, and answers syncs."""

    incarnation: int = 1
    rank: int = 0
    kept: int = 3
    held: set[int] = field(default_factory=set)
    batches: list[KvBatch] = field(default_factory=list)
    resets: int = 0

    def publish(self, *events: KvEvent) -> KvBatch:
        for event in events:
            if isinstance(event, Stored):
                self.held.update(event.hashes)
            elif isinstance(event, Removed):
                self.held.difference_update(event.hashes)
            else:
                self.held.clear()
        batch = KvBatch("w", self.incarnation, self.rank, len(self.batches), list(events), 16)
        self.batches.append(batch)
        return batch

    def answer(self, sync: Sync) -> KvSyncReply:
        """The batches from `sync.from_seq` on if they are all kept, else a snapshot."""
        count = len(self.batches)
        within = count - sync.from_seq <= self.kept
        return KvSyncReply(
            incarnation=self.incarnation,
            rank=self.rank,
            next_seq=count,
            batches=self.batches[sync.from_seq :] if within else [],
            snapshot=None if within else [Stored(sorted(self.held))],
            block_size=16,
            resets=self.resets,
        )


class Reader:
    """An indexer and the index it keeps."""

    def __init__(self, max_pending: int = 100) -> None:
        self.index = Index()
        self.indexer = Indexer(self.index, max_pending=max_pending)

    def holds(self, rank: int = 0) -> set[int]:
        return {h for h in range(100) if self.index.match([h]).get(("w", rank))}

    def settle(self, worker: Worker, sync: Sync | None) -> None:
        """Ask until nothing is asked for any more."""
        while sync is not None:
            sync = self.indexer.on_reply("w", worker.answer(sync))
            while self.indexer.load("w", worker.rank):
                pass

    def state(self, rank: int = 0) -> str:
        state = self.indexer.state("w", rank)
        return state.state if state else "not followed"


def joined(worker: Worker, max_pending: int = 100) -> Reader:
    reader = Reader(max_pending)
    (sync,) = reader.indexer.join("w", worker.incarnation, 1)
    reader.settle(worker, sync)
    return reader


def test_worker_that_joins_is_asked_for_everything_per_rank() -> None:
    reader = Reader()
    assert reader.indexer.join("w", 3, 2) == [Sync("w", 3, 0, 0), Sync("w", 3, 1, 0)]
    assert reader.state() == reader.state(1) == "syncing"
    assert reader.indexer.join("w", 3, 2) == [], "it is followed already"


def test_next_batch_is_applied_and_a_repeat_ignored() -> None:
    worker = Worker()
    reader = joined(worker)
    assert reader.state() == "synced"
    batch = worker.publish(Stored([1, 2]))
    assert reader.indexer.on_batch(batch) is None
    assert reader.indexer.on_batch(worker.publish(Removed([1]))) is None
    assert reader.indexer.on_batch(batch) is None
    assert reader.holds() == {2}


def test_gap_asks_for_what_is_missing_and_keeps_what_came_later() -> None:
    worker = Worker()
    reader = joined(worker)
    worker.publish(Stored([1]))
    later = worker.publish(Removed([1]), Stored([2]))
    assert reader.indexer.on_batch(later) == Sync("w", 1, 0, 0)
    assert reader.indexer.on_batch(worker.publish(Stored([3]))) is None, "it has been asked for already"
    assert reader.state() == "syncing"
    assert reader.holds() == set()
    reader.settle(worker, Sync("w", 1, 0, 0))
    assert reader.holds() == {2, 3}
    assert reader.state() == "synced"


def test_batch_that_was_only_late_closes_the_gap_by_itself() -> None:
    worker = Worker()
    reader = joined(worker)
    first, second = worker.publish(Stored([1])), worker.publish(Stored([2]))
    assert reader.indexer.on_batch(second) is not None
    assert reader.indexer.on_batch(first) is None
    assert reader.state() == "synced"
    assert reader.holds() == {1, 2}


def test_too_old_a_gap_resets_and_reloads_visibly() -> None:
    worker = Worker(kept=0)
    reader = joined(worker)
    reader.indexer.on_batch(worker.publish(Stored([1])))
    worker.publish(Removed([1]))
    sync = reader.indexer.on_batch(worker.publish(Stored([2])))
    worker.resets = 4
    reader.settle(worker, sync)
    assert reader.holds() == {2}
    (state,) = reader.indexer.states()
    assert (state.gaps, state.reloads, state.worker_resets, state.block_size) == (1, 1, 4, 16)


def test_old_blocks_stay_until_the_answer_comes() -> None:
    worker = Worker()
    reader = joined(worker)
    reader.indexer.on_batch(worker.publish(Stored([1])))
    worker.publish()
    assert reader.indexer.on_batch(worker.publish()) is not None
    assert reader.holds() == {1}


def test_answer_older_than_what_is_known_changes_nothing() -> None:
    worker = Worker(kept=0)
    reader = joined(worker)
    worker.publish(Stored([1]))
    old = worker.answer(Sync("w", 1, 0, 0))
    reader.indexer.on_batch(worker.batches[0])
    reader.indexer.on_batch(worker.publish(Stored([2])))
    assert reader.indexer.on_reply("w", old) is None
    assert reader.holds() == {1, 2}
    assert reader.state() == "synced"


def test_batches_during_a_long_load_wait_for_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexer_module, "LOAD_CHUNK", 2)
    worker = Worker(kept=0)
    worker.publish(Stored([1, 2, 3, 4, 5]))
    reader = Reader()
    (sync,) = reader.indexer.join("w", 1, 1)
    reply = worker.answer(sync)
    assert reader.indexer.on_reply("w", reply) is None
    assert reader.indexer.load("w", 0)
    assert reader.indexer.on_batch(worker.publish(Removed([5]))) is None
    assert reader.indexer.on_reply("w", reply) is None, "one answer at a time"
    assert reader.state() == "syncing"
    assert reader.indexer.load("w", 0)
    assert not reader.indexer.load("w", 0)
    assert reader.holds() == {1, 2, 3, 4}
    assert reader.state() == "synced"
    assert not reader.indexer.load("w", 0)


def test_gap_found_during_a_load_is_asked_for_after_it() -> None:
    worker = Worker(kept=0)
    worker.publish(Stored([1]))
    reader = Reader()
    (sync,) = reader.indexer.join("w", 1, 1)
    reader.indexer.on_reply("w", worker.answer(sync))
    worker.publish(Stored([2]))
    reader.indexer.on_batch(worker.publish(Stored([3])))
    reader.indexer.load("w", 0)
    assert reader.state() == "syncing"
    state = reader.indexer.state("w", 0)
    assert state is not None
    assert state.next_seq == 1


def test_snapshot_with_batches_beyond_it_is_taken_whole() -> None:
    reader = Reader()
    reader.indexer.join("w", 1, 1)
    beyond = KvBatch("w", 1, 0, 7, [Stored([2])])
    reply = KvSyncReply(incarnation=1, rank=0, next_seq=7, batches=[beyond], snapshot=[Stored([1])])
    assert reader.indexer.on_reply("w", reply) is None
    assert not reader.indexer.load("w", 0)
    assert reader.holds() == {1, 2}


def test_empty_snapshot_forgets_what_was_held() -> None:
    worker = Worker(kept=0)
    reader = joined(worker)
    reader.indexer.on_batch(worker.publish(Stored([1])))
    worker.publish(Cleared())
    reader.settle(worker, reader.indexer.on_batch(worker.publish()))
    assert reader.holds() == set()
    assert reader.state() == "synced"


def test_answer_with_a_hole_is_asked_for_again() -> None:
    worker = Worker()
    reader = joined(worker)
    for number in range(3):
        worker.publish(Stored([number]))
    hole = KvSyncReply(incarnation=1, rank=0, next_seq=3, batches=[worker.batches[0], worker.batches[2]])
    assert reader.indexer.on_reply("w", hole) == Sync("w", 1, 0, 1)
    short = KvSyncReply(incarnation=1, rank=0, next_seq=9, batches=worker.batches)
    assert reader.indexer.on_reply("w", short) == Sync("w", 1, 0, 3)
    assert reader.holds() == {0, 1, 2}


def test_kept_batches_are_bounded_and_what_was_dropped_is_asked_for() -> None:
    worker = Worker(kept=100)
    reader = joined(worker, max_pending=2)
    worker.publish(Stored([0]))
    syncs = [reader.indexer.on_batch(worker.publish(Stored([number]))) for number in range(1, 6)]
    assert [sync for sync in syncs if sync] == [Sync("w", 1, 0, 0)]
    (state,) = reader.indexer.states()
    assert state.pending == 2
    partly = KvSyncReply(incarnation=1, rank=0, next_seq=2, batches=worker.batches[:2])
    assert reader.indexer.on_reply("w", partly) == Sync("w", 1, 0, 2)
    reader.settle(worker, Sync("w", 1, 0, 2))
    assert reader.holds() == {0, 1, 2, 3, 4, 5}


def test_newer_incarnation_ends_the_older_at_once() -> None:
    old, new = Worker(), Worker(incarnation=2)
    reader = joined(old)
    reader.indexer.on_batch(old.publish(Stored([1])))
    batch = new.publish(Stored([2]))
    assert reader.indexer.on_batch(batch) is None
    assert reader.holds() == set()
    assert reader.state() == "not followed", "nobody has said yet how to ask it"
    assert reader.indexer.on_batch(new.publish(Stored([3]))) is None
    assert reader.indexer.join("w", 1, 1) == [], "the older one does not come back"
    (sync,) = reader.indexer.join("w", 2, 1)
    reader.settle(new, sync)
    assert reader.holds() == {2, 3}


def test_older_incarnation_is_ignored() -> None:
    old, new = Worker(), Worker(incarnation=2)
    reader = joined(new)
    reader.indexer.on_batch(new.publish(Stored([2])))
    assert reader.indexer.on_batch(old.publish(Stored([1]))) is None
    assert reader.indexer.on_reply("w", old.answer(Sync("w", 1, 0, 0))) is None
    assert reader.indexer.join("w", 1, 1) == []
    assert reader.holds() == {2}


def test_answer_of_a_newer_incarnation_ends_the_older() -> None:
    reader = joined(Worker())
    assert reader.indexer.on_reply("w", Worker(incarnation=2).answer(Sync("w", 1, 0, 0))) is None
    assert reader.state() == "not followed"


def test_member_that_joins_anew_drops_what_the_older_held() -> None:
    old = Worker()
    reader = joined(old)
    reader.indexer.on_batch(old.publish(Stored([1])))
    assert reader.indexer.join("w", 2, 1) == [Sync("w", 2, 0, 0)]
    assert reader.holds() == set()


def test_unknown_worker_is_ignored_and_one_that_left_forgotten() -> None:
    worker = Worker()
    reader = Reader()
    assert reader.indexer.on_batch(worker.publish(Stored([1]))) is None
    assert reader.indexer.on_reply("w", worker.answer(Sync("w", 1, 0, 0))) is None
    assert not reader.indexer.load("w", 0)
    reader = joined(worker)
    assert reader.holds() == {1}
    reader.indexer.leave("w")
    reader.indexer.leave("w")
    assert reader.holds() == set()
    assert reader.indexer.states() == []


def test_rank_the_membership_did_not_tell_of_is_followed_too() -> None:
    worker = Worker(rank=5)
    reader = joined(Worker())
    sync = reader.indexer.on_batch(worker.publish(Stored([1])))
    assert sync == Sync("w", 1, 5, 0)
    reader.settle(worker, sync)
    assert reader.holds(5) == {1}


EVENTS: st.SearchStrategy[KvEvent] = st.one_of(
    st.builds(Stored, st.lists(st.integers(0, 9), max_size=4)),
    st.builds(Removed, st.lists(st.integers(0, 9), max_size=4)),
    st.builds(Cleared),
)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["publish", "deliver", "drop", "twice", "last first", "ask", "answer"]),
        st.lists(EVENTS, max_size=2),
    ),
    max_size=60,
)


class Wire(Reader):
    """A worker and a reader with a bad wire between them: what is under way each way."""

    def __init__(self, kept: int, max_pending: int) -> None:
        super().__init__(max_pending)
        self.worker = Worker(kept=kept)
        self.asked = self.indexer.join("w", 1, 1)
        self.batches: list[KvBatch] = []
        self.answers: list[KvSyncReply] = []

    def step(self, action: str, events: list[KvEvent]) -> None:
        if action == "publish":
            self.batches.append(self.worker.publish(*events))
        elif action == "ask":
            self.answers += [self.worker.answer(sync) for sync in self.asked[:1]]
            del self.asked[:1]
        elif action == "answer":
            for reply in self.answers[:1]:
                self.note(self.indexer.on_reply("w", reply))
                self.indexer.load("w", 0)
            del self.answers[:1]
        elif self.batches:
            batch = self.batches.pop(-1 if action == "last first" else 0)
            for _ in range({"drop": 0, "twice": 2}.get(action, 1)):
                self.note(self.indexer.on_batch(batch))

    def note(self, sync: Sync | None) -> None:
        self.asked += [sync] if sync is not None else []

    def calm_down(self) -> None:
        """One more batch arrives, and all that is asked for is answered: as the service does it."""
        while self.indexer.load("w", 0):
            pass
        self.note(self.indexer.on_batch(self.worker.publish()))
        state = self.indexer.state("w", 0)
        assert state is not None
        if state.state == "syncing":
            self.settle(self.worker, Sync("w", 1, 0, state.next_seq))


@given(STEPS, st.integers(0, 6), st.integers(1, 5))
def test_index_ends_equal_to_the_worker_whatever_is_lost_repeated_or_reordered(
    steps: list[tuple[str, list[KvEvent]]], kept: int, max_pending: int
) -> None:
    wire = Wire(kept, max_pending)
    for action, events in steps:
        wire.step(action, events)
    wire.calm_down()
    assert wire.holds() == wire.worker.held
    assert wire.state() == "synced"


def test_what_images_look_like_is_learnt_from_batches_and_snapshots() -> None:
    layouts = Layouts()
    indexer = Indexer(Index(), layouts)
    indexer.join("w", 1, 1)
    cat, dog = Shown("cat", [(9, 3)]), Shown("dog", [(9, 4)])
    indexer.on_batch(KvBatch("w", 1, 0, 0, [Stored([1])], 16, [cat]))
    assert layouts.all() == [cat]
    snapshot = [Stored([1, 2])]
    indexer.on_reply("w", KvSyncReply(incarnation=1, rank=0, next_seq=3, snapshot=snapshot, shown=[cat, dog]))
    assert layouts.all() == [cat, dog]
    indexer.leave("w")
    assert layouts.get("cat") == [(9, 3)]
