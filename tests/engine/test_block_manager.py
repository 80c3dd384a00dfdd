"""Blocks: each is free or held, and what is found by content is what was registered."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ensemble_decode.engine.batch import BLOCK_SIZE
from ensemble_decode.engine.block_manager import BlockManager, OutOfBlocks


def tokens_of(*blocks: int) -> list[int]:
    return [block for block in blocks for _ in range(BLOCK_SIZE)]


def fill(manager: BlockManager, tokens: list[int], pools=(0,)) -> list[int]:
    """A table for ``tokens``, its full blocks registered."""
    table = manager.match(tokens, pools)
    known = len(table)
    while len(table) < manager.blocks_for(len(tokens)):
        table.append(manager.allocate())
    for index in range(known, len(tokens) // BLOCK_SIZE):
        manager.register(table, index, tokens, pools)
    return table


def test_the_longest_known_prefix_is_shared_but_never_the_last_token():
    manager = BlockManager(8)
    table = fill(manager, tokens_of(1, 2, 3))
    assert manager.match([*tokens_of(1, 2, 3), 9], (0,)) == table
    assert manager.match(tokens_of(1, 2, 3), (0,)) == table[:2]
    assert manager.match(tokens_of(1, 4, 3), (0,)) == table[:1]
    assert manager.match(tokens_of(2, 3), (0,)) == []
    assert manager.match(tokens_of(1)[:-1], (0,)) == []


def test_pools_are_part_of_the_key():
    manager = BlockManager(8)
    fill(manager, tokens_of(1, 2))
    assert manager.match(tokens_of(1, 2), (0, 1)) == []


def test_a_block_with_the_same_tokens_after_another_prefix_is_another_block():
    manager = BlockManager(8)
    one, two = fill(manager, tokens_of(1, 5)), fill(manager, tokens_of(2, 5))
    assert one[1] != two[1]
    assert manager.match([*tokens_of(2, 5), 9], (0,)) == two


def test_an_evicted_parent_takes_its_children_s_chain_with_it():
    """The parent's block number is used again for other content: its children may not be found under that."""
    manager = BlockManager(2)
    table = fill(manager, tokens_of(1, 2))
    parent, child = table
    manager.release(table)
    manager.share(child)  # held, so the parent alone is evicted
    other = [manager.allocate()]
    assert other == [parent]
    manager.register(other, 0, tokens_of(7), (0,))
    assert manager.match([*tokens_of(7, 2), 9], (0,)) == [parent]
    assert manager.match([*tokens_of(1, 2), 9], (0,)) == []


def test_eviction_is_least_recently_used_and_deepest_first():
    manager = BlockManager(3)
    manager.release(fill(manager, tokens_of(1, 2)))
    manager.release(fill(manager, tokens_of(3)))
    manager.allocate()
    assert manager.match([*tokens_of(1, 2), 9], (0,)) != []  # (1) stayed, (2) went
    assert manager.match([*tokens_of(3), 9], (0,)) != []


def test_the_same_content_computed_twice_is_kept_once():
    manager = BlockManager(4)
    one = [manager.allocate(), manager.allocate()]
    two = [manager.allocate(), manager.allocate()]
    for table in (one, two):
        for index in range(2):
            manager.register(table, index, tokens_of(1, 2), (0,))
    first = list(one)
    manager.release(two)
    assert manager.match([*tokens_of(1, 2), 9], (0,)) == first


def test_without_prefix_caching_nothing_is_found():
    manager = BlockManager(4, prefix_caching=False)
    fill(manager, tokens_of(1, 2))
    assert manager.match([*tokens_of(1, 2), 9], (0,)) == []


def test_no_block_left():
    manager = BlockManager(1)
    table = [manager.allocate()]
    with pytest.raises(OutOfBlocks):
        manager.allocate()
    manager.release(table)
    assert table == []
    assert manager.num_free == 1


class Blocks(RuleBasedStateMachine):
    """Tables over a three-letter alphabet of blocks, so that prefixes meet; a model of what each block holds."""

    @initialize(size=st.integers(1, 10), caching=st.booleans())
    def start(self, size, caching):
        self.manager = BlockManager(size, caching)
        self.tables: list[tuple[list[int], list[int], tuple[int, ...]]] = []
        self.holds: dict[int, tuple] = {}  # block → the prefix and pools that it was last filled with

    @rule(
        letters=st.lists(st.integers(0, 2), min_size=1, max_size=5),
        pools=st.sampled_from([(0,), (0, 1)]),
        extra=st.integers(0, 3),
    )
    def come(self, letters, pools, extra):
        tokens = tokens_of(*letters) + [9] * extra
        free = self.manager.num_free
        table = self.manager.match(tokens, pools)
        for index, block in enumerate(table):
            assert self.holds[block] == (tuple(letters[: index + 1]), pools), "a block of other content was found"
        assert len(table) * BLOCK_SIZE < len(tokens)
        known = len(table)
        try:
            while len(table) < self.manager.blocks_for(len(tokens)):
                table.append(self.manager.allocate())
        except OutOfBlocks:
            assert self.manager.num_free == 0
            self.manager.release(table)
            assert self.manager.num_free == free
            return
        for index in range(known, len(table)):
            self.holds.pop(table[index], None)
            if index < len(letters):
                self.holds[table[index]] = (tuple(letters[: index + 1]), pools)
                self.manager.register(table, index, tokens, pools)
        self.tables.append((tokens, table, pools))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data):
        tokens, table, pools = data.draw(st.sampled_from(self.tables))
        full = len(tokens) // BLOCK_SIZE
        self.tables.append((tokens[: full * BLOCK_SIZE], [self.manager.share(block) for block in table[:full]], pools))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def leave(self, data):
        index = data.draw(st.integers(0, len(self.tables) - 1))
        _, table, _ = self.tables.pop(index)
        self.manager.release(table)

    @invariant()
    def every_block_is_free_or_held(self):
        if not hasattr(self, "manager"):
            return
        manager = self.manager
        references = [0] * manager.num_blocks
        for _, table, _ in self.tables:
            for block in table:
                references[block] += 1
        assert manager._references == references
        free = [*manager._empty, *manager._reusable]
        assert sorted(free) == [block for block, count in enumerate(references) if count == 0]
        assert manager.num_free == len(free)
        # Nothing is remembered of a block that is empty, and the two directories agree.
        assert {block: key for key, block in manager._block_of.items()} == manager._key_of
        assert not set(manager._empty) & (set(manager._key_of) | set(manager._content_of))
        assert set(manager._reusable) <= set(manager._key_of)


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(deadline=None, database=None, max_examples=100, stateful_step_count=30)
