"""``ensemble_sample`` and ``combine`` on a GPU, held to the reference on the CPU over the sampling contract's grid.

Triton compiles a kernel for each number of pairs, nucleus, type and vocabulary, so its forms run for two kinds of pairs in ten
at each vocabulary and type; all of them with ``ENSEMBLE_DECODE_FULL_GRID=1``.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import fields
from typing import Any

import pytest
import torch

from ensemble_decode import ops
from ensemble_decode.ops import EnsembleSample, reference
from tests.ops.sampling_cases import Case, Judge, make_case

FULL = os.environ.get("ENSEMBLE_DECODE_FULL_GRID") == "1"
VOCABULARIES = [1, 3, 7, 1023, 4096, 4097, 32000, 50257, 128256]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: (pairs, whether the expert holds differences)
PAIRS = [(0, False), (1, False), (1, True), (2, False), (3, False)]
GRID = list(itertools.product([1e-6, 0.05, 0.5, 0.9, 0.99, 1.0], [0, 1, 2, 50], [0.0, 0.02, 0.3], [1.0, 0.7, 2.0, 0.0]))


def on(case: Case, device: torch.device) -> Case:
    """The case on a device; strides are kept."""

    def move(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        there = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
        return there.copy_(x)

    return Case(*(move(getattr(case, field.name)) for field in fields(Case)))


def back(sample: EnsembleSample) -> EnsembleSample:
    return EnsembleSample(*(x.cpu() for x in sample))


def operators(case: Case, device: torch.device) -> dict[str, Any]:
    """Every form of the operator that this device has: the one that is chosen, each Triton form, CUDA C++."""
    from ensemble_decode.kernels import ensemble_sample as kernel

    def form(one_launch: bool) -> Any:
        def call(*logits: Any, nucleus: str, target_is_combined: bool, **parameters: Any) -> EnsembleSample:
            launches, results = kernel.plan(
                *logits,
                **parameters,
                nucleus_target=nucleus == "target",
                target_is_combined=target_is_combined,
                capability=capability,
                one_launch=one_launch,
            )
            for launch in launches:
                launch()
            return EnsembleSample(*results)

        return call

    def compiled(*logits: Any, nucleus: str, **parameters: Any) -> EnsembleSample:
        names = ("alpha", "temperature", "top_k", "top_p", "min_p", "seed", "position")
        values = [parameters[name] for name in names]
        return torch.ops.ensemble_decode.ensemble_sample_cuda(
            *logits, *values, nucleus == "target", parameters["target_is_combined"]
        )

    capability = None if torch.version.hip else torch.cuda.get_device_capability(device)
    found = {"chosen": ops.ensemble_sample, "two launches": form(False)}
    if kernel.one_launch_fits(capability, case.target.shape[1]):
        found["one launch"] = form(True)
    if hasattr(torch.ops.ensemble_decode, "ensemble_sample_cuda"):
        found["CUDA C++"] = compiled
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_parity(vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    judge = Judge()
    rows = 24 if vocab < 10000 else 4
    parameters = itertools.cycle(GRID[:: 7 if vocab < 10000 else 11])
    for number, ((pairs, difference), nucleus) in enumerate(itertools.product(PAIRS, ("combined", "target"))):
        case = make_case(
            vocab,
            [(p, min(k, vocab), m, t) for p, k, m, t in itertools.islice(parameters, rows)],
            pairs=pairs,
            difference=difference,
            dtype=dtype,
            padding=13 * (number % 2),
            nucleus=nucleus,
            seed=vocab + number,
        )
        there = on(case, device)
        compile_all = FULL or number % 5 == (VOCABULARIES.index(vocab) + DTYPES.index(dtype)) % 5
        for name, operator in operators(there, device).items():
            if compile_all or name == "CUDA C++":
                judge.check(case, back(there.run(operator)))
    print(f"ensemble_sample on {torch.cuda.get_device_name(device)}: {judge.flips} flips in {judge.rows} rows")
    assert judge.flips <= 1 + judge.rows // 1000


@pytest.mark.parametrize("vocab", [1000, 50257])
def test_only_the_row_decides(vocab: int, device: torch.device) -> None:
    """Permuted, alone, or in a graph that is replayed: the same tokens."""
    case = on(make_case(vocab, GRID[::23], pairs=2, seed=5), device)
    whole = case.run(ops.ensemble_sample)
    order = torch.randperm(case.batch, device=device)
    assert torch.equal(case.rows(order).run(ops.ensemble_sample).token, whole.token[order])
    for row in range(0, case.batch, 5):
        at = torch.tensor([row], device=device)
        assert torch.equal(case.rows(at).run(ops.ensemble_sample).token, whole.token[at])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.run(ops.ensemble_sample)
    graph.replay()
    assert torch.equal(captured.token, whole.token)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine(dtype: torch.dtype, device: torch.device) -> None:
    case = make_case(4097, GRID[:8], pairs=2, dtype=dtype, padding=13)
    there = on(case, device)
    got = ops.combine(*there.logits, there.alpha).cpu()
    torch.testing.assert_close(got, reference.combine(*case.logits, case.alpha), rtol=1e-6, atol=1e-6)
