"""The plan of a captured step: buckets, streams, events and the inputs' places, as data."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_decode.engine.batch import Batch, Edits, SampleRow, ScoreRow, Span, Steering
from ensemble_decode.engine.plan import (
    ALIGNMENT,
    MAIN,
    ROWS,
    Bucket,
    Forward,
    Member,
    Record,
    Sample,
    Wait,
    bucket_of,
    fork_join,
    step_plan,
    streams_of,
    widths,
)
from tests.engine.fake import LAYOUT

BLOCKS = widths(LAYOUT.max_model_len)


def batch(rows: int = 3, **changes: object) -> Batch:
    """A decode step: row i steered by "gender" (pair 0) if i is odd."""
    spans = [Span([7], 20 + i, [2 * i, 2 * i + 1], (0, 1, 2) if i % 2 else (0,), 1) for i in range(rows)]
    samples = [
        SampleRow(i, (Steering(0, 0.5, i, i),) if i % 2 else (), 1.0, 0, 0.9, 0.0, "combined", 5, 21 + i)
        for i in range(rows)
    ]
    samples[-1] = replace(samples[-1], **changes)  # type: ignore[arg-type]
    return Batch(spans, samples)


def test_rows_that_only_decode_have_a_bucket() -> None:
    assert bucket_of(batch(), (False,), ROWS, BLOCKS) == Bucket(3, 10, (), (0,))
    assert bucket_of(batch(), (True,), ROWS, BLOCKS) == Bucket(3, 10, (0,), ())
    assert bucket_of(batch(1), (True,), ROWS, BLOCKS) == Bucket(1, 10)
    assert bucket_of(batch(9), (True,), ROWS, BLOCKS) == Bucket(10, 10, (0,))
    # One row's wish for the target's nucleus sends its own pairs through logits.
    assert bucket_of(batch(2, nucleus="target"), (True,), ROWS, BLOCKS) == Bucket(2, 10, (), (0,), "target")


@pytest.mark.parametrize(
    "other",
    [
        batch(logprobs=0),
        batch(edits=Edits()),
        batch(mixture=((1, 1.0),)),
        batch(4, nucleus="target"),  # two nuclei among the steered rows
        batch(2, span=0),  # two rows of one span
        Batch([], []),
        replace(batch(), scores=[ScoreRow(0, (), [1])]),
        replace(batch(), spans=[*batch().spans, Span([1], 3, [9], (0,), 1)]),  # a span that nobody samples from
        replace(batch(), spans=[Span([1, 2], 3, [9], (0,), 1), *batch().spans[1:]]),  # a prompt
        replace(batch(), spans=[Span([1], 2000, [9], (0,), 1), *batch().spans[1:]]),  # longer than any table
        batch(ROWS[-1] + 1),
    ],
    ids=["logprobs", "edits", "mixture", "nuclei", "forks", "empty", "scores", "drafts", "prompt", "length", "rows"],
)
def test_others_have_none(other: Batch) -> None:
    assert bucket_of(other, (True,), ROWS, BLOCKS) is None


def test_rows_and_widths() -> None:
    assert all(a < b for a, b in itertools.pairwise(ROWS))
    assert all(b - a <= max(1, -(-b // 5)) for a, b in itertools.pairwise(ROWS))
    assert widths(160) == (10,)
    assert widths(8192) == (64, 256, 512)
    assert widths(131072) == (64, 256, 1024, 4096, 8192)


@given(st.integers(1, 6), st.data())
def test_forks_and_joins_are_pairs(groups: int, data: st.DataObject) -> None:
    main = data.draw(st.integers(0, groups - 1))
    streams = streams_of(groups, main, data.draw(st.booleans()))
    assert streams[main] == MAIN
    present = sorted(data.draw(st.sets(st.integers(0, groups - 1), min_size=1)))
    operations = fork_join(present, streams)
    assert sorted(op.group for op in operations if isinstance(op, Forward)) == present
    recorded: set[str] = set()
    joined: set[int] = set()
    ready = {MAIN}
    for op in operations:
        if isinstance(op, Record):
            assert op.stream in ready
            assert op.event not in recorded, "an event is recorded once a step"
            recorded.add(op.event)
        elif isinstance(op, Wait):
            assert op.event in recorded, "nobody waits for what comes later"
            ready.add(op.stream)
            if op.stream == MAIN:
                joined.add(int(op.event.removeprefix("join ")))
        elif isinstance(op, Forward):
            assert op.stream in ready, "a stream has work before it was forked"
            assert op.stream == streams[op.group]
    assert joined == ready - {MAIN}


@pytest.mark.parametrize("parallel", [True, False])
def test_the_plan_of_a_step(parallel: bool) -> None:
    """Target in group 0 with "tone"; "gender" in groups of its own."""
    streams = streams_of(3, 0, parallel)
    plan = step_plan(LAYOUT, (0, 1, 2, 0), streams, Bucket(4, 10, (1,), (0, 2)))
    assert [(g.group, g.members) for g in plan.groups] == [
        (0, (Member(0), Member(0, 1), Member(3))),
        (1, (Member(1),)),
        (2, (Member(2),)),
    ]
    assert plan.place(Member(3)) == (0, 8)
    assert plan.operations[-1] == Sample(MAIN)
    assert len({op.stream for op in plan.operations}) == (3 if parallel else 1)
    shapes = {field.name: field.shape for field in plan.fields}
    assert shapes["block_table 0"] == (12, 10)
    assert shapes["alpha logits"] == (4, 2)
    end = 0
    for field in plan.fields:
        assert field.offset % ALIGNMENT == 0
        assert field.offset >= end, f"{field.name} overlaps the field before"
        end = field.end
    assert end <= plan.input_bytes


def test_a_bucket_without_pairs_computes_the_target_alone() -> None:
    plan = step_plan(LAYOUT, (0, 1, 2, 0), streams_of(3, 0, True), Bucket(4, 10))
    assert plan.operations == (Forward(MAIN, 0), Sample(MAIN))
