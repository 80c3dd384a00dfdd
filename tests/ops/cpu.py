"""What the tests of the layer operators share: every compiled variant that this machine runs, and thread counts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from ensemble_decode.ops import library, num_threads, set_num_threads

needs_library = pytest.mark.skipif(not library.available, reason="the compiled operators are not built")

SHAPES = [(33, 7), (160, 64), (50, 65), (32, 1)]  # (N, K): odd, whole groups, odd K, one step
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Largest error relative to the largest output: of the sums in float32, and of an output rounded to each dtype.
SUM_ERROR = 3e-6
ROUNDING = {torch.float32: SUM_ERROR, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(params=["v4", "v3", "base"])
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on each instruction set that this machine has."""
    before = torch.ops.ensemble_decode.cpu_variant()
    if not torch.ops.ensemble_decode.set_cpu_variant(request.param):
        pytest.skip(f"this machine does not run {request.param}")
    yield request.param
    torch.ops.ensemble_decode.set_cpu_variant(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = num_threads()
    set_num_threads(count)
    try:
        yield
    finally:
        set_num_threads(before)


def on_one_and_two_threads(f: Callable[[], Tensor]) -> Tensor:
    """f's result, which must be the same to the bit on one thread and on two."""
    with threads(1):
        one = f()
    with threads(2):
        two = f()
    assert torch.equal(one, two)
    return one


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
