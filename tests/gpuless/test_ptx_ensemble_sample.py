"""ensemble_sample as compiled for a GPU, executed instruction by instruction, against the reference.

Both forms of both languages: Triton and CUDA C++, one launch over a cluster (sm_90, sm_100) and two launches (sm_80, sm_90,
sm_100). Every run has all checks of the simulator on. ``ENSEMBLE_DECODE_FULL_GRID=1`` runs the sampling contract's whole grid:
every vocabulary, number of pairs, type and nucleus in both forms of both languages, for all architectures up to 4097 tokens
and for one after another beyond.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import math
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ensemble_decode.ops import EnsembleSample, reference
from tests.gpuless import cuda_cases, cuda_sample
from tests.gpuless.ptxsim import PtxError
from tests.ops.sampling_cases import Case, Judge, endless, make_case

FULL = bool(os.environ.get("ENSEMBLE_DECODE_FULL_GRID"))
FORMS = [
    (arch, form) for arch in (80, 90, 100) for form in ("cluster", "two launches") if (arch, form) != (80, "cluster")
]
TOP_P = [1e-6, 0.05, 0.5, 0.9, 0.99, 1.0]
CLUSTER_BARRIER = r"\n\s*barrier\.cluster\.arrive[^\n]*\n(?:\s*(?:mov|//)[^\n]*\n)*\s*barrier\.cluster\.wait[^\n]*"
CTA_BARRIER = r"\n\s*bar\.sync[^\n]*"


def _backends() -> Iterator[object]:
    if importlib.util.find_spec("triton") is None:
        yield pytest.param("triton", marks=pytest.mark.skip(reason="no triton"))
    else:
        yield "triton"
    missing = not cuda_sample.has_nvcc() or not cuda_sample.SOURCE.exists()
    yield pytest.param("cuda", marks=[pytest.mark.skip(reason="no nvcc")] if missing else [])


@pytest.fixture(params=_backends(), scope="module")
def backend(request: pytest.FixtureRequest) -> ModuleType:
    """The module that runs a case: ``run(case, arch, form, edit=None, **options)``."""
    if request.param == "cuda":
        return cuda_sample
    from tests.gpuless import triton_launch

    return triton_launch


@pytest.fixture(scope="module")
def judge(request: pytest.FixtureRequest) -> Iterator[Judge]:
    """One count for the whole file, printed at its end."""
    judge = Judge()
    yield judge
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\ncompiled PTX: {judge.flips} flips near a tie in {judge.rows} rows against the reference")
    assert judge.flips <= 1 + judge.rows // 1000


def grid(vocab: int, rows: int, seed: int, first: int = 0) -> list:
    """``rows`` of all (top_p, top_k, min_p, temperature) in a shuffled order."""
    top_k = sorted({0, 1, 2, 50, vocab - 1, vocab})
    shuffled = endless(list(itertools.product(TOP_P, top_k, [0.0, 0.02, 0.3], [1.0, 0.7, 2.0, 0.0])), seed)
    return list(itertools.islice(shuffled, first, first + rows))


# (V, rows, pairs, expert holds the difference, dtype, nucleus, elements after each row)
SHAPES = [
    (1023, 8, 2, False, torch.float32, "combined", 0),
    (4097, 4, 1, False, torch.bfloat16, "target", 3),
    (2051, 6, 3, True, torch.float16, "target", 13),
    (3000, 4, 0, False, torch.bfloat16, "combined", 8),
]
SMALL = [(1, 4, 1), (3, 8, 2), (7, 8, 0)]
if FULL:
    VOCABS = [(1, 24), (3, 24), (7, 24), (1023, 24), (4096, 12), (4097, 12), (32000, 1), (50257, 1), (128256, 1)]
    PAIRS = [(0, False), (1, False), (1, True), (2, False), (3, False), (3, True)]
    DTYPES = (torch.float32, torch.bfloat16, torch.float16)
    SHAPES = [
        (vocab, rows, pairs, difference, dtype, nucleus, 13 * (pairs % 2))
        for (vocab, rows), (pairs, difference), dtype, nucleus in itertools.product(
            VOCABS, PAIRS, DTYPES, ("combined", "target")
        )
    ]


def each_form_some_shapes() -> Iterator[object]:
    """All shapes in all forms, long ones for one architecture each; in the short run one in four of these."""
    for (i, shape), (j, (arch, form)) in itertools.product(enumerate(SHAPES), enumerate(FORMS)):
        archs = [a for a, f in FORMS if f == form]
        chosen = archs if shape[0] <= 4097 else [archs[(i + i // 6) % len(archs)]]
        if arch in chosen if FULL else (i + j) % 4 == 0:
            name = f"V{shape[0]}-P{shape[2]}-{str(shape[4])[6:]}-{shape[5]}-sm_{arch}-{form}"
            yield pytest.param(i, shape, arch, form, id=name)


@pytest.mark.parametrize(("number", "shape", "arch", "form"), each_form_some_shapes())
def test_parity(number: int, shape: tuple, arch: int, form: str, backend: ModuleType, judge: Judge) -> None:
    vocab, rows, pairs, difference, dtype, nucleus, padding = shape
    parameters = grid(vocab, rows, seed=vocab, first=number % 36 * rows)  # of a vocabulary's 36 shapes each has its own
    case = make_case(
        vocab, parameters, pairs=pairs, difference=difference, dtype=dtype, padding=padding, nucleus=nucleus, seed=vocab
    )
    result, _ = backend.run(case, arch, form)
    judge.check(case, result)


@pytest.mark.parametrize(("arch", "form"), FORMS if FULL else [(100, "cluster"), (80, "two launches")])
def test_small_vocabularies(arch: int, form: str, backend: ModuleType, judge: Judge) -> None:
    for vocab, rows, pairs in SMALL:
        case = make_case(vocab, grid(vocab, rows, seed=arch), pairs=pairs, seed=vocab)
        judge.check(case, backend.run(case, arch, form)[0])


@pytest.mark.parametrize(("arch", "form"), FORMS if FULL else [(90, "cluster"), (80, "two launches")])
def test_masks_ties_and_numbers_that_are_not_finite(arch: int, form: str, backend: ModuleType, judge: Judge) -> None:
    vocab = 1023
    rows = [(0.9, 0, 0.0, 1.0), (1.0, 0, 0.0, 0.0), (0.5, 3, 0.0, 1.0), (1.0, 2, 0.0, 1.0)] * 3
    case = make_case(vocab, rows, pairs=1, seed=5)
    assert case.expert is not None
    assert case.anti_expert is not None
    assert case.alpha is not None
    case.alpha[:] = 0.5
    case.target[0] = 1.0  # all ties
    case.expert[0, 0] = case.anti_expert[0, 0] = 0.0
    case.target[1] = 2.0
    case.expert[0, 1] = case.anti_expert[0, 1] = 0.0
    case.target[2, ::3] = 9.0  # ties on the boundary of top-k
    case.target[3, 5] = math.nan
    case.target[4, 1022] = math.inf
    case.target[5] = -math.inf
    case.target[6] = -math.inf
    case.target[6, 700] = -3.0
    for i, value in enumerate((math.nan, math.inf, -math.inf)):
        case.expert[0, 7, i::5] = value
        case.anti_expert[0, 8, i::7] = value
        case.target[9, 50 + i] = -math.inf
        case.expert[0, 9, 50 + i] = value
    case.target[10, 4:] = -math.inf
    result, _ = backend.run(case, arch, form)
    judge.check(case, result)
    assert result.token[[3, 4, 5]].tolist() == [-1, -1, -1]
    assert result.token[1] == 0  # greedy takes the lowest of equals
    assert result.token[6] == 700


@pytest.mark.parametrize(("arch", "form"), [(90, "cluster"), (80, "two launches")])
def test_gpt2s_vocabulary(arch: int, form: str, backend: ModuleType, judge: Judge) -> None:
    case = make_case(50257, [(0.9, 0, 0.0, 1.0)], pairs=1, dtype=torch.bfloat16, padding=15, seed=9)
    assert case.alpha is not None
    case.alpha[:] = 1.0
    result, machines = backend.run(case, arch, form)
    judge.check(case, result)
    read = sum((m.memory.loaded["target"] + m.memory.loaded["expert"] + m.memory.loaded["anti"] for m in machines), 0)
    once = 3 * 2 * 50257
    print(f"\n{backend.__name__.split('.')[-1]}, sm_{arch}, {form}: {read / once:.3f} reads of the logits")
    if form == "cluster":
        assert machines[0].memory.sectors["expert"] <= 1.15 * 2 * 50257


def test_order_of_ctas_and_errors_of_approximations_change_nothing(backend: ModuleType) -> None:
    parameters = [(0.9, 0, 0.0, 1.0), (0.5, 20, 0.0, 0.7), (1.0, 0, 0.05, 1.0), (1.0, 0, 0.0, 0.0)]
    case = make_case(2051, parameters[:: 2 - FULL], pairs=1, seed=2)
    want = reference.ensemble_sample(*case.logits, **case.keywords)[0].tolist()
    for arch, form in ((90, "cluster"), (80, "two launches")):
        for seed in range(1 + FULL):
            result, _ = backend.run(case, arch, form, order="random", approximate=True, seed=seed)
            assert result.token.tolist() == want


@pytest.mark.skipif(cuda_cases.COMPILER is None, reason="no g++")
def test_what_the_simulator_passes_is_laid_out_as_in_the_headers(tmp_path: Path) -> None:
    structures = (cuda_sample.SampleArgs, cuda_sample.Workspace)
    fields = [(x.__name__, name, getattr(x, name).offset) for x in structures for name, *_ in x._fields_]
    sizes = [(x.__name__, ctypes.sizeof(x)) for x in structures]
    constants = ("kThreads", "kCluster", "kVisitSlice", "kGrain", "sizeof(Sums)")
    expected = [*(f"{n} {size}" for n, size in sizes), *(f"{n}.{field} {at}" for n, field, at in fields)]
    expected.append(" ".join(map(str, cuda_sample.CONSTANTS)))
    lines = [
        '#include "ensemble_sample.cuh"',
        "using namespace ensemble_decode;",
        "using namespace ensemble_decode::cuda;",
        "int main() {",
        *(f'  std::printf("{n} %zu\\n", sizeof({n}));' for n, _ in sizes),
        *(f'  std::printf("{n}.{field} %zu\\n", offsetof({n}, {field}));' for n, field, _ in fields),
        f'  std::printf("%d %d %d %d %d\\n", {", ".join(f"static_cast<int>({x})" for x in constants)});',
        "}",
    ]
    source, program = tmp_path / "layout.cc", tmp_path / "layout"
    source.write_text("\n".join(lines))
    cuda_cases.compile_for_cpu(source, program)
    assert subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines() == expected


# ── planted bugs ────────────────────────────────────────────────────────────────────────────────────────────────────
def demanding(vocab: int) -> Case:
    """Rows that go through every loop: several rounds, top-k with top-p, min-p."""
    parameters = [(0.05, 0, 0.0, 2.0), (0.6, 30, 0.0, 1.5)]
    return make_case(vocab, parameters, pairs=1, dtype=torch.float32, nucleus="target", padding=7, seed=3)


def outcome(run: Callable[[], tuple[EnsembleSample, object]]) -> str | list:
    """The result's bits, or the error's text."""
    try:
        result, _ = run()
    except PtxError as error:
        return str(error)
    return [x.view(torch.int32).tolist() for x in result]


def texts(backend: ModuleType, case: Case, arch: int, form: str) -> list[str]:
    """The PTX of each launch, of CUDA's module only the kernels of the case's dtype."""
    seen: list[str] = []

    def remember(ptx: str) -> str:
        seen.append(ptx)
        return ptx

    backend.run(case, arch, form, remember)
    return seen


def entry(backend: ModuleType, form: str, launch: int, ptx: str) -> tuple[int, int]:
    """Where the kernel that a launch executes begins and ends in the module."""
    if backend is not cuda_sample:
        return 0, len(ptx)
    name = "cluster" if form == "cluster" else ("visit", "finish")[launch]
    found = re.search(rf"\.entry \w*ensemble_sample_{name}If", ptx)
    assert found is not None
    return found.start(), (ptx.find(".entry", found.end()) + len(ptx)) % len(ptx)


def runs_with(
    backend: ModuleType, case: Case, arch: int, form: str, pattern: str, instead: str = "", most: int = 10**9
) -> Iterator[tuple[str, str | list]]:
    """(what was replaced, outcome), for up to ``most`` matches of ``pattern``, spread over each launch's kernel."""
    for number, ptx in enumerate(texts(backend, case, arch, form)):
        first, last = entry(backend, form, number, ptx)
        matches = list(re.finditer(pattern, ptx[first:last]))
        for match in matches[:: max(1, math.ceil(len(matches) / most))]:
            at = first + match.start()
            changed = ptx[:at] + match.expand(instead) + ptx[first + match.end() :]
            calls = iter(range(100))

            def edit(original: str, changed: str = changed, calls: Iterator[int] = calls, number: int = number) -> str:
                return changed if next(calls) == number else original

            what = f"launch {number}, line {ptx[:at].count(chr(10)) + 2}"
            yield what, outcome(lambda edit=edit: backend.run(case, arch, form, edit))


