"""How a product of float32 matrices is computed on a GPU's matrix units."""

from __future__ import annotations

import torch


def dot_precision() -> str:
    """``input_precision`` for ``tl.dot``: what leaves float32 products accurate to about 2⁻²².

    Triton's default on NVIDIA, tf32, has 10 bits. tf32x3 splits each operand into two and adds three products; plain
    "ieee" would be exact, but becomes scalar arithmetic there and spills hundreds of registers. AMD multiplies float32
    natively. Products of bfloat16 or float16 are exact either way.
    """
    return "tf32x3" if torch.version.hip is None else "ieee"
