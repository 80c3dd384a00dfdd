"""The operator against the reference and against the contract: parity, invariance, statistics, masks, errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ensemble_decode import ops
from ensemble_decode.ops import EnsembleSample, reference

from .sampling_cases import Case, Judge, chi_square, endless, logits, make_case

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PAIRS = [(0, False), (1, False), (1, True), (2, False), (3, False), (3, True)]
TOP_P = [1e-6, 0.05, 0.5, 0.9, 0.99, 1.0]
compiled = pytest.mark.skipif(not ops.library.available, reason="the C++ operators are not built")


@pytest.fixture(autouse=True, scope="module")
def _one_torch_thread() -> Iterator[None]:
    """The reference is many small operators: more threads only slow it down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def judge(request: pytest.FixtureRequest) -> Iterator[Judge]:
    """One count over the whole file, printed at its end."""
    judge = Judge()
    yield judge
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nensemble_sample: {judge.flips} flips near a tie in {judge.rows} rows against the reference")
    assert judge.flips <= 1 + judge.rows // 1000


@pytest.fixture
def _threads() -> Iterator[None]:
    before = ops.num_threads()
    yield
    ops.set_num_threads(before)


# ── parity with the reference ───────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(
    ("vocab", "rows"),
    [(1, 24), (3, 24), (7, 24), (1023, 24), (4096, 8), (4097, 8), (32000, 2), (50257, 1), (128256, 1)],
)
def test_parity(vocab: int, rows: int, dtype: torch.dtype, judge: Judge) -> None:
    """Sampled from the product of top-p, top-k, min-p, temperature, pairs, padding and nucleus."""
    top_k = sorted({0, 1, 2, 50, vocab - 1, vocab})
    grid = list(itertools.product(TOP_P, top_k, [0.0, 0.02, 0.3], [1.0, 0.7, 2.0, 0.0]))
    parameters = endless(grid, seed=vocab + DTYPES.index(dtype))
    number = itertools.count()
    for (pairs, difference), nucleus in itertools.product(PAIRS, ("combined", "target")):
        case = make_case(
            vocab,
            list(itertools.islice(parameters, rows)),
            pairs=pairs,
            difference=difference,
            dtype=dtype,
            padding=13 * (next(number) % 2),
            nucleus=nucleus,
            seed=vocab + 31 * pairs + difference,
        )
        judge.check(case, case.run(ops.ensemble_sample))


@pytest.mark.parametrize("top_k", [0, 50, 20000])
@pytest.mark.parametrize("top_p", TOP_P)
def test_parity_of_every_filter_on_a_large_vocabulary(top_p: float, top_k: int, judge: Judge) -> None:
    case = make_case(50257, [(top_p, top_k, 0.0, 1.0)] * 3, pairs=1, seed=int(1e6 * top_p) + top_k)
    judge.check(case, case.run(ops.ensemble_sample))


@compiled
@pytest.mark.parametrize("variant", ["v4", "v3", "base"])
def test_parity_of_every_instruction_set(variant: str, judge: Judge) -> None:
    before = torch.ops.ensemble_decode.cpu_variant()
    if not torch.ops.ensemble_decode.set_cpu_variant(variant):
        pytest.skip(f"this machine cannot run {variant}")
    try:
        parameters = endless(list(itertools.product(TOP_P, [0, 50], [0.0, 0.02], [1.0, 0.7, 0.0])), seed=5)
        for dtype, nucleus in itertools.product(DTYPES, ("combined", "target")):
            case = make_case(
                3001, list(itertools.islice(parameters, 12)), pairs=2, dtype=dtype, padding=3, nucleus=nucleus
            )
            judge.check(case, case.run(ops.ensemble_sample))
    finally:
        torch.ops.ensemble_decode.set_cpu_variant(before)


def test_combined_logits_as_target(judge: Judge) -> None:
    case = make_case(1001, [(0.9, 0, 0.0, 1.0), (1.0, 0, 0.0, 0.0), (1.0, 5, 0.1, 2.0)])
    case.target_is_combined = True
    got = case.run(ops.ensemble_sample)
    judge.check(case, got)
    assert got.target_logprob.isnan().all()
    assert not got.logprob.isnan().any()


