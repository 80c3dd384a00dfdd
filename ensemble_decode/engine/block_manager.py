"""KV blocks: who holds which, and which hold a known prefix.

One block number means the same slot in every pool of the ensemble, so one table serves all models. A full block whose
content is known is found again by (the block before it, its tokens, the pools that computed it): the chain of parents
makes the key mean the whole prefix, and a block computed without the experts never serves a steered request.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ensemble_decode.ops.paged_attention import BLOCK_SIZE

#: (parent's content id, tokens of the block, pools that computed it)
Key = tuple[int, tuple[int, ...], tuple[int, ...]]
_ROOT = 0


class OutOfBlocks(Exception):
    """No block is free. The scheduler answers by preempting."""


class BlockManager:
    """Counts references to blocks, keeps full ones for reuse, and evicts the least recently used.

    Parameters
    ----------
    num_blocks : int
        Blocks in every pool.
    prefix_caching : bool
        Whether full blocks are found again by content.
    """

    def __init__(self, num_blocks: int, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.prefix_caching = prefix_caching
        self._references = [0] * num_blocks
        self._empty = list(range(num_blocks - 1, -1, -1))  # free, content unknown
        self._reusable: OrderedDict[int, None] = OrderedDict()  # free, content known; oldest first
        self._block_of: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}
        # A content id names one prefix for ever. A block's number would not do: the block can be refilled while
        # children that were keyed by it are still there.
        self._content_of: dict[int, int] = {}
        self._next_content = 1

    @property
    def num_free(self) -> int:
        return len(self._empty) + len(self._reusable)

    @staticmethod
    def blocks_for(tokens: int) -> int:
        return -(-tokens // BLOCK_SIZE)

    def allocate(self) -> int:
        """A block of unknown content, held once."""
        if self._empty:
            block = self._empty.pop()
        elif self._reusable:
            block, _ = self._reusable.popitem(last=False)
            self._forget(block)
        else:
            raise OutOfBlocks
        self._references[block] = 1
        return block

    @contextmanager
    def borrow(self, lengths: Sequence[int]) -> Iterator[list[list[int]]]:
        """A block table for each number of tokens, for the while; for work beside the scheduler."""
        tables: list[list[int]] = [[] for _ in lengths]
        try:
            for table, tokens in zip(tables, lengths, strict=True):
                for _ in range(self.blocks_for(tokens)):
                    table.append(self.allocate())
            yield tables
        finally:
            for table in tables:
                self.release(table)

    def share(self, block: int) -> int:
        """Hold a block once more."""
        if self._references[block] == 0:
            del self._reusable[block]
        self._references[block] += 1
        return block

    def release(self, table: list[int]) -> None:
        """Let go of every block of a table, last first, so that the longest prefixes live longest."""
        for block in reversed(table):
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._key_of:
                    self._reusable[block] = None
                else:
                    self._content_of.pop(block, None)
                    self._empty.append(block)
        table.clear()

    def match(self, tokens: list[int], pools: tuple[int, ...]) -> list[int]:
        """Blocks that already hold the longest known prefix of ``tokens``, each held once more for the caller.

        The last token is never matched: its forward gives the logits to sample from.
        """
        found: list[int] = []
        if not self.prefix_caching:
            return found
        parent = _ROOT
        for start in range(0, (len(tokens) - 1) // BLOCK_SIZE * BLOCK_SIZE, BLOCK_SIZE):
            block = self._block_of.get((parent, tuple(tokens[start : start + BLOCK_SIZE]), pools))
            if block is None:
                break
            found.append(self.share(block))
            parent = self._content_of[block]
        return found

    def register(self, table: list[int], index: int, tokens: list[int], pools: tuple[int, ...]) -> None:
        """Say that block ``index`` of ``table`` is full and computed in ``pools``, so that others can find it."""
        block = table[index]
        if not self.prefix_caching or block in self._key_of:
            return
        parent = _ROOT if index == 0 else self._content_of.get(table[index - 1], -1)
        if parent < 0:
            return  # the block before it holds the same content as one registered earlier: the chain is that one's
        key = (parent, tuple(tokens[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]), pools)
        known = self._block_of.get(key)
        if known is not None:
            self._content_of[block] = self._content_of[known]  # so that our next block still chains to this prefix
            return
        self._block_of[key] = block
        self._key_of[block] = key
        self._content_of[block] = self._next_content
        self._next_content += 1

    def _forget(self, block: int) -> None:
        del self._block_of[self._key_of.pop(block)]
        del self._content_of[block]
