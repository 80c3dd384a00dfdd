"""The sampler's Triton kernels under the checking interpreter: token for token the reference, every claim about bytes.

``ENSEMBLE_DECODE_FULL_GRID=1`` runs the whole grid of the sampling contract instead of samples from it: every vocabulary, type, number
of pairs and nucleus in both forms, and for each vocabulary, type and form up to 4097 tokens every combination of parameters once.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")
pytest.importorskip("greenlet", reason="needs greenlet")

from ensemble_decode.ops import EnsembleSample, reference

from ..ops.sampling_cases import Case, Judge, endless, make_case
from ..ops.test_philox import KNOWN_ANSWERS
from .interp import SCHEDULES, KernelFault, run
from .triton_sample import Interpreted, with_bug

FULL = os.environ.get("ENSEMBLE_DECODE_FULL_GRID") == "1"
FORMS = {"one-launch": True, "two-launches": False}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PAIRS = [(0, False), (1, False), (1, True), (2, False), (3, False), (3, True)]
VOCABULARIES = [1, 3, 7, 1023, 4096, 4097, 32000, 50257, 128256]
TOP_P = [1e-6, 0.05, 0.5, 0.9, 0.99, 1.0]
forms = pytest.mark.parametrize("one_launch", FORMS.values(), ids=FORMS.keys())


@pytest.fixture(autouse=True, scope="module")
def _one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def judge(request: pytest.FixtureRequest) -> Iterator[Judge]:
    judge = Judge()
    yield judge
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nTriton ensemble_sample: {judge.flips} flips near a tie in {judge.rows} rows against the reference")
    assert judge.flips <= 1 + judge.rows // 1000


def same(a: EnsembleSample, b: EnsembleSample) -> bool:
    return all(torch.equal(x.view(torch.int32), y.view(torch.int32)) for x, y in zip(a, b, strict=True))


# ── parity ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def each_vocabulary() -> Iterator[object]:
    """(V, type, form). Two launches of a long row are many programs to interpret: all of them, or one type for each but the longest."""
    for vocab, dtype, (name, one_launch) in itertools.product(VOCABULARIES, DTYPES, FORMS.items()):
        one_type = vocab <= 50257 and DTYPES.index(dtype) == VOCABULARIES.index(vocab) % 3
        if FULL or one_launch or vocab <= 4097 or one_type:
            yield pytest.param(vocab, dtype, one_launch, id=f"{vocab}-{str(dtype).removeprefix('torch.')}-{name}")


@pytest.mark.parametrize(("vocab", "dtype", "one_launch"), each_vocabulary())
def test_parity(vocab: int, dtype: torch.dtype, one_launch: bool, judge: Judge) -> None:
    """Pairs and nucleus with parameters dealt to them: samples of either, or all."""
    top_k = sorted({0, 1, 2, 50, vocab - 1, vocab})
    grid = list(itertools.product(TOP_P, top_k, [0.0, 0.02, 0.3], [1.0, 0.7, 2.0, 0.0]))
    if not FULL and vocab > 4097:  # what one program does alone, over the whole row and slowly, is met at 4096
        grid = [g for g in grid if g[0] > 0.01 and (g[0] == 1.0 or g[1] in (0, vocab))]
    parameters = endless(grid, seed=vocab + DTYPES.index(dtype))
    kinds = list(itertools.product(PAIRS, ("combined", "target")))
    rows = (-(-len(grid) // len(kinds)) if vocab <= 4097 else 2) if FULL else 4 if vocab <= 4097 else 1
    if not FULL:
        first = 5 * DTYPES.index(dtype) + vocab  # each type has other kinds
        kinds = [kinds[(first + 5 * i) % len(kinds)] for i in range(2 if vocab <= 4097 else 1)]
    for number, ((pairs, difference), nucleus) in enumerate(kinds):
        case = make_case(
            vocab,
            list(itertools.islice(parameters, rows)),
            pairs=pairs,
            difference=difference,
            dtype=dtype,
            padding=13 * (number % 2),
            nucleus=nucleus,
            seed=vocab + 31 * pairs + difference,
        )
        judge.check(case, Interpreted(one_launch).sample(case))


@forms
@pytest.mark.parametrize("pairs", [5, 9])
def test_parity_with_more_pairs_than_are_unrolled(pairs: int, one_launch: bool, judge: Judge) -> None:
    case = make_case(1500, [(0.9, 0, 0.0, 1.0), (1.0, 7, 0.0, 0.7)], pairs=pairs)
    judge.check(case, Interpreted(one_launch).sample(case))


@pytest.mark.parametrize("top_k", [0, 50])
def test_a_staircase_longer_than_the_lists(top_k: int, judge: Judge) -> None:
    """Flat rows at a tiny p, whose answer lies many candidates in: the last program goes on alone."""
    case = make_case(5000, [(0.001, top_k, 0.0, 1.0)] * 2, pairs=1)
    case.target, case.expert, case.anti_expert = (
        torch.rand(shape, generator=torch.Generator().manual_seed(3))
        for shape in ((2, 5000), (1, 2, 5000), (1, 2, 5000))
    )
    operator = Interpreted(one_launch=False)
    judge.check(case, operator.sample(case))
    assert operator.logits_read["target"] > 2.5 * 2 * 5000 * 4  # it did go on


@forms
def test_combined_logits_as_target(one_launch: bool, judge: Judge) -> None:
    case = make_case(1001, [(0.9, 0, 0.0, 1.0), (1.0, 0, 0.0, 0.0), (1.0, 5, 0.1, 2.0)])
    case.target_is_combined = True
    got = Interpreted(one_launch).sample(case)
    judge.check(case, got)
    assert got.target_logprob.isnan().all()


@forms
@pytest.mark.parametrize("dtype", DTYPES if FULL else [torch.bfloat16], ids=str)
def test_every_pattern_of_numbers_that_are_not_finite(dtype: torch.dtype, one_launch: bool, judge: Judge) -> None:
    patterns = list(itertools.product([0.5, -math.inf, math.inf, math.nan], repeat=3))
    case = make_case(40, [(0.9, 0, 0.0, 1.0)] * len(patterns), pairs=1, dtype=dtype)
    assert case.expert is not None
    assert case.anti_expert is not None
    case.alpha = torch.ones(len(patterns), 1)
    for row, (z, plus, minus) in enumerate(patterns):
        case.target[row, 39], case.expert[0, row, 39], case.anti_expert[0, row, 39] = z, plus, minus
    got = Interpreted(one_launch).sample(case)
    judge.check(case, got)
    assert torch.equal(got.token >= 0, torch.tensor([z in (0.5, -math.inf) for z, _, _ in patterns]))


@forms
def test_rows_with_nothing_to_sample_leave_the_others_alone(one_launch: bool) -> None:
    case = make_case(3000, [(0.9, 0, 0.0, 1.0), (0.5, 9, 0.0, 0.7), (1.0, 0, 0.1, 1.0)] * 2, pairs=1)
    before = Interpreted(one_launch).sample(case)
    case.target[1] = -math.inf
    case.target[3, 2999] = math.nan
    case.target[4, 0] = math.inf
    after = Interpreted(one_launch).sample(case)
    assert (after.token < 0).tolist() == [False, True, False, True, True, False]
    kept = torch.tensor([0, 2, 5])
    assert same(EnsembleSample(*(x[kept] for x in after)), EnsembleSample(*(x[kept] for x in before)))


@forms
@pytest.mark.parametrize("nucleus", ["combined", "target"])
def test_a_min_p_that_keeps_no_token_ends(nucleus: str, one_launch: bool) -> None:
    """Values are not looked at on the host, and none may hold the device for ever."""
    rows = [(top_p, top_k, min_p, 1.0) for top_p in (1.0, 0.9) for top_k in (0, 5) for min_p in (1.0, 1.5, math.inf)]
    case = make_case(1500, rows, pairs=1, nucleus=nucleus)
    token = Interpreted(one_launch).sample(case).token
    assert torch.equal(token >= 0, case.min_p <= 1.0)


@forms
def test_noise_of_minus_infinity_and_ties(one_launch: bool) -> None:
    """Words from 0xFFFFFF80 on round to u = 1. Token 0 has one under the first seed, token 5 under the second."""
    row = torch.zeros(1, 1000)
    row[0, 5] = 9.0
    alone = torch.full((1, 6), -math.inf)
    alone[0, 5] = 0.0
    tied = torch.zeros(1, 3000)
    tied[0, [1023, 1024, 2999]] = 1.0
    for z, seed, parameters, token in (
        (torch.zeros(1, 1), 16390493, (1.0, 0, 0.0, 1.0), 0),
        (row, 1142540, (1.0, 1, 0.0, 1.0), 5),
        (row, 1142540, (0.5, 0, 0.0, 1.0), 5),
        (alone, 1142540, (1.0, 0, 0.0, 1.0), 5),
        (tied, 0, (1.0, 0, 0.0, 0.0), 1023),
    ):
        case = make_case(z.shape[1], [parameters])
        case.target, case.seed, case.position = z, torch.tensor([seed]), torch.tensor([0])
        assert Interpreted(one_launch).sample(case).token.item() == token


# ── programs in any order, and nothing but the row decides ──────────────────────────────────────────────────────────
MIXED = [(0.9, 0, 0.0, 1.0), (1.0, 0, 0.0, 1.0), (0.5, 40, 0.0, 0.7), (0.05, 0, 0.0, 2.0), (1.0, 3, 0.1, 1.0)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_any_order_of_programs_without_races(schedule: str, judge: Judge) -> None:
    case = make_case(3500, MIXED, pairs=2, padding=12)
    once = Interpreted(one_launch=False).sample(case)
    for order_seed in range(2 if FULL and schedule in ("shuffled", "preemptive") else 1):
        got = Interpreted(False, schedule, order_seed, races=True).sample(case)
        assert same(got, once)
    judge.check(case, once)


@forms
def test_only_the_row_decides(one_launch: bool) -> None:
    """A row alone, repeated and in another place: the same bits."""
    case = make_case(2500, MIXED, pairs=1)
    whole = Interpreted(one_launch).sample(case)
    for index in (torch.tensor([3]), torch.tensor([4, 4, 0, 2]), torch.arange(4, -1, -1)):
        part = Interpreted(one_launch).sample(case.rows(index))
        assert same(part, EnsembleSample(*(x[index] for x in whole)))


def test_philox_words_are_the_published_ones() -> None:
    from .sample_kernels import philox_words

    for counter, key, words in KNOWN_ANSWERS:
        out = torch.zeros(4, dtype=torch.int64)
        run(philox_words, (1,), torch.tensor([*counter, *key]), out)
        assert tuple(out.tolist()) == words


# ── bytes ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def factors(case: Case, operator: Interpreted) -> dict[str, float]:
    """Bytes read of each logits tensor over its size, less the few that a row's logprob takes."""
    operator.sample(case)
    sizes = {"target": case.target, "expert": case.expert, "anti": case.anti_expert}
    return {
        name: operator.logits_read[name] / (math.prod(x.shape) * x.element_size())
        for name, x in sizes.items()
        if x is not None
    }


