"""What is read from compiled kernels is there when it is, and not when it isn't."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from . import sample_kernels as kernels
from .aot import compile_call, compile_for, loops, opcodes, resources, sass, uses_fp64

SUM = {"x": "*fp32", "y": "*fp32", "out": "*fp32", "alpha": "fp32", "n": "i32"}


def scaled_sum(masked: bool = False, **options: Any) -> Any:
    return compile_for(
        kernels.scaled_sum, 90, SUM, {"BLOCK": 2048, "MASKED": masked}, ("x", "y"), num_warps=8, **options
    )


def test_loop_with_wide_loads() -> None:
    bodies = [body for body in loops(sass(scaled_sum())) if any("LDG" in x for x in body)]
    assert len(bodies) == 1
    assert all(".128" in x for x in bodies[0] if "LDG" in x)


def test_a_mask_at_an_odd_length_is_seen_to_cost_the_width() -> None:
    assert not any("128" in name for name in opcodes(sass(scaled_sum(masked=True))) if name.startswith("LDG"))


@pytest.mark.parametrize("arch", [90, "gfx942"])
def test_spills_are_seen(arch: int | str) -> None:
    types, options = {"x": "*fp32", "out": "*fp32"}, {} if isinstance(arch, int) else {"waves_per_eu": 2}
    small, large = (  # of NVIDIA's 255 registers, or of 256 where AMD's two waves share 512
        resources(compile_for(kernels.many_values, arch, types, {"BLOCK": block}, num_warps=1, **options))
        for block in (512, 8192 if isinstance(arch, int) else 16384)
    )
    assert small.spill_bytes == 0
    assert large.spill_bytes > 0


def test_contraction_is_seen() -> None:
    def fused(on: bool) -> int:
        return sum(n for name, n in opcodes(sass(scaled_sum(enable_fp_fusion=on))).items() if name.startswith("FFMA"))

    assert fused(False) == 0
    assert fused(True) > 0


def test_fp64_is_seen() -> None:
    compiled = compile_for(kernels.doubles, 90, {"x": "*fp32", "out": "*fp32"}, {"BLOCK": 64})
    assert uses_fp64(sass(compiled))
    assert not uses_fp64(sass(scaled_sum()))


def test_a_call_is_specialised_as_the_launcher_does() -> None:
    arguments = {"x": torch.zeros(4096), "y": torch.zeros(4096), "out": torch.zeros(1), "alpha": 0.5, "MASKED": True}
    wide, narrow = (
        opcodes(sass(compile_call(kernels.scaled_sum, 90, {**arguments, "n": n, "BLOCK": 2048}, num_warps=8)))
        for n in (4096, 4095)
    )
    assert any(name.startswith("LDG") and "128" in name for name in wide)
    assert not any(name.startswith("LDG") and "128" in name for name in narrow)