def test_numbers_stand_for_one_value_a_row() -> None:
    case = make_case(999, [(0.9, 40, 0.01, 0.8)] * 4, pairs=2)
    case.alpha, case.seed, case.position = torch.full((4, 2), 0.5), torch.full((4,), 11), torch.full((4,), 12)
    numbers = {"alpha": 0.5, "temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "seed": 11, "position": 12}
    assert same(ops.ensemble_sample(*case.logits, **numbers), case.run(ops.ensemble_sample))  # type: ignore[arg-type]


def test_ensemble_logprob_agrees_with_what_sampling_reports() -> None:
    case = make_case(5003, [(0.9, 0, 0.0, 0.7), (1.0, 0, 0.0, 0.0), (0.5, 9, 0.0, 1.0), (1.0, 0, 0.0, 1.5)], pairs=2)
    sample = case.run(ops.ensemble_sample)
    for logprobs in (
        ops.ensemble_logprob(*case.logits, sample.token, alpha=case.alpha, temperature=case.temperature),
        reference.ensemble_logprob(*case.logits, sample.token, alpha=case.alpha, temperature=case.temperature),
    ):
        torch.testing.assert_close(logprobs, (sample.logprob, sample.target_logprob), rtol=1e-6, atol=1e-5)


def test_a_token_outside_the_vocabulary_has_no_logprob() -> None:
    case = make_case(50, [(1.0, 0, 0.0, 1.0)] * 4, pairs=1)
    token = torch.tensor([-1, 0, 49, 50])
    for logprob in (
        *ops.ensemble_logprob(*case.logits, token, alpha=case.alpha, temperature=case.temperature),
        *reference.ensemble_logprob(*case.logits, token, alpha=case.alpha, temperature=case.temperature),
    ):
        assert logprob.isnan().tolist() == [True, False, False, True]


# ── nothing but the row decides ─────────────────────────────────────────────────────────────────────────────────────
def same(a: EnsembleSample, b: EnsembleSample) -> bool:
    """To the bit, NaN included."""
    return all(torch.equal(x.view(torch.int32), y.view(torch.int32)) for x, y in zip(a, b, strict=True))


def row_of(sample: EnsembleSample, index: Tensor) -> EnsembleSample:
    return EnsembleSample(*(x[index] for x in sample))


def assert_only_the_row_decides(operator: Callable, case: Case) -> None:
    """Permuted, alone, repeated, and on 1, 2, 3 threads: the same bits."""
    ops.set_num_threads(1)
    whole = case.run(operator)
    order = torch.randperm(case.batch, generator=torch.Generator().manual_seed(1))
    twice = torch.arange(case.batch).repeat(2)
    for threads in (1, 2, 3):
        ops.set_num_threads(threads)
        assert same(case.run(operator), whole)
        assert same(case.rows(order).run(operator), row_of(whole, order))
        assert same(case.rows(twice).run(operator), row_of(whole, twice))
        for row in range(case.batch):
            index = torch.tensor([row])
            assert same(case.rows(index).run(operator), row_of(whole, index))


INVARIANCE = [
    (1.0, 0, 0.0, 1.0),
    (0.9, 0, 0.0, 1.0),
    (0.5, 40, 0.0, 0.7),
    (1.0, 0, 0.05, 2.0),
    (1.0, 7, 0.0, 1.0),
    (0.9, 0, 0.0, 0.0),
    (0.97, 0, 0.0, 8.0),  # nearly flat: too many candidates to gather
    (0.05, 0, 0.0, 4.0),  # more than one round
]


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("nucleus", ["combined", "target"])
@pytest.mark.parametrize(
    ("vocab", "dtype"),
    [(7, torch.float32), (4097, torch.float32), (50257, torch.bfloat16), (128256, torch.float32)],
    ids=str,
)
def test_invariance(vocab: int, dtype: torch.dtype, nucleus: str) -> None:
    case = make_case(vocab, INVARIANCE * 2, pairs=2, dtype=dtype, nucleus=nucleus)
    assert_only_the_row_decides(ops.ensemble_sample, case)


@pytest.mark.usefixtures("_threads")
def test_invariance_notices_noise_that_depends_on_the_rows_place() -> None:
    """The negative control."""

    def placed(*args: Tensor, seed: Tensor, **keywords: object) -> EnsembleSample:
        return ops.ensemble_sample(*args, seed=seed + torch.arange(len(seed)), **keywords)  # type: ignore[arg-type]

    with pytest.raises(AssertionError):
        assert_only_the_row_decides(placed, make_case(4097, INVARIANCE, pairs=1))


def test_padding_of_the_vocabulary_changes_nothing() -> None:
    case = make_case(3001, INVARIANCE, pairs=1)
    padded = make_case(3001, INVARIANCE, pairs=1, padding=87)
    assert same(case.run(ops.ensemble_sample), padded.run(ops.ensemble_sample))


# ── statistics ──────────────────────────────────────────────────────────────────────────────────────────────────────
def draw(z: Tensor, count: int, **options: object) -> Tensor:
    """How often each token comes out over ``count`` seeds, int64 [V]."""
    row = z.unsqueeze(0).expand(count, -1)
    token = ops.ensemble_sample(row, seed=torch.arange(count) * 3, position=17, **options).token  # type: ignore[arg-type]
    return torch.bincount(token, minlength=len(z))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_p": 0.9},
        {"temperature": 0.6},
        {"top_k": 9},
        {"top_k": 20, "top_p": 0.7, "temperature": 1.7},
        {"min_p": 0.1},
    ],
    ids=str,
)
def test_a_million_draws_follow_the_distribution(options: dict, capsys: pytest.CaptureFixture) -> None:
    z = logits(2, 64, torch.Generator().manual_seed(8))[1]
    score = z / options.get("temperature", 1.0)
    keep = reference.kept(score, options.get("top_k", 0), options.get("top_p", 1.0), options.get("min_p", 0.0))
    counts = draw(z, 1_000_000, **options)
    assert counts[~keep].sum() == 0
    p, covered = chi_square(counts, score.double().masked_fill(~keep, -math.inf).softmax(0))
    with capsys.disabled():
        print(f" [chi-square p = {p:.3f}, covered mass {covered:.6f}]", end="")
    assert p > 1e-4


