"""The CUDA kernels' source, executed on the CPU: parity with the reference, sanitizers, and planted bugs that they find."""

from __future__ import annotations

import itertools
import math
import os
import platform
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ensemble_decode.ops import EnsembleSample
from tests.ops.sampling_cases import Case, Judge, endless, make_case

from .cuda_cases import COMPILER, SOURCES, build, launch, pack, run

pytestmark = pytest.mark.skipif(
    COMPILER is None or platform.system() != "Linux" or platform.machine() != "x86_64",
    reason="running CUDA source on a CPU needs g++ on x86-64 Linux",
)

#: The whole grid of the contract instead of a sample of it: some minutes.
FULL = os.environ.get("ENSEMBLE_DECODE_FULL_GRID") == "1"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PAIRS = [(0, False), (1, False), (1, True), (2, False), (3, False), (3, True)]
SMALL = 64  # threads a block: what the sanitizers find doesn't depend on it, how long they take does


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("cuda")
    kinds = {"plain": ("", 512), "address": ("address,undefined", SMALL), "thread": ("thread", SMALL)}
    with ThreadPoolExecutor() as pool:
        built = {name: pool.submit(build, folder / name, *options) for name, options in kinds.items()}
    return {name: future.result() for name, future in built.items()}


@pytest.fixture(scope="module")
def judge(request: pytest.FixtureRequest) -> Iterator[Judge]:
    """One count over the whole file, printed at its end."""
    judge = Judge()
    yield judge
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nCUDA ensemble_sample: {judge.flips} flips near a tie in {judge.rows} rows against the reference")
    assert judge.flips <= 1 + judge.rows // 1000


def check(judge: Judge, program: Path, cases: list[Case], seed: int = 0, **options: int) -> None:
    for case, got in zip(cases, run(program, cases, seed, **options), strict=True):
        judge.check(case, got)


def grid_cases(vocab: int, rows: int, dtype: torch.dtype) -> list[Case]:
    """Sampled from the product of top-p, top-k, min-p, temperature, pairs, padding and nucleus."""
    top_p, top_k = [1e-6, 0.05, 0.5, 0.9, 0.99, 1.0], sorted({0, 1, 2, 50, vocab - 1, vocab})
    grid = list(itertools.product(top_p, top_k, [0.0, 0.02, 0.3], [1.0, 0.7, 2.0, 0.0]))
    parameters = endless(grid, seed=vocab + DTYPES.index(dtype))
    kinds = list(itertools.product(PAIRS, ("combined", "target")))
    if not FULL and vocab > 1000:
        kinds = kinds[DTYPES.index(dtype) + 1 :: 4]
    return [
        make_case(
            vocab,
            list(itertools.islice(parameters, rows)),
            pairs=pairs,
            difference=difference,
            dtype=dtype,
            padding=13 * (number % 2),
            nucleus=nucleus,
            seed=vocab + 31 * pairs + difference,
        )
        for number, ((pairs, difference), nucleus) in enumerate(kinds)
    ]


# ── parity ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("two_launches", [False, True], ids=["cluster", "two launches"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_parity_under_address_sanitizer(
    dtype: torch.dtype, two_launches: bool, programs: dict[str, Path], judge: Judge
) -> None:
    """Small vocabularies, every alignment that padding and odd sizes make, exact sizes of all memory."""
    sizes = (
        [(1, 24), (3, 24), (7, 24), (1023, 24), (4096, 8), (4097, 8)] if FULL else [(1, 1), (3, 2), (7, 2), (1023, 2)]
    )
    for vocab, rows in sizes:
        check(judge, programs["address"], grid_cases(vocab, rows, dtype), two_launches=two_launches)


