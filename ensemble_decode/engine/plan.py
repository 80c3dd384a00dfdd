"""The plan of a decode step on a device with streams and graphs: plain data, no tensor, no torch.

A decode step whose rows are all alike (one new token each, nothing asked for but the next token) is captured once for each
:class:`Bucket` and replayed. What the capture holds, in which order and on which stream, and where each input lies in
the one buffer that is copied before a replay, is said here; ``engine/graphs.py`` carries it out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ensemble_decode.engine.batch import Batch, Layout, SampleRow
from ensemble_decode.ops.paged_attention import BLOCK_SIZE

#: The stream of the target, of combination and sampling. The others fork from it and are joined to it.
MAIN = 0
#: Rows that a step is padded to: every small size, then steps that waste an eighth at most.
ROWS = (
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    *range(10, 17, 2),
    *range(20, 33, 4),
    *range(40, 65, 8),
    *range(80, 129, 16),
    *range(160, 257, 32),
)
#: Fields of the input buffer begin at multiples of this many bytes (vector loads, and a cache line).
ALIGNMENT = 128
_ITEM_SIZE = {"int64": 8, "int32": 4, "float32": 4}

Nucleus = Literal["combined", "target"]


@dataclass(frozen=True, slots=True)
class Bucket:
    """What one captured step serves.

    Attributes
    ----------
    rows : int
        Sequences, padding included.
    blocks : int
        Width of the block tables: the longest context is ``16 · blocks`` tokens.
    hidden : tuple of int
        Pairs that steer some row by its hidden states, before the head.
    logits : tuple of int
        Pairs that steer some row by logits. Which of the two a row takes is its own affair and never its company's, so
        that its bits are the same in every batch; a pair may be in both.
    nucleus : {"combined", "target"}
        That of the steered rows; the others' kept set is the same in both.
    """

    rows: int
    blocks: int
    hidden: tuple[int, ...] = ()
    logits: tuple[int, ...] = ()
    nucleus: Nucleus = "combined"

    @property
    def pairs(self) -> tuple[int, ...]:
        return tuple(sorted({*self.hidden, *self.logits}))


@dataclass(frozen=True, slots=True)
class Member:
    """Who computes what: a pool, and the view of every sequence that it sees."""

    pool: int
    view: int = 0


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """One group's forward: its members' rows one member after another, on one stream."""

    group: int
    stream: int
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """An event is recorded on a stream."""

    stream: int
    event: str


@dataclass(frozen=True, slots=True)
class Wait:
    """A stream waits for an event."""

    stream: int
    event: str


@dataclass(frozen=True, slots=True)
class Forward:
    """A group's forward is issued to a stream."""

    stream: int
    group: int


@dataclass(frozen=True, slots=True)
class Sample:
    """Combination and sampling are issued to a stream."""

    stream: int = MAIN


Operation = Record | Wait | Forward | Sample


@dataclass(frozen=True, slots=True)
class Field:
    """One input of a step: where it lies in the buffer, in bytes, and what it is."""

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape) * _ITEM_SIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A bucket's captured step: the groups' rows, the operations in their order, the inputs' places."""

    bucket: Bucket
    groups: tuple[GroupPlan, ...]
    operations: tuple[Operation, ...]
    fields: tuple[Field, ...]

    @property
    def input_bytes(self) -> int:
        return _aligned(self.fields[-1].end)

    def place(self, member: Member) -> tuple[int, int]:
        """(group, first row) of a member's rows."""
        for plan in self.groups:
            if member in plan.members:
                return plan.group, plan.members.index(member) * self.bucket.rows
        raise KeyError(member)


def target(layout: Layout) -> Member:
    return Member(layout.target_pool)


def sides(layout: Layout, pair: int) -> tuple[Member, Member]:
    """A pair's two members; without an anti-expert the target stands there."""
    item = layout.pairs[pair]
    if item.anti_expert_pool is None:
        return Member(item.expert_pool, item.expert_view), target(layout)
    return Member(item.expert_pool, item.expert_view), Member(item.anti_expert_pool, item.anti_expert_view)


def streams_of(groups: int, main_group: int, parallel: bool) -> tuple[int, ...]:
    """The stream of each group: the target's group on the main one, each other on its own."""
    free = iter(range(1, groups))
    return tuple(MAIN if group == main_group or not parallel else next(free) for group in range(groups))


def fork_join(groups: Sequence[int], streams: Sequence[int]) -> tuple[Operation, ...]:
    """Forwards of ``groups``, the side streams forked from the main one by an event and joined to it by one each.

    Side streams are issued to first: the main one has work to wait for anyway.
    """
    side = [group for group in groups if streams[group] != MAIN]
    operations: list[Operation] = []
    if side:
        operations.append(Record(MAIN, "fork"))
    for group in side:
        operations += [
            Wait(streams[group], "fork"),
            Forward(streams[group], group),
            Record(streams[group], f"join {streams[group]}"),
        ]
    operations += [Forward(MAIN, group) for group in groups if streams[group] == MAIN]
    operations += [Wait(MAIN, f"join {streams[group]}") for group in side]
    return tuple(operations)