def test_the_statistics_notice_a_wrong_distribution() -> None:
    """The negative control: half a percent more weight on one token."""
    z = logits(2, 64, torch.Generator().manual_seed(8))[1]
    wrong = z.clone()
    wrong[z.argmax()] += 0.02
    assert chi_square(draw(z, 1_000_000), wrong.double().softmax(0))[0] < 1e-4


def test_the_tail_of_a_zipf_row_is_reached() -> None:
    """Tokens rarer than 2⁻²⁰ each, together some 180 in 300,000 draws: within 4 standard deviations."""
    vocab, count = 4096, 300_000
    z = -2 * torch.log(torch.randperm(vocab, generator=torch.Generator().manual_seed(0)) + 1.0)
    probabilities = z.double().softmax(0)
    tail = probabilities < 2.0**-20
    expected = float(probabilities[tail].sum()) * count
    hits = int(draw(z, count)[tail].sum())
    assert expected > 150
    assert abs(hits - expected) < 4 * math.sqrt(expected)


@pytest.mark.parametrize("step", [(1, 0), (0, 1), (1, 1), (2**32, 0), (0x9E3779B97F4A7C15 - 2**64, 0)], ids=str)
def test_neighbouring_seeds_and_positions_are_independent(step: tuple[int, int]) -> None:
    """Pairs of tokens fill a 12 × 12 table as independent draws would."""
    count, z = 200_000, torch.linspace(0, 1.5, 12)
    seed, position = torch.arange(count) * 2, torch.arange(count) // 7
    first, second = (
        ops.ensemble_sample(z.expand(count, -1), seed=seed + i * step[0], position=position + i * step[1]).token
        for i in (0, 1)
    )
    p = z.double().softmax(0)
    assert chi_square(torch.bincount(12 * first + second, minlength=144), torch.outer(p, p).flatten())[0] > 1e-4


# ── masks, ties, and numbers that are not finite ────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("vocab", [2, 40, 1000])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pattern_of_numbers_that_are_not_finite(
    vocab: int, temperature: float, dtype: torch.dtype, judge: Judge
) -> None:
    """NaN or +inf in z makes the row −1; anything in z⁺ and z⁻ only silences that token's difference."""
    patterns = list(itertools.product([0.5, -math.inf, math.inf, math.nan], repeat=3))
    case = make_case(vocab, [(0.9, 0, 0.0, temperature)] * len(patterns), pairs=1, dtype=dtype)
    assert case.expert is not None
    assert case.anti_expert is not None
    case.alpha = torch.ones(len(patterns), 1)
    at = vocab - 1
    for row, (z, plus, minus) in enumerate(patterns):
        case.target[row, at], case.expert[0, row, at], case.anti_expert[0, row, at] = z, plus, minus
    got = case.run(ops.ensemble_sample)
    judge.check(case, got)
    valid = torch.tensor([z in (0.5, -math.inf) for z, _, _ in patterns])
    assert torch.equal(got.token >= 0, valid)
    assert (got.logprob.isnan() == ~valid).all()
    assert (got.target_logprob.isnan() == ~valid).all()
    masked = torch.tensor([z == -math.inf for z, _, _ in patterns])
    assert (got.token[masked] != at).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, None], ids=str)