@pytest.mark.parametrize("two_launches", [False, True], ids=["cluster", "two launches"])
def test_parity_on_large_vocabularies(two_launches: bool, programs: dict[str, Path], judge: Judge) -> None:
    """The size of block that is shipped."""
    sizes = [(4097, 2), (32000, 2), (50257, 1), (128256, 1)] if FULL else [(4097, 1), (50257, 1)]
    for dtype, (vocab, rows) in itertools.product(DTYPES, sizes):
        cases = grid_cases(vocab, rows, dtype)
        check(judge, programs["plain"], cases if FULL else cases[:1], two_launches=two_launches)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_rows_that_begin_anywhere(dtype: torch.dtype, programs: dict[str, Path], judge: Judge) -> None:
    """A target that begins on any element behind a multiple of 16 bytes, beside experts that begin on one."""
    case = make_case(203, [(0.9, 0, 0.0, 1.0), (1.0, 0, 0.0, 0.7)], pairs=1, dtype=dtype)
    width = case.target.element_size()
    for misaligned in range(0, 16, width):
        check(judge, programs["address"], [case], misaligned=misaligned)


def test_numbers_that_are_not_finite(programs: dict[str, Path], judge: Judge) -> None:
    """Every pattern in z, z⁺, z⁻: NaN or +inf in z makes the row −1, a difference that is not finite is nothing."""
    patterns = list(itertools.product([0.5, -math.inf, math.inf, math.nan], repeat=3))
    cases = []
    for nucleus in ("combined", "target") if FULL else ("target",):
        case = make_case(40, [(0.9, 0, 0.0, 1.0)] * len(patterns), pairs=1, nucleus=nucleus)
        assert case.expert is not None
        assert case.anti_expert is not None
        case.alpha = torch.ones(len(patterns), 1)
        for row, (z, plus, minus) in enumerate(patterns):
            case.target[row, 39], case.expert[0, row, 39], case.anti_expert[0, row, 39] = z, plus, minus
        cases.append(case)
    masked = make_case(99, [(0.9, 0, 0.0, 1.0), (0.9, 3, 0.0, 1.0), (1.0, 5, 0.0, 0.0), (1.0, 0, 0.5, 1.0)])
    masked.target[0] = -math.inf
    masked.target[1:, 2:] = -math.inf
    masked.target[3, 90] = math.nan  # among masked tokens only
    check(judge, programs["address"], [*cases, masked])


def test_ties_and_noise_of_minus_infinity(programs: dict[str, Path], judge: Judge) -> None:
    filters = [(1e-6, 0, 0.0, 1.0), (1.0, 1, 0.0, 1.0), (1.0, 0, 0.999, 1.0), (0.3, 2, 0.0, 1.0), (1.0, 0, 0.0, 0.0)]
    flat = make_case(300, filters)
    flat.target[:] = torch.tensor([0.0, -0.0]).repeat(150)
    zeros = make_case(300, [(0.7, 5, 0.0, 1.0), (0.99, 5, 0.0, 1.0), (1.0, 3, 0.0, 1.0), (0.5, 0, 0.0, 1.0)] * 4)
    zeros.target[:] = torch.tensor([0.0, -0.0, -1e-45]).repeat(
        100
    )  # the bound lies at zero, of either sign, or beside it
    zeros.target[:, :2] = 1.0
    only = make_case(1, filters[:2])
    only.seed[:], only.position[:] = 16390493, 0  # its word rounds to u = 1
    check(judge, programs["address"], [flat, zeros, only])


def test_combined_logits_have_no_target_logprob(programs: dict[str, Path], judge: Judge) -> None:
    case = make_case(101, [(0.9, 0, 0.0, 1.0), (1.0, 0, 0.0, 0.0)])
    case.target_is_combined = True
    check(judge, programs["address"], [case])


def bits(sample: EnsembleSample) -> list[torch.Tensor]:
    return [x.view(torch.int32) for x in sample]