def one_read(vocab: int) -> float:
    return 1 + 1 / vocab


@forms
@pytest.mark.parametrize(
    ("vocab", "dtype"),
    [
        (v, d)
        for v in (4099, 50257)
        for d in (torch.float32, torch.bfloat16)
        if FULL or (v > 4099) == (d == torch.bfloat16)
    ],
    ids=str,
)
def test_without_filters_every_logit_is_read_once(vocab: int, dtype: torch.dtype, one_launch: bool) -> None:
    case = make_case(vocab, [(1.0, 0, 0.0, 1.0), (1.0, vocab, 0.0, 0.7), (0.9, 0, 0.0, 0.0)], pairs=2, dtype=dtype)
    case.alpha = torch.ones(3, 2)
    for factor in factors(case, Interpreted(one_launch)).values():
        assert 1 <= factor <= one_read(vocab)


def test_one_launch_reads_every_logit_once_whatever_the_filters() -> None:
    case = make_case(4099, MIXED, pairs=1)
    case.alpha = torch.ones(len(MIXED), 1)
    for factor in factors(case, Interpreted(one_launch=True)).values():
        assert 1 <= factor <= one_read(4099)


@pytest.mark.parametrize(
    ("top_p", "nucleus"), [(0.5, "combined"), (0.9, "combined"), (0.99, "combined"), (0.9, "target")]
)
def test_two_launches_read_at_most_twice(top_p: float, nucleus: str, capsys: pytest.CaptureFixture) -> None:
    """And less where chunks hold nothing above the candidates, or the first candidate is certainly kept."""
    case = make_case(10000, [(top_p, 0, 0.0, 1.0)] * 4, pairs=1, nucleus=nucleus)
    case.alpha = torch.ones(4, 1)
    read = factors(case, Interpreted(one_launch=False))
    with capsys.disabled():
        print(f" [top-p {top_p}: {read['target']:.2f} reads]", end="")
    assert all(1 <= factor <= 2.1 for factor in read.values())