@pytest.mark.parametrize("place", [0, 255, 256, 2999])
def test_a_row_without_a_valid_sample_leaves_the_others_alone(bad: float | None, place: int) -> None:
    case = make_case(3000, INVARIANCE, pairs=1)
    before = case.run(ops.ensemble_sample)
    if bad is None:
        case.target[2] = -math.inf
    else:
        case.target[2, place] = bad
    after = case.run(ops.ensemble_sample)
    assert after.token[2] == -1
    assert after.logprob[2].isnan()
    assert after.target_logprob[2].isnan()
    others = torch.tensor([0, 1, 3, 4, 5])
    assert same(row_of(after, others), row_of(before, others))


@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.5}, {"temperature": 0.0}, {}], ids=str)
@pytest.mark.parametrize("vocab", [1, 5, 2000])
def test_one_token_left(vocab: int, options: dict) -> None:
    for token in {0, vocab // 2, vocab - 1}:
        z = torch.full((1, vocab), -math.inf)
        z[0, token] = -50.0
        got = ops.ensemble_sample(z, seed=4, position=4, **options)
        assert got.token.item() == token
        assert got.logprob.item() == got.target_logprob.item() == 0.0


@pytest.mark.parametrize(
    "options", [{"top_p": 1e-6}, {"top_k": 1}, {"min_p": 0.999}, {"top_k": 2, "top_p": 0.3}], ids=str
)
def test_all_ties_are_kept(options: dict) -> None:
    """No filter may choose among equals: every token of a flat row comes out."""
    assert (draw(torch.zeros(20), 2000, **options) > 0).all()


def test_greedy_takes_the_lowest_of_equals() -> None:
    for vocab, ties in [(5, (1, 3)), (1000, (256, 257, 900)), (1000, (255, 256)), (70000, (69998, 69999))]:
        z = torch.zeros(1, vocab)
        z[0, list(ties)] = 1.0
        assert ops.ensemble_sample(z, temperature=0.0, seed=0, position=0).token.item() == ties[0]


def test_noise_of_minus_infinity_does_not_lose_the_only_token() -> None:
    """Words from 0xFFFFFF80 on round to u = 1. Token 0 has one under the first seed, token 5 under the second."""
    at_0, at_5 = 16390493, 1142540
    row = torch.zeros(1, 1000)
    row[0, 5] = 9.0
    alone = torch.full((1, 6), -math.inf)
    alone[0, 5] = 0.0
    assert ops.ensemble_sample(torch.zeros(1, 1), seed=at_0, position=0).token.item() == 0
    assert ops.ensemble_sample(torch.zeros(1, 1), top_p=0.5, seed=at_0, position=0).token.item() == 0
    assert ops.ensemble_sample(row, top_k=1, seed=at_5, position=0).token.item() == 5
    assert ops.ensemble_sample(row, top_p=0.5, seed=at_5, position=0).token.item() == 5
    assert ops.ensemble_sample(alone, seed=at_5, position=0).token.item() == 5


def test_a_correction_that_overflows_makes_the_row_invalid_not_the_others(judge: Judge) -> None:
    case = make_case(300, [(0.9, 0, 0.0, 1.0)] * 4, pairs=2)
    assert case.expert is not None
    case.alpha = torch.tensor([[1e30, 1.0], [1.0, 1.0], [1e30, 1e30], [1e30, 0.0]])
    case.expert[0, 0, 7] = 1e20
    case.expert[:, 2, 3] = torch.tensor([1e20, -1e20])
    case.expert[0, 3, 9] = 1e20
    case.target[3, 9] = -math.inf
    case.expert[0, 3] *= 1e-30
    case.anti_expert[0, 3] *= 1e-30  # type: ignore[index]
    got = case.run(ops.ensemble_sample)
    judge.check(case, got)
    assert (got.token >= 0).tolist() == [False, True, False, True]


def test_scores_that_the_temperature_makes_equal_are_ties(judge: Judge) -> None:
    """Neighbouring float32 logits: some quotients by 1.01 are equal, and no filter may tell those tokens apart."""
    z = 1.5 + torch.arange(700) * 2.0**-23
    quotients = z / 1.01
    z = z[: int((quotients[1:] == quotients[:-1]).nonzero().max()) + 2]  # the two largest become equal
    rows = list(
        itertools.product([1.0, 0.5, 1e-6], [0, 1, 5, 600], [0.0, 0.9999999], [1.01, 1.3, 0.97, 1e-3, 3e37, 1e-30])
    )
    case = make_case(len(z), rows)
    case.target = z[torch.randperm(len(z), generator=torch.Generator().manual_seed(2))].expand(len(rows), -1)
    judge.check(case, case.run(ops.ensemble_sample))
    scores = case.scores[0][0]  # at temperature 1.01
    best = (scores == scores.max()).nonzero().flatten()
    assert len(best) > 1
    drawn = draw(case.target[0], 200, temperature=1.01, top_k=1)
    assert (drawn[best] > 0).all()
    assert drawn.sum() == drawn[best].sum()


@pytest.mark.parametrize("nucleus", ["combined", "target"])
def test_a_masked_token_changes_no_bit_of_the_rest(nucleus: str) -> None:
    """A block with a number that is not finite is read another way, and so are those after it: to the same bits."""
    case = make_case(2000, INVARIANCE, pairs=1, nucleus=nucleus)
    case.target[:, 300] = -1e30
    plain = case.run(ops.ensemble_sample)
    case.target[:, 300] = -math.inf
    assert same(case.run(ops.ensemble_sample), plain)


# ── properties ──────────────────────────────────────────────────────────────────────────────────────────────────────
values = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, -math.inf, math.inf, math.nan]),
    st.floats(-30, 30, width=32),
    st.floats(-(2.0**100), 2.0**100, width=32),
)