def step_plan(layout: Layout, pool_groups: Sequence[int], streams: Sequence[int], bucket: Bucket) -> StepPlan:
    """The plan of ``bucket``. ``pool_groups[i]`` is the group of pool i, ``streams[g]`` the stream of group g."""
    members = {target(layout): None}
    for pair in bucket.pairs:
        members.update(dict.fromkeys(sides(layout, pair)))
    by_group: dict[int, list[Member]] = {}
    for member in sorted(members, key=lambda m: (m.pool, m.view)):
        by_group.setdefault(pool_groups[member.pool], []).append(member)
    groups = tuple(GroupPlan(g, streams[g], tuple(by_group[g])) for g in sorted(by_group))
    operations = (*fork_join([plan.group for plan in groups], streams), Sample())
    return StepPlan(bucket, groups, operations, _fields(bucket, groups))


def _fields(bucket: Bucket, groups: Sequence[GroupPlan]) -> tuple[Field, ...]:
    shapes: list[tuple[str, tuple[int, ...], str]] = []
    for plan in groups:
        rows = len(plan.members) * bucket.rows
        shapes += [
            (f"tokens {plan.group}", (rows,), "int64"),
            (f"positions {plan.group}", (rows,), "int64"),
            (f"context_len {plan.group}", (rows,), "int32"),
            (f"block_table {plan.group}", (rows, bucket.blocks), "int32"),
        ]
    for name, dtype in (("temperature", "float32"), ("top_k", "int32"), ("top_p", "float32"), ("min_p", "float32")):
        shapes.append((name, (bucket.rows,), dtype))
    shapes += [("seed", (bucket.rows,), "int64"), ("position", (bucket.rows,), "int64")]
    shapes.append(("alpha hidden", (bucket.rows, len(bucket.hidden)), "float32"))
    shapes.append(("alpha logits", (bucket.rows, len(bucket.logits)), "float32"))
    fields: list[Field] = []
    offset = 0
    for name, shape, dtype in shapes:
        fields.append(Field(name, offset, shape, dtype))
        offset = _aligned(fields[-1].end)
    return tuple(fields)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def widths(max_model_len: int) -> tuple[int, ...]:
    """Widths of block tables: 1,024 tokens, four times as many, and so on up to the longest sequence."""
    longest = -(-max_model_len // BLOCK_SIZE)
    out = [64]
    while out[-1] < longest:
        out.append(out[-1] * 4)
    return (*out[:-1], min(out[-1], longest))


def takes_logits(row: SampleRow, joins: Sequence[bool]) -> bool:
    """Whether a row's pairs meet in logits: the target's are wanted by themselves, or some side has another head."""
    return row.nucleus == "target" or not all(joins[item.pair] for item in row.steering)


def bucket_of(batch: Batch, joins: Sequence[bool], rows: Sequence[int], blocks: Sequence[int]) -> Bucket | None:
    """The bucket that serves ``batch``; None where it takes the eager path.

    A batch is served if it only decodes: every span is one token with one output, belongs to one sample row, and no row
    wants edits, log-probabilities, scores or a draft's mixture. ``joins[i]``: pair i can be combined before the target's head.
    """
    if batch.drafts or batch.scores or not batch.samples or len(batch.samples) > rows[-1]:
        return None
    longest = 0
    for span in batch.spans:
        if len(span.tokens) != 1 or span.outputs != 1:
            return None
        longest = max(longest, span.start + 1)
    owner: dict[int, int] = {}
    hidden, logits = set[int](), set[int]()
    nuclei = set[Nucleus]()
    for index, row in enumerate(batch.samples):
        if row.edits is not None or row.logprobs >= 0 or row.mixture:
            return None
        for span_id in spans_of(row):
            if owner.setdefault(span_id, index) != index:
                return None
        if row.steering:
            nuclei.add(row.nucleus)
            (logits if takes_logits(row, joins) else hidden).update(item.pair for item in row.steering)
    if len(owner) != len(batch.spans) or len(nuclei) > 1:
        return None
    needed = -(-longest // BLOCK_SIZE)
    if needed > blocks[-1]:
        return None
    return Bucket(
        next(size for size in rows if size >= len(batch.samples)),
        next(width for width in blocks if width >= needed),
        tuple(sorted(hidden)),
        tuple(sorted(logits)),
        nuclei.pop() if nuclei else "combined",
    )


def spans_of(row: SampleRow) -> tuple[int, ...]:
    """The spans that a row's logits come from, its own first."""
    return (row.span, *(span for item in row.steering for span in (item.expert_span, item.anti_expert_span)))