@pytest.mark.parametrize(("arch", "form"), [(90, "cluster"), (80, "two launches")])
def test_a_missing_barrier_is_found(arch: int, form: str, backend: ModuleType) -> None:
    case = demanding(9001 if form == "cluster" and backend is not cuda_sample else 1100)
    want = outcome(lambda: backend.run(case, arch, form))
    assert isinstance(want, list)
    missed, total = [], 0
    for pattern in (CTA_BARRIER, CLUSTER_BARRIER):
        for what, got in runs_with(backend, case, arch, form, pattern, most=10**9 if FULL else 5):
            total += 1
            if got == want:
                missed.append(what)
    name = backend.__name__.split(".")[-1]
    print(f"\n{name}, sm_{arch}, {form}: {total - len(missed)} of {total} removed barriers found; not: {missed}")
    assert total >= 5
    assert len(missed) <= 0.4 * total  # two barriers in a row, of which one does; barriers that a loop's end repeats


def test_a_missing_mapa_is_found(backend: ModuleType) -> None:
    case = demanding(1100 if backend is cuda_sample else 9001)
    want = outcome(lambda: backend.run(case, 90, "cluster"))
    pattern = r"mapa\.(?:shared::cluster\.)?(u\d+)(\s+%\w+, %\w+), [%\w]+;"
    tried = list(runs_with(backend, case, 90, "cluster", pattern, r"mov.\1\2;", most=3))
    assert tried
    wrong = [got for _, got in tried if got != want]
    print(f"\n{backend.__name__.split('.')[-1]}: {len(wrong)} of {len(tried)} replaced mapa found")
    assert wrong


@pytest.mark.parametrize(("arch", "form"), [(90, "cluster"), (80, "two launches")])
def test_a_row_that_is_read_past_its_end_is_found(arch: int, form: str, backend: ModuleType) -> None:
    """The last token of the last row is taken away; with it, the same launch is clean."""
    case = make_case(1503, [(0.9, 0, 0.0, 1.0)] * 2, seed=4)
    assert isinstance(outcome(lambda: backend.run(case, arch, form)), list)
    got = outcome(lambda: backend.run(case, arch, form, withheld={"target": 4}))
    assert "out-of-bounds global load" in str(got)