@pytest.mark.parametrize("two_launches", [False, True], ids=["cluster", "two launches"])
def test_nothing_but_the_row_decides(two_launches: bool, programs: dict[str, Path]) -> None:
    """Rows permuted and alone, threads in another order: the same bits."""
    case = make_case(1003, [(0.9, 0, 0.0, 1.0), (0.5, 9, 0.0, 0.7), (1.0, 0, 0.02, 1.0)], pairs=2, nucleus="target")
    order = torch.tensor([2, 0, 1])
    whole, permuted, alone = run(
        programs["plain"], [case, case.rows(order), case.rows(order[:1])], two_launches=two_launches
    )
    (shuffled,) = run(programs["plain"], [case], seed=3, two_launches=two_launches)
    for a, b, c, d in zip(*map(bits, (whole, permuted, alone, shuffled)), strict=True):
        rows = a.view(3, -1)
        assert torch.equal(rows[order], b.view(3, -1))
        assert torch.equal(rows[order[:1]], c.view(1, -1))
        assert torch.equal(a, d)


def test_the_comparison_notices_another_row(programs: dict[str, Path]) -> None:
    """The negative control: noise by the row's place instead of its seed."""
    case = make_case(1003, [(1.0, 0, 0.0, 1.0)] * 3, pairs=1)
    moved = case.rows(torch.tensor([2, 0, 1]))
    moved.seed = case.seed
    first, second = run(programs["plain"], [case, moved])
    assert not torch.equal(first.token[[2, 0, 1]], second.token)


# ── sanitizers, and the bugs that each must find ────────────────────────────────────────────────────────────────────
#: p and k both, so that the histograms run; a candidate that is likely to fail, so that rounds follow one another.
BUSY = [(0.3, 40, 0.0, 1.0)]


@pytest.mark.parametrize("two_launches", [False, True], ids=["cluster", "two launches"])
def test_no_race(two_launches: bool, programs: dict[str, Path], judge: Judge) -> None:
    case = make_case(1003, BUSY, pairs=1, nucleus="target")
    check(judge, programs["thread"], [case], two_launches=two_launches)


TEAM, ROW, SAMPLE = "team.cuh", "row.cuh", "ensemble_sample.cuh"
#: name → (file, what it says, what the bug says, which program finds it)
PLANTED = {
    "no barrier before warps' values are read": (
        TEAM, "    __syncthreads();\n    value = get<V>(memory_.warp", "    value = get<V>(memory_.warp", "thread"),
    "no barrier of the cluster before blocks' values are read": (
        TEAM, "    barrier();\n    value = get<V>(of_rank", "    __syncthreads();\n    value = get<V>(of_rank", "thread"),
    "one slot for every exchange": (TEAM, "turn_ ^= 1;\n    value = of_block", "value = of_block", "thread"),
    "a block leaves while others may read it": (TEAM, "leave() { barrier(); }", "leave() {}", "thread"),
    "arrives and does not wait": (TEAM, "    __cluster_barrier_wait();\n", "", "plain"),
    "waits and does not arrive": (TEAM, "    __cluster_barrier_arrive();\n", "", "plain"),
    "histograms cleared without a barrier": (
        SAMPLE, "memory.found_bin = kBins;\n    __syncthreads();", "memory.found_bin = kBins;", "thread"),
    "reads one past its slice": (
        TEAM, "owner)[i - static_cast<int>(owner) * slice_]", "owner)[slice_ + i - static_cast<int>(owner) * slice_]",
        "address"),
    "tail read by whole loads": (ROW, "past == 0 && at + n <= vocab", "past == 0", "address"),
    "second load past the row": (ROW, "at - shift + 2 * n <= vocab", "at <= vocab", "address"),
    "load before the row": (ROW, "at >= shift && ", "", "address"),
    "loads as if aligned": (ROW, "if (past == 0 && at + n", "if (at + n", "undefined"),
    "only some threads reach a barrier": (
        TEAM, "    if (threadIdx.x == 0) put(memory_.block[turn_], value);\n    barrier();",
        "    if (threadIdx.x == 0) put(memory_.block[turn_], value);\n    if (threadIdx.x < 32) barrier();", "plain"),
    "ties cut by position": (SAMPLE, "(0xffffffffu - token);\n}", "token;\n}", "wrong"),
    "a difference that is not finite counts": ("../score.h", "x - x == 0.0f ? x : 0.0f", "x", "wrong"),
    "a lane takes from the queue before it is filled": (
        SAMPLE, "      __syncwarp();\n      int from", "      int from", "thread"),
    "the queue is filled before all have taken": (
        SAMPLE, "      waiting = from;\n      __syncwarp();", "      waiting = from;", "thread"),
    "warps share a queue": (SAMPLE, "threadIdx.x / 32 * (kBins / kWarps)", "0", "thread"),
    "what is left in the queue is forgotten": (SAMPLE, "base < quads || waiting > 0", "base < quads", "wrong"),
    "a NaN among masked tokens is forgotten": (ROW, "(x.max, max))) : x.sum", "(x.max, max))) : 0.0f", "wrong"),
    "lanes that repeat count twice": (SAMPLE, "threadIdx.x % 32 < Lanes ? x.count : 0", "x.count", "wrong"),
    "noise of another position": (SAMPLE, "noise_key(*seed, *position)", "noise_key(*seed, *position + 1)", "wrong"),
}  # fmt: skip


