"""The C++ example builds from the headers alone, and its tokens are the operator's."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from ensemble_decode import ops

EXAMPLE = Path(__file__).parents[2] / "examples" / "embed_cpp"


@pytest.mark.skipif(
    shutil.which("g++") is None or shutil.which("make") is None or platform.system() != "Linux",
    reason="building the example needs g++ and make",
)
def test_the_example_says_what_the_operator_says(tmp_path: Path) -> None:
    """Compiled without optimisation, which is quick: the contract's tokens do not depend on it."""
    command = ["make", "-s", "-C", str(EXAMPLE), "run", f"BUILD={tmp_path}", "OPT=-O0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    if shutil.which("nvcc") is not None:  # the same with the CUDA version in it, for one architecture
        (tmp_path / "embed").unlink()
        with_cuda = subprocess.run(
            [*command, "CUDA=1", "CODES=-arch=sm_90"], capture_output=True, text=True, timeout=300
        )
        assert with_cuda.returncode == 0, with_cuda.stderr[-2000:]
        assert with_cuda.stdout.startswith(done.stdout)
        assert re.search(r"^cuda (there is no GPU here|row 1 token -?\d+)$", with_cuda.stdout, re.M)
    rows = re.findall(r"cpu  row \d token (-?\d+) logprob (\S+) target_logprob (\S+)", done.stdout)
    i = torch.arange(2 * 50257).view(2, -1)
    z, plus, minus = (((x * 2654435761 & 0xFFFFFFFF) >> 16).float() / 8192 for x in (i, 3 * i + 1, 5 * i + 2))
    got = ops.ensemble_sample(
        z,
        plus.unsqueeze(0),
        minus.unsqueeze(0),
        alpha=torch.tensor([[1.5], [0.0]]),
        temperature=torch.tensor([0.8, 0.0]),
        top_p=torch.tensor([0.9, 1.0]),
        seed=torch.tensor([42, 43]),
        position=7,
    )
    assert [int(token) for token, _, _ in rows] == got.token.tolist()
    printed = torch.tensor([[float(x), float(y)] for _, x, y in rows])
    torch.testing.assert_close(printed, torch.stack([got.logprob, got.target_logprob], 1), atol=2e-5, rtol=0)