@forms
def test_a_pair_that_is_off_is_not_read(one_launch: bool) -> None:
    case = make_case(3000, [(0.9, 0, 0.0, 1.0)] * 2, pairs=2)
    assert case.expert is not None
    assert case.anti_expert is not None
    case.alpha = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    case.expert[0], case.anti_expert[:, 0] = math.nan, math.inf
    operator = Interpreted(one_launch)
    got = operator.sample(case)
    assert (got.token == case.run(reference.ensemble_sample).token).all()
    assert 3000 * 4 <= operator.logits_read["expert"] <= 2 * 3001 * 4  # of four rows, one


# ── the checks can fail ─────────────────────────────────────────────────────────────────────────────────────────────
BUGS: dict[str, dict[str, Any]] = {
    "nucleus twice as large": {"right": "(mass < nucleus)", "wrong": "(mass < 2 * nucleus)"},
    "one token too many in top-k": {"right": "(count < most)", "wrong": "(count <= most)"},
    "min-p ignored": {"right": "if least_ratio > 0.0:", "wrong": "if least_ratio > 1.0:"},
    "words of a quad swapped": {"right": "tl.join(w0, w2)", "wrong": "tl.join(w2, w0)", "file": "philox"},
    "a mask does not hold": {"right": 'z == float("-inf")', "wrong": 'z == float("inf")', "file": "combine"},
    "a difference poisons": {
        "right": "difference - difference == 0.0",
        "wrong": "difference != 3.0",
        "file": "combine",
    },
}