def with_bug(folder: Path, name: str) -> Path:
    """The program of the source with that bug."""
    file, right, wrong, finder = PLANTED[name]
    sources = folder / "csrc"
    shutil.copytree(SOURCES, sources)
    path = sources / "cuda" / file
    text = path.read_text()
    assert text.count(right) == 1, f"{name}: the source has changed, plant it anew"
    path.write_text(text.replace(right, wrong))
    sanitizers = "" if finder in ("plain", "wrong") else finder
    return build(folder / "program", sanitizers, SMALL, sources, "ONLY_FLOAT32")


@pytest.fixture(scope="module")
def planted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future]]:
    """The programs with the bugs of the tests that were asked for, compiled side by side."""
    asked = [item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield {
            name: pool.submit(with_bug, tmp_path_factory.mktemp("planted"), name) for name in asked if name in PLANTED
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bugs_are_found(name: str, planted: dict[str, Future]) -> None:
    finder = PLANTED[name][3]
    program = planted[name].result()
    if "queue" in name:  # long enough for several to be filled, a part of the tokens candidates
        case = make_case(9001, [(0.9, 0, 0.0, 1.0)] * (24 if finder == "wrong" else 1), pairs=1, seed=1)
    else:
        case = make_case(1003, BUSY, pairs=1, nucleus="target", seed=1)
    cases = [case]
    if finder == "wrong":
        assert case.expert is not None
        flat = make_case(1003, [(1.0, 0, 0.0, 0.0)], pairs=1)
        flat.target[:] = 0.0
        masked = make_case(1003, [(1.0, 0, 0.0, 0.0)], pairs=1)
        assert masked.expert is not None
        masked.alpha, masked.expert[0, 0, 5] = torch.ones(1, 1), math.inf
        flat.alpha = torch.zeros(1, 1)
        unseen = make_case(1003, [(1.0, 0, 0.0, 0.0)])
        unseen.target[:, 2:], unseen.target[:, 900] = -math.inf, math.nan
        cases = [case, make_case(1003, [(1.0, 0, 0.0, 1.0), (1.0, 40, 0.0, 1.0)] * 3, pairs=1), flat, masked, unseen]
    packed = [pack(c, misaligned=0 if finder == "wrong" else 12) for c in cases]
    done = launch(program, packed)
    # ThreadSanitizer remembers the last few accesses to a place: which ones these are is the scheduler's doing.
    attempts = 5 if finder == "thread" else 0
    while done.returncode == 0 and attempts:
        done, attempts = launch(program, packed), attempts - 1
    if finder == "wrong":
        if done.returncode == 0:
            with pytest.raises(AssertionError):
                check(Judge(), program, cases)
        return
    assert done.returncode != 0, f"{name}: not found"
    # The shim itself sees some of what a sanitizer would see, if it gets there first.
    reports = ("ThreadSanitizer", "AddressSanitizer", "runtime error", "cuda_on_cpu:")
    assert any(report in done.stderr for report in reports), done.stderr[-2000:]