@st.composite
def cases(draw: Callable) -> Case:
    vocab, pairs = draw(st.integers(1, 20)), draw(st.integers(0, 2))
    difference, nucleus = draw(st.booleans()), draw(st.sampled_from(["combined", "target"]))
    weird = draw(st.sampled_from([values, st.floats(-8, 8, width=32), st.sampled_from([0.0, 1.0, -math.inf])]))

    def tensor(*shape: int) -> Tensor:
        size = math.prod(shape)
        return torch.tensor(draw(st.lists(weird, min_size=size, max_size=size)), dtype=torch.float32).view(shape)

    return Case(
        tensor(1, vocab),
        tensor(pairs, 1, vocab) if pairs else None,
        tensor(pairs, 1, vocab) if pairs and not difference else None,
        torch.tensor([draw(st.lists(st.sampled_from([0.0, 1.0, -0.5, 3.0]), min_size=pairs, max_size=pairs))])
        if pairs
        else None,
        torch.tensor([draw(st.sampled_from([0.0, 0.5, 1.0, 3.0]))]),
        torch.tensor([draw(st.integers(0, 22))], dtype=torch.int32),
        torch.tensor([draw(st.sampled_from([1e-6, 0.1, 0.5, 0.9, 1.0]))]),
        torch.tensor([draw(st.sampled_from([0.0, 0.1, 0.9]))]),
        torch.tensor([draw(st.integers(-(2**63), 2**63 - 1))]),
        torch.tensor([draw(st.integers(0, 2**32 - 1))]),
        nucleus,
    )


@settings(max_examples=400, deadline=None, derandomize=True)
@given(cases())
def test_any_small_row_agrees_with_the_reference(judge: Judge, case: Case) -> None:
    judge.check(case, case.run(ops.ensemble_sample))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.sampled_from(TOP_P), st.sampled_from([0, 3, 200]))
def test_masking_a_token_that_lost_changes_nothing(seed: int, top_p: float, top_k: int) -> None:
    """The same noise falls on the same tokens, whatever the other tokens hold."""
    z = logits(4, 400, torch.Generator().manual_seed(seed))[seed % 4].unsqueeze(0)
    keep = reference.kept(z[0], top_k, top_p, 0.0)
    token = ops.ensemble_sample(z, top_p=top_p, top_k=top_k, seed=seed, position=seed % 99).token.item()
    assert keep[token]
    outside = z.masked_fill(~keep, -math.inf)
    assert ops.ensemble_sample(outside, seed=seed, position=seed % 99).token.item() == token


