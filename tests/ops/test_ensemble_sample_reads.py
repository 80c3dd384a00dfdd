"""What ensemble_sample and combine read: nothing past a row's end, and nothing of a pair whose α is 0.

The logits lie in memory that ends at a page without read permission, or are that page: a read too many kills the
process, so each case runs in one of its own.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import ctypes, mmap, sys
import torch
from ensemble_decode import ops

protect, NONE = ctypes.CDLL(None, use_errno=True).mprotect, 0
maps = []

def logits(readable, dtype, *shape):
    size = torch.Size(shape).numel() * dtype.itemsize
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    maps.append(memory)
    x = torch.frombuffer(memory, dtype=dtype, offset=pages - size, count=size // dtype.itemsize).view(shape)
    x.copy_(torch.linspace(-3, 3, x.numel()).view(shape))
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + (pages if readable else 0)
    if protect(ctypes.c_void_p(start), mmap.PAGESIZE + (0 if readable else pages), NONE):
        sys.exit("mprotect failed")
    return x

def call(alpha, readable, vocab, dtype):
    target = logits(True, dtype, 2, vocab)
    expert, anti = (logits(readable, dtype, 1, 2, vocab) for _ in range(2))
    for top_p in (0.9, 1.0):
        for nucleus in ("combined", "target"):
            ops.ensemble_sample(target, expert, anti, alpha=alpha, top_p=top_p, seed=1, position=1, nucleus=nucleus)
    ops.combine(target, expert, anti, alpha)

ops.set_num_threads(2)
exec(sys.argv[1])
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")


def run(what: str) -> int:
    root = Path(__file__).parents[2]
    return subprocess.run([sys.executable, "-c", PROGRAM, what], cwd=root, stderr=subprocess.DEVNULL).returncode


def test_nothing_is_read_past_the_end_and_nothing_of_a_pair_with_alpha_0() -> None:
    shapes = [(1, "float32"), (15, "float16"), (257, "bfloat16"), (4097, "float32"), (50257, "float16")]
    calls = [f"call({alpha}, {alpha} != 0, {vocab}, torch.{dtype})" for vocab, dtype in shapes for alpha in (1.0, 0.0)]
    assert run("\n".join(calls)) == 0


def test_a_read_of_forbidden_memory_would_be_noticed() -> None:
    """The negative control: α = 1 over an expert that may not be read."""
    assert run("call(1.0, False, 4097, torch.float32)") == -signal.SIGSEGV
