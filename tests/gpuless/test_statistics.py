"""The noise of the GPU kernels as a random number, and the draws that it makes.

The kernels are held to the reference token by token, and a million draws, a Zipf tail and neighbouring seeds are tested of
that arithmetic in tests/ops. What a token comparison sees too rarely is tested here of the kernels' own noise: whole blocks of
it at once, the words whose tokens win, and draws of seeds and positions side by side.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")
pytest.importorskip("greenlet", reason="needs greenlet")

from ensemble_decode.ops import reference

from ..ops.sampling_cases import Case, chi_square, make_case
from . import cuda_cases, sample_kernels
from .interp import run

LOGITS = torch.tensor([0.0, 0.5, 1.0, 1.5])


def test_whole_blocks_of_noise_are_the_references() -> None:
    """2¹⁶ tokens: differences are roundings of the last step."""
    for seed, position in ((0, 0), (2**40 + 12345, 7), (-1, 2**31 - 1)):
        noise = torch.empty(2**16)
        run(sample_kernels.noise_of_a_row, (1,), noise, seed, position, BLOCK=2**16)
        want = reference.gumbel_noise(torch.tensor([seed]), torch.tensor([position]), 2**16)[0]
        torch.testing.assert_close(noise, want, rtol=1e-6, atol=1e-6)


def test_words_whose_tokens_win_keep_their_noise() -> None:
    """Against float64. The smallest words have the largest g, one of each: where log(1 − u) would give steps and infinities."""
    words = torch.cat([torch.arange(2**12), 2 ** torch.arange(12, 32), 2**32 - 2 ** torch.arange(9, 31)])
    noise = torch.empty(4096 * 2)
    padded = torch.cat([words, torch.zeros(len(noise) - len(words), dtype=torch.int64)])
    run(sample_kernels.noise_of_words, (1,), padded, noise, BLOCK=len(noise))
    u = (words.float() + 0.5).double() * 2.0**-32
    torch.testing.assert_close(noise[: len(words)].double(), -torch.log(-torch.log1p(-u)), rtol=1e-6, atol=5e-7)
    assert len(noise[:2048].unique()) == 2048


def draws(seed: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Tokens of rows of four, one for each seed and position, with the kernels' noise."""
    noise = torch.empty(4 * len(seed))
    run(sample_kernels.noise_of_quads, (1,), noise, seed, position, ROWS=len(seed))
    return (LOGITS + noise.view(-1, 4)).argmax(-1)


def test_draws_follow_the_distribution(capsys: pytest.CaptureFixture) -> None:
    """And the test notices a percent too much of one token."""
    count = 2**17
    counts = torch.bincount(draws(torch.arange(count) * 3, torch.full((count,), 17)), minlength=4)
    p, covered = chi_square(counts, LOGITS.double().softmax(0))
    with capsys.disabled():
        print(f" [{count} draws: chi-square p = {p:.3f}, covered mass {covered:.6f}]", end="")
    assert p > 1e-4
    wrong = LOGITS.clone()
    wrong[3] += 0.05
    assert chi_square(counts, wrong.double().softmax(0))[0] < 1e-4


@pytest.mark.parametrize("step", [(1, 0), (0, 1), (2**32, 0), (0x9E3779B97F4A7C15 - 2**64, 0)], ids=str)
def test_neighbouring_seeds_and_positions_are_independent(step: tuple[int, int]) -> None:
    count = 2**16
    seed, position = torch.arange(count) * 2, torch.arange(count) // 7
    first, second = (draws(seed + i * step[0], position + i * step[1]) for i in (0, 1))
    p = LOGITS.double().softmax(0)
    assert chi_square(torch.bincount(4 * first + second, minlength=16), torch.outer(p, p).flatten())[0] > 1e-4


@pytest.mark.skipif(cuda_cases.COMPILER is None, reason="no g++")
@pytest.mark.parametrize("two_launches", [False, True], ids=["cluster", "two launches"])
def test_draws_of_the_cuda_kernels(two_launches: bool, cuda_program: Path, capsys: pytest.CaptureFixture) -> None:
    """Of whole rows: the kept set alone, in proportion, neighbouring seeds independent."""
    count = 600 if two_launches else 200
    case = make_case(12, [(0.8, 0, 0.0, 1.0)] * count)
    z = torch.linspace(0, 2.5, 12)
    case.target, case.seed, case.position = (
        z.expand(count, -1).contiguous(),
        torch.arange(count),
        torch.full((count,), 5),
    )
    token = sampled(case, cuda_program, two_launches)
    keep = reference.kept(z, 0, 0.8, 0.0)
    truth = z.double().masked_fill(~keep, -math.inf).softmax(0)
    p, covered = chi_square(torch.bincount(token, minlength=12), truth)
    assert keep[token].all()
    high = (token > 9).long()
    both = torch.bincount(2 * high[:-1] + high[1:], minlength=4)
    share = torch.stack([truth[:10].sum(), truth[10:].sum()])
    with capsys.disabled():
        print(f" [{count} draws: chi-square p = {p:.3f}, covered mass {covered:.3f}]", end="")
    assert p > 1e-4
    assert chi_square(both, torch.outer(share, share).flatten())[0] > 1e-4


@pytest.fixture(scope="module")
def cuda_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cuda_cases.build(tmp_path_factory.mktemp("cuda") / "plain", threads=64)


def sampled(case: Case, program: Path, two_launches: bool) -> torch.Tensor:
    return cuda_cases.run(program, [case], two_launches=two_launches)[0].token