# ── what PyTorch asks of an operator ────────────────────────────────────────────────────────────────────────────────
@compiled
@pytest.mark.parametrize("pairs", [0, 2])
def test_opcheck(pairs: int) -> None:
    case = make_case(65, [(0.9, 3, 0.1, 0.7), (1.0, 0, 0.0, 1.0)], pairs=pairs)
    parameters = (case.alpha, case.temperature, case.top_k, case.top_p, case.min_p, case.seed, case.position)
    torch.library.opcheck(torch.ops.ensemble_decode.ensemble_sample.default, (*case.logits, *parameters, False, False))
    torch.library.opcheck(torch.ops.ensemble_decode.combine_out.default, (*case.logits, case.alpha, torch.zeros(2, 65)))


@compiled
def test_compiles_into_one_graph() -> None:
    case = make_case(65, [(0.9, 3, 0.1, 0.7), (1.0, 0, 0.0, 1.0)], pairs=2)
    torch._dynamo.reset()

    def step(target: Tensor, expert: Tensor, anti: Tensor, seed: Tensor) -> tuple[EnsembleSample, Tensor]:
        sample = ops.ensemble_sample(target, expert, anti, alpha=0.5, top_p=0.9, seed=seed, position=3)
        return sample, ops.combine(target, expert, anti, 0.5)

    arguments = (*case.logits, case.seed)
    sample, combined = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments)
    eager_sample, eager_combined = step(*arguments)  # type: ignore[arg-type]
    assert same(sample, eager_sample)
    assert torch.equal(combined, eager_combined)


@compiled
def test_fake_tensors_have_the_shapes_and_types_of_the_real_ones() -> None:
    with FakeTensorMode():
        sample = ops.ensemble_sample(torch.empty(5, 99), alpha=None, seed=0, position=0)
        assert [(x.shape, x.dtype) for x in sample] == [
            ((5,), torch.int64),
            ((5,), torch.float32),
            ((5,), torch.float32),
        ]
        assert ops.combine(torch.empty(5, 99).half(), None, None, None).dtype == torch.float32


def test_an_empty_batch() -> None:
    assert [x.shape for x in ops.ensemble_sample(torch.empty(0, 9), seed=0, position=0)] == [(0,)] * 3


# ── errors ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"target": torch.zeros(5)}, "target"),
        ({"target": torch.zeros(2, 0)}, "target"),
        ({"target": torch.zeros(2, 5, dtype=torch.float64)}, "target"),
        ({"target": torch.zeros(5, 2).t()}, "target"),
        ({"expert": torch.zeros(1, 2, 4)}, "expert"),
        ({"expert": torch.zeros(2, 5)}, "expert"),
        ({"expert": torch.zeros(1, 2, 5).bfloat16()}, "expert"),
        ({"expert": None}, "anti_expert"),
        ({"anti_expert": torch.zeros(2, 2, 5)}, "anti_expert"),
        ({"alpha": None}, "alpha"),
        ({"alpha": torch.zeros(2)}, "alpha"),
        ({"alpha": torch.zeros(2, 1).double()}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": torch.tensor([1.0, math.nan])}, "temperature"),
        ({"temperature": torch.ones(3)}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": torch.zeros(2)}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"min_p": 1.0}, "min_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"seed": torch.zeros(2, dtype=torch.int32)}, "seed"),
        ({"position": torch.zeros(1, dtype=torch.int64)}, "position"),
        ({"nucleus": "expert"}, "nucleus"),
        ({"target_is_combined": True}, "target_is_combined"),
        ({"target_is_combined": True, "expert": None, "anti_expert": None, "nucleus": "target"}, "nucleus"),
    ],
    ids=str,
)
def test_what_is_not_allowed_is_said_in_one_line(changes: dict, named: str) -> None:
    arguments = {
        "target": torch.zeros(2, 5),
        "expert": torch.zeros(1, 2, 5),
        "anti_expert": torch.zeros(1, 2, 5),
        "alpha": 1.0,
        "seed": 0,
        "position": 0,
        **changes,
    }
    with pytest.raises((ValueError, RuntimeError)) as error:
        ops.ensemble_sample(**arguments)
    line = str(error.value).splitlines()[0]
    assert line.startswith("ensemble_sample: ")
    assert named in line
