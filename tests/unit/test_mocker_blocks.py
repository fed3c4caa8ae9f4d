"""KV blocks: hashes, prefix caching, LRU eviction, and events that tell exactly what is cached."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dynctl.mocker.blocks import (
    ROOT_HASH,
    BlockPool,
    BlocksCleared,
    BlocksRemoved,
    BlocksStored,
    block_hash,
    event_hash,
)


def chain(tokens: list[int], size: int, salt: str = "") -> BlocksStored:
    hashes: list[bytes] = []
    for start in range(0, len(tokens) - size + 1, size):
        parent = hashes[-1] if hashes else ROOT_HASH
        hashes.append(block_hash(parent, tuple(tokens[start : start + size]), "" if hashes else salt))
    return BlocksStored(hashes, None, tokens[: len(hashes) * size], salt)


def fill(pool: BlockPool, tokens: list[int]) -> list[int]:
    """Compute a prompt of whole blocks; its blocks, in use."""
    told = chain(tokens, pool.block_size)
    blocks = pool.allocate(len(told.hashes))
    assert blocks is not None
    pool.commit(blocks, told)
    return blocks


def test_hashes_are_those_vllm_publishes() -> None:
    """Vectors of a live vLLM worker: tokens 10..105 in blocks of 32, and 0..31 in blocks of 16."""
    assert [event_hash(digest) for digest in chain(list(range(10, 106)), 32).hashes] == [
        4983110391196617255,
        8832359988540648073,
        9334213283667987988,
    ]
    assert [event_hash(digest) for digest in chain(list(range(32)), 16).hashes] == [
        3262291359910021016,
        7142137847444424233,
    ]


def test_a_salt_changes_every_hash_of_a_chain() -> None:
    plain, salted = chain(list(range(8)), 4), chain(list(range(8)), 4, "s")
    assert not set(plain.hashes) & set(salted.hashes)


def test_a_prompt_is_found_again_until_its_blocks_are_evicted() -> None:
    pool = BlockPool(4, 2)
    blocks = fill(pool, [1, 2, 3, 4])
    pool.release(blocks)
    told = chain([1, 2, 3, 4, 5, 6], 2)
    assert pool.match(told.hashes) == blocks
    assert pool.allocate(4) is not None
    assert pool.match(told.hashes) == []


def test_the_least_recently_freed_goes_first_and_tails_before_heads() -> None:
    pool = BlockPool(4, 1)
    old, young = fill(pool, [1, 2]), fill(pool, [3, 4])
    pool.release(old)
    pool.release(young)
    assert pool.allocate(4) == [old[1], old[0], young[1], young[0]]


def test_a_block_used_again_is_no_longer_the_oldest() -> None:
    pool = BlockPool(2, 1)
    first, second = fill(pool, [1]), fill(pool, [2])
    pool.release(first)
    pool.release(second)
    pool.acquire(first)
    pool.release(first)
    assert pool.allocate(1) == second


def test_blocks_without_content_are_handed_out_before_cached_ones() -> None:
    pool = BlockPool(3, 1)
    cached = fill(pool, [1])
    empty = pool.allocate(2)
    assert empty is not None
    pool.release(cached)
    pool.release(empty)
    assert pool.allocate(2) == empty
    assert pool.cached()


def test_too_few_free_blocks_change_nothing() -> None:
    pool = BlockPool(2, 1)
    pool.release(fill(pool, [1]))
    pool.take_events()
    assert pool.allocate(3) is None
    assert pool.free == 2
    assert pool.take_events() == []


def test_a_shared_block_is_freed_by_its_last_user() -> None:
    pool = BlockPool(1, 1)
    blocks = fill(pool, [1])
    pool.acquire(blocks)
    pool.release(blocks)
    assert (pool.free, pool.usage) == (0, 1.0)
    assert pool.idle(blocks) == 0
    pool.release(blocks)
    assert (pool.free, pool.usage) == (1, 0.0)
    assert pool.idle(blocks) == 1


def test_a_duplicate_stays_private_and_untold() -> None:
    pool = BlockPool(8, 1)
    fill(pool, [1, 2])
    pool.take_events()
    fill(pool, [1, 2, 3])
    events = pool.take_events()
    told = chain([1, 2, 3], 1)
    assert events == [BlocksStored([told.hashes[2]], told.hashes[1], [3])]


def test_a_hole_in_what_is_new_gives_two_events() -> None:
    pool = BlockPool(8, 1)
    told = chain([1, 2, 3], 1)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.commit(blocks, BlocksStored([told.hashes[1]], told.hashes[0], [2]))
    pool.take_events()
    fill(pool, [1, 2, 3])
    assert pool.take_events() == [
        BlocksStored([told.hashes[0]], None, [1]),
        BlocksStored([told.hashes[2]], told.hashes[1], [3]),
    ]


def test_eviction_is_told_block_by_block_before_the_store_that_caused_it() -> None:
    pool = BlockPool(2, 1)
    first = chain([1, 2], 1)
    pool.release(fill(pool, [1, 2]))
    fill(pool, [3, 4])
    second = chain([3, 4], 1)
    assert pool.take_events() == [
        BlocksStored(first.hashes, None, [1, 2]),
        BlocksRemoved([first.hashes[1]]),
        BlocksRemoved([first.hashes[0]]),
        BlocksStored(second.hashes, None, [3, 4]),
    ]


def test_without_caching_nothing_is_found_or_told() -> None:
    pool = BlockPool(2, 1, caching=False)
    pool.release(fill(pool, [1, 2]))
    assert pool.match(chain([1, 2], 1).hashes) == []
    assert pool.take_events() == []


def test_reset_waits_for_the_last_user_and_then_forgets_all() -> None:
    pool = BlockPool(2, 1)
    blocks = fill(pool, [1])
    assert not pool.reset()
    pool.release(blocks)
    pool.take_events()
    assert pool.reset()
    assert pool.take_events() == [BlocksCleared()]
    assert pool.match(chain([1], 1).hashes) == []
    assert pool.allocate(2) is not None
    assert pool.take_events() == []


class PoolMachine(RuleBasedStateMachine):
    """Prompts come, share prefixes, go and are reset in any order."""

    SIZE = 2
    COUNT = 6

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.COUNT, self.SIZE)
        self.users: list[list[int]] = []
        self.told: set[bytes] = set()

    @rule(tokens=st.lists(st.integers(0, 1), min_size=0, max_size=8))
    def admit(self, tokens: list[int]) -> None:
        """As a scheduler does it: match, acquire, allocate the rest, commit."""
        told = chain(tokens, self.SIZE)
        matched = self.pool.match(told.hashes)
        missing = len(told.hashes) - len(matched)
        if self.pool.free - self.pool.idle(matched) < missing:
            return
        self.pool.acquire(matched)
        fresh = self.pool.allocate(missing)
        assert fresh is not None
        assert not set(fresh) & set(matched)
        for user in self.users:
            assert not set(fresh) & set(user)
        first = len(matched)
        part = BlocksStored(
            told.hashes[first:],
            told.hashes[first - 1] if first else None,
            told.tokens[first * self.SIZE :],
        )
        self.pool.commit(fresh, part)
        self.users.append(matched + fresh)

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """Any user goes."""
        self.pool.release(self.users.pop(data.draw(st.integers(0, len(self.users) - 1))))

    @rule()
    def reset(self) -> None:
        """Only works when nobody is there."""
        assert self.pool.reset() == (not any(self.users))

    @invariant()
    def no_block_is_leaked(self) -> None:
        """Free and used blocks are all blocks."""
        used = {block for user in self.users for block in user}
        assert self.pool.free == self.COUNT - len(used)

    @invariant()
    def references_are_users(self) -> None:
        """A block is free exactly when nobody uses it, and counts its users."""
        counts = [sum(user.count(block) for user in self.users) for block in range(self.COUNT)]
        assert self.pool._refs == counts

    @invariant()
    def replaying_events_gives_the_cached_set(self) -> None:
        """Nothing is stored twice, nothing removed that is not there."""
        for event in self.pool.take_events():
            if isinstance(event, BlocksStored):
                assert not self.told & set(event.hashes)
                assert len(event.tokens) == len(event.hashes) * self.SIZE
                self.told |= set(event.hashes)
            elif isinstance(event, BlocksRemoved):
                assert set(event.hashes) <= self.told
                self.told -= set(event.hashes)
            else:
                self.told.clear()
        assert self.told == self.pool.cached()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
