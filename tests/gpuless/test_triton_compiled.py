"""The sampler's Triton kernels compiled for GPUs that are not here: no spills, wide loads, no fp64, registers, launches."""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")
pytest.importorskip("greenlet", reason="needs greenlet")

from torch._subclasses.fake_tensor import FakeTensorMode

from ensemble_decode import ops
from ensemble_decode.kernels import combine
from ensemble_decode.kernels.launch import Launch

from ..ops.sampling_cases import Case, make_case
from .aot import compile_call, opcodes, resources, sass, uses_fp64
from .sass import blocks_per_multiprocessor
from .triton_sample import launches

FULL = os.environ.get("ENSEMBLE_DECODE_FULL_GRID") == "1"
#: Registers a thread, at most; on AMD, whose wavefronts share 512, they alone decide how many run at once. With more than three
#: pairs AMD's compiler unrolls their loop, and spills if held to these: then three wavefronts.
REGISTERS = {"whole_row_kernel": 128, "partials_kernel": 96, "resolve_kernel": 128, "combine_kernel": 64}
AMD_REGISTERS_OF_MANY_PAIRS = 168
#: Warps that a multiprocessor of NVIDIA's holds at once, at least.
WARPS = {"whole_row_kernel": 16, "partials_kernel": 24, "resolve_kernel": 16, "combine_kernel": 32}
#: Bytes of shared memory a block, at most: 1,024 float32 on their way from one layout to another.
SHARED = 4096


def a_case(vocab: int, dtype: torch.dtype, pairs: int = 1, nucleus: str = "combined") -> Case:
    """Rows padded to a stride that 16 divides, as a model's head leaves them."""
    return make_case(vocab, [(0.9, 0, 0.0, 1.0)] * 2, pairs=pairs, dtype=dtype, padding=-vocab % 16, nucleus=nucleus)