@forms
@pytest.mark.parametrize("bug", BUGS)
def test_a_wrong_result_is_noticed(bug: str, one_launch: bool, tmp_path: Path) -> None:
    module = with_bug(tmp_path, **BUGS[bug])
    rows = [(0.5, 0, 0.0, 1.0), (0.9, 0, 0.0, 1.0), (1.0, 2, 0.0, 1.0), (1.0, 1, 0.0, 1.0), (1.0, 0, 0.3, 1.0)] * 4
    case = make_case(1100, rows, pairs=1)
    assert case.expert is not None
    assert case.anti_expert is not None
    case.target[:, 3] = case.expert[:, :, 4] = case.anti_expert[:, :, 4] = -math.inf
    case.alpha = torch.ones(len(rows), 1)
    case.expert[:, :, 3], case.alpha[0] = 1e30, 1e30
    judged = Judge()
    with pytest.raises(AssertionError):
        judged.check(case, Interpreted(one_launch, module=module).sample(case))


FAULTS: dict[str, dict[str, Any]] = {
    "a tail without a mask": {
        "right": "first + BLOCK <= vocab",
        "wrong": "first <= vocab",
        "fault": "out-of-bounds load",
    },
    "a ticket that orders nothing": {"right": 'sem="acq_rel"', "wrong": 'sem="relaxed"', "fault": "race"},
    "a ticket nobody sets": {
        "right": "if chunk == 0:\n        tl.store(ticket",
        "wrong": "if chunk < 0:\n        tl.store(ticket",
        "fault": "uninitialised",
    },
    "chunks that share their results": {
        "right": "row * FIELDS * LANES + chunk",
        "wrong": "row * FIELDS * LANES",
        "fault": "race",
    },
    "a result left out": {"right": "out + BAD * LANES", "wrong": "out + MAX * LANES", "fault": "uninitialised"},
}


@pytest.mark.parametrize("bug", FAULTS)
def test_a_fault_is_noticed(bug: str, tmp_path: Path) -> None:
    planted = dict(FAULTS[bug])
    fault = planted.pop("fault")
    module = with_bug(tmp_path, **planted)
    case = make_case(3500, MIXED, pairs=1)
    with pytest.raises(KernelFault, match=fault):
        Interpreted(False, "preemptive", races=True, module=module).sample(case)


def test_a_second_read_is_noticed(tmp_path: Path) -> None:
    """Bytes are counted where the loads are: a kernel that loads the target twice reads it twice."""
    module = with_bug(
        tmp_path,
        "x = tl.load(source + at, mask=on, other=other)",
        "x = tl.load(source + at, mask=on, other=other) + 0.0 * tl.load(source + at, mask=on, other=other)",
        file="combine",
    )
    case = make_case(4096, [(1.0, 0, 0.0, 1.0)] * 2, pairs=1)
    assert factors(case, Interpreted(False, module=module))["target"] > one_read(4096)


def test_reading_a_pair_that_is_off_is_noticed(tmp_path: Path) -> None:
    module = with_bug(tmp_path, "weight != 0.0", "weight == weight", file="combine")
    case = make_case(3000, [(0.9, 0, 0.0, 1.0)] * 2, pairs=2)
    case.alpha = torch.zeros(2, 2)
    operator = Interpreted(True, module=module)
    operator.sample(case)
    assert operator.logits_read["expert"] > 0
