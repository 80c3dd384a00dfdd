"""The words of Philox4x32-10 and the Gumbel noise made of them, in the reference and in csrc/philox.h."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from ensemble_decode.ops import reference

CSRC = Path(__file__).parents[2] / "csrc"

#: Random123's kat_vectors, "philox4x32 10": counter, key, words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def words(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    """Philox4x32-10 in Python's own integers, from the paper's Figure 4."""
    (l0, r0, l1, r1), (k0, k1) = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * l0, 0xCD9E8D57 * l1
        l0, r0, l1, r1 = (b >> 32) ^ r0 ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ r1 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [l0, r0, l1, r1]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_known_answers(counter: tuple, key: tuple, answer: tuple) -> None:
    as_tensors = reference.philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(map(int, as_tensors)) == answer
    assert tuple(words(counter, key)) == answer


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_known_answers_of_the_header(tmp_path: Path) -> None:
    calls = "".join(
        f"show(philox4x32_10({', '.join(f'{x}u' for x in (*counter, *key))}));" for counter, key, _ in KNOWN_ANSWERS
    )
    program = (
        f'#include "{CSRC / "philox.h"}"\n#include <cstdio>\nusing namespace ensemble_decode;\n'
        'void show(PhiloxWords w) { std::printf("%u %u %u %u\\n", w.word[0], w.word[1], w.word[2], w.word[3]); }\n'
        f"int main() {{ {calls} }}\n"
    )
    (tmp_path / "words.cpp").write_text(program)
    subprocess.run(["g++", "-std=c++20", "-o", tmp_path / "words", tmp_path / "words.cpp"], check=True)
    lines = subprocess.run([tmp_path / "words"], check=True, capture_output=True, text=True).stdout.splitlines()
    assert [tuple(map(int, line.split())) for line in lines] == [answer for _, _, answer in KNOWN_ANSWERS]


def test_noise_is_the_contracts_formula() -> None:
    """counter = (token >> 2, position, 0, 0), key = (seed's low half, its high half), word number token & 3."""
    seeds, positions, vocab = (
        [0, 1, -1, 0x9E3779B97F4A7C15 - 2**64, 1 << 32, 2**63 - 1],
        [0, 1, 7, 2**31, 2**32 - 1, 131071],
        11,
    )
    noise = reference.gumbel_noise(torch.tensor(seeds), torch.tensor(positions), vocab)
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        for token in range(vocab):
            word = words((token >> 2, position, 0, 0), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))[token & 3]
            expected = -math.log(-math.log1p(-(word + 0.5) / 2**32))
            assert noise[row, token] == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_noise_of_a_token_does_not_depend_on_the_vocabulary() -> None:
    seed, position = torch.tensor([5, 6]), torch.tensor([9, 10])
    assert torch.equal(
        reference.gumbel_noise(seed, position, 50257)[:, :1001], reference.gumbel_noise(seed, position, 1001)
    )


def test_noise_is_gumbel() -> None:
    """Mean γ, variance π²/6, and the distribution function at many points, within 4.5 standard errors."""
    noise = reference.gumbel_noise(torch.arange(8), torch.arange(8), 1 << 16).flatten().double()
    n = noise.numel()
    assert abs(noise.mean() - 0.5772156649) < 4.5 * math.sqrt(math.pi**2 / 6 / n)
    assert abs(noise.var() - math.pi**2 / 6) < 4.5 * math.sqrt(4.4 * (math.pi**2 / 6) ** 2 / n)
    for x in torch.linspace(-2, 12, 57, dtype=torch.float64).tolist():
        p = math.exp(-math.exp(-x))
        assert abs((noise <= x).double().mean() - p) < 4.5 * math.sqrt(p * (1 - p) / n) + 1 / n