def combine_launch(case: Case, arch: int | str) -> Launch:
    return combine.plan(
        *case.logits,
        case.alpha,
        torch.zeros(case.batch, -(-case.target.shape[1] // 16) * 16),
        warp_size=32 if isinstance(arch, int) else 64,
    )[0]


def wide_and_narrow(compiled: Any, dtype: torch.dtype) -> tuple[int, int]:
    """Loads of 16 bytes, and loads of one element of a 16-bit type (which only logits have)."""
    if "amdgcn" in compiled.asm:
        found = Counter(re.findall(r"(?:global|buffer)_load_(\w+)", compiled.asm["amdgcn"]))
        return found["dwordx4"], found["ushort"]
    found = opcodes(sass(compiled))
    wide = sum(n for name, n in found.items() if re.match(r"LDG\.E(\.\w+)*\.128", name))
    return wide, sum(n for name, n in found.items() if re.match(r"LDG\.E(\.\w+)*\.U16", name))


def check(launch: Launch, arch: int | str, dtype: torch.dtype, wide_loads: int) -> str:
    compiled = compile_call(launch.kernel, arch, launch.arguments, **launch.options)
    needs = resources(compiled)
    name = launch.kernel.__name__
    assert needs.spill_bytes == needs.stack_bytes == 0, f"{name} on {arch}: {needs}"
    unrolled = not isinstance(arch, int) and launch.arguments["PAIRS"] > 3
    registers = AMD_REGISTERS_OF_MANY_PAIRS if unrolled else REGISTERS[name]
    assert needs.registers <= registers, f"{name} on {arch}: {needs}"
    assert needs.shared_bytes <= SHARED, f"{name} on {arch}: {needs}"
    wide, narrow = wide_and_narrow(compiled, dtype)
    assert wide >= wide_loads, f"{name} on {arch}: {wide} loads of 16 bytes, expected {wide_loads}"
    if isinstance(arch, int):
        text = sass(compiled)
        assert not uses_fp64(text)
        warps = launch.options["num_warps"]
        warps *= blocks_per_multiprocessor(arch, needs.registers, 32 * warps, needs.shared_bytes)
        assert warps >= WARPS[name], f"{name} on {arch}: {warps} warps on a multiprocessor, {needs}"
        assert not any(code.startswith(("LDL", "STL")) for code in opcodes(text)), f"{name} on {arch}: local memory"
    else:
        assert "_f64" not in compiled.asm["amdgcn"]
    return f"{name} {arch}: {needs.registers} registers, {wide} wide and {narrow} narrow loads"


ARCHITECTURES: list[int | str] = [80, 90, 100, "gfx942"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
VOCABULARIES = [50257, 128256]
PAIRS = [(1, "combined"), (2, "target"), (3, "target"), (4, "combined")]
# Samples meet, in either form, every type with every vocabulary; and together every architecture with every type and with
# every vocabulary.
TWO_LAUNCHES = [
    (80, torch.bfloat16, 50257, 4, "combined"),
    (80, torch.float16, 128256, 1, "combined"),
    (80, torch.float32, 50257, 2, "target"),
    (90, torch.float32, 50257, 3, "target"),
    (100, torch.float16, 50257, 4, "combined"),
    ("gfx942", torch.bfloat16, 128256, 2, "target"),
    ("gfx942", torch.float16, 50257, 4, "combined"),
    ("gfx942", torch.float32, 128256, 1, "combined"),
]
ONE_LAUNCH = [
    (90, torch.bfloat16, 50257, 1, "combined"),
    (90, torch.float16, 128256, 2, "target"),
    (90, torch.float32, 50257, 3, "target"),
    (100, torch.bfloat16, 128256, 4, "combined"),
    (100, torch.float16, 50257, 1, "combined"),
    (100, torch.float32, 128256, 2, "target"),
]
if FULL:
    TWO_LAUNCHES = [(a, d, v, *p) for a, d, v, p in itertools.product(ARCHITECTURES, DTYPES, VOCABULARIES, PAIRS)]
    ONE_LAUNCH = [configuration for configuration in TWO_LAUNCHES if configuration[0] in (90, 100)]


def test_what_the_samples_meet() -> None:
    for form in (TWO_LAUNCHES, ONE_LAUNCH):
        assert {c[1:3] for c in form} == set(itertools.product(DTYPES, VOCABULARIES))
        assert {c[3:] for c in form} == set(PAIRS)
    both = TWO_LAUNCHES + ONE_LAUNCH
    assert {c[:2] for c in both} == set(itertools.product(ARCHITECTURES, DTYPES))
    assert {(c[0], c[2]) for c in both} == set(itertools.product(ARCHITECTURES, VOCABULARIES))


@pytest.mark.parametrize(("arch", "dtype", "vocab", "pairs", "nucleus"), TWO_LAUNCHES, ids=str)
def test_two_launches_compile_without_spills_and_with_wide_loads(
    arch: int | str, dtype: torch.dtype, vocab: int, pairs: int, nucleus: str
) -> None:
    capability = None if arch == "gfx942" else (arch // 10, 0)  # type: ignore[operator]
    case = a_case(vocab, dtype, pairs, nucleus)
    tensors = 1 + 2 * (pairs if pairs <= 2 else 1)  # more pairs are a loop
    for launch in launches(case, one_launch=False, capability=capability)[0]:
        threads = launch.options["num_warps"] * (32 if capability else 64)
        bytes_a_thread = launch.arguments["BLOCK"] // threads * dtype.itemsize
        print(check(launch, arch, dtype, tensors * bytes_a_thread // 16))


@pytest.mark.parametrize(("arch", "dtype", "vocab", "pairs", "nucleus"), ONE_LAUNCH, ids=str)
def test_one_launch_compiles_without_spills_and_with_wide_loads(
    arch: int, dtype: torch.dtype, vocab: int, pairs: int, nucleus: str
) -> None:
    case = a_case(vocab, dtype, pairs, nucleus)
    plan, _ = launches(case, capability=(arch // 10, 0))
    if len(plan) > 1:
        pytest.skip("the table gives this one two launches")
    assert plan[0].options["num_ctas"] == (8 if vocab <= 65536 else 16)
    print(check(plan[0], arch, dtype, 3 * dtype.itemsize))  # the pairs are a loop


@pytest.mark.parametrize("arch", [80, "gfx942"])
def test_combine_compiles_without_spills_and_with_wide_loads(arch: int | str) -> None:
    case = a_case(50257, torch.bfloat16, 2)
    print(check(combine_launch(case, arch), arch, torch.bfloat16, 5))


def test_the_checks_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stride that nothing divides costs the width; ptxas, left alone, spills; occupancy is looked at."""
    case = make_case(50257, [(0.9, 0, 0.0, 1.0)] * 2, pairs=1)
    with pytest.raises(AssertionError, match="16 bytes"):
        check(launches(case, one_launch=False)[0][0], 90, torch.float32, 6)
    left_alone = launches(a_case(50257, torch.float16), one_launch=False)[0][1]
    del left_alone.options["maxnreg"]
    with pytest.raises(AssertionError, match="spill"):
        check(left_alone, 90, torch.float16, 3)
    monkeypatch.setitem(WARPS, "partials_kernel", 65)  # more than one holds
    with pytest.raises(AssertionError, match="warps on a multiprocessor"):
        check(launches(a_case(50257, torch.float16), one_launch=False)[0][0], 90, torch.float16, 3)


# ── launches, seen without launching ────────────────────────────────────────────────────────────────────────────────
def on_a_fake_gpu(vocab: int, rows: int) -> Case:
    """A case of tensors that say they are on a GPU and hold nothing; call inside a ``FakeTensorMode``."""
    row = {"device": "cuda", "dtype": torch.float32}
    logits = torch.empty(rows, vocab, **row).bfloat16()
    pair = torch.empty(2, rows, vocab, **row).bfloat16()
    whole, long = (
        torch.empty(rows, device="cuda", dtype=torch.int32),
        torch.empty(rows, device="cuda", dtype=torch.int64),
    )
    single = torch.empty(rows, **row)
    return Case(logits, pair, pair, torch.empty(rows, 2, **row), single, whole, single, single, long, long)


@pytest.mark.parametrize(
    ("capability", "vocab", "grids"),
    [
        ((8, 0), 50257, [(7, 50), (7, 50)]),
        ((9, 0), 50257, [(7,)]),
        ((9, 0), 128256, [(7,)]),
        ((10, 0), 131072, [(7,)]),
        ((9, 0), 151936, [(7, 75), (7, 75)]),
        ((12, 0), 128256, [(7, 126), (7, 126)]),
        (None, 262144, [(7, 128), (7, 128)]),
    ],
    ids=str,
)
def test_the_form_depends_on_the_device_and_the_vocabulary(
    capability: tuple[int, int] | None, vocab: int, grids: list
) -> None:
    with FakeTensorMode():
        plan, _ = launches(on_a_fake_gpu(vocab, 7), capability=capability)
        assert [launch.grid for launch in plan] == grids
        alone, _ = launches(on_a_fake_gpu(vocab, 1), capability=capability)
    for one, many in zip(alone, plan, strict=True):
        # The batch changes the number of programs and nothing else.
        assert one.grid[1:] == many.grid[1:]
        assert one.options == many.options
        constants = {name: x for name, x in one.arguments.items() if name.isupper()}
        assert constants == {name: many.arguments[name] for name in constants}


@pytest.mark.parametrize(("version", "number"), [("3.7.1", 2), ("3.8.0", 1), ("3.10.0+git1a2b", 1), ("4.0.0", 1)])
def test_a_triton_that_does_not_compile_the_cluster_launches_twice(
    version: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triton.__version__", version)
    with FakeTensorMode():
        for vocab in (50257, 128256):
            plan, _ = launches(on_a_fake_gpu(vocab, 7), capability=(9, 0))
            assert len(plan) == number


@pytest.mark.skipif(not torch.library.wrap_triton, reason="needs torch.library.wrap_triton")
def test_a_traced_graph_shows_the_launches() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def traced(target: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
        single, whole = target.new_ones(3, dtype=torch.float32), seed.int()
        case = Case(target, None, None, None, single, whole, single, single, seed, seed)
        plan, results = launches(case, one_launch=False)
        for launch in plan:
            torch.library.wrap_triton(launch.kernel)[launch.grid](**launch.arguments)
        return results[0]

    with FakeTensorMode():
        target, seed = torch.empty(3, 50257, device="cuda"), torch.empty(3, device="cuda", dtype=torch.int64)
        graph = make_fx(traced)(target, seed).graph
    nodes = [node for node in graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    assert [node.kwargs["grid"] for node in nodes] == [[(3, 50, 1)], [(3, 50, 1)]] or [
        tuple(node.kwargs["grid"][0])[:2] for node in nodes
    ] == [(3, 50), (3, 50)]


@pytest.mark.skipif(not ops.library.available, reason="the compiled operators are not built")
def test_fake_gpu_tensors_go_through_the_operator() -> None:
    with FakeTensorMode():
        case = on_a_fake_gpu(50257, 5)
        parameters = (case.alpha, case.temperature, case.top_k, case.top_p, case.min_p, case.seed, case.position)
        results = torch.ops.ensemble_decode.ensemble_sample(*case.logits, *parameters, False, False)
        assert [(x.shape, x.dtype, x.device.type) for x in results] == [
            ((5,), torch.int64, "cuda"),
            ((5,), torch.float32, "cuda"),
            ((5,), torch.float32, "cuda"),
        ]
        assert ops.combine(*case.logits, case.alpha).device.type == "cuda"
