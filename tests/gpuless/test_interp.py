"""The checking interpreter finds what it claims to find, and leaves Triton as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")
pytest.importorskip("greenlet", reason="needs greenlet")

from . import sample_kernels as kernels
from .aot import compile_for
from .interp import SCHEDULES, KernelFault, run

FAULTS: list[tuple[str, str, Callable[[], object]]] = [
    (
        "load past the end",
        "out-of-bounds load",
        lambda: run(kernels.copy_reads_past_the_end, (1,), torch.zeros(100), torch.zeros(100), N=100, BLOCK=128),
    ),
    (
        "store past the end",
        "out-of-bounds store",
        lambda: run(kernels.copy_writes_past_the_end, (1,), torch.zeros(100), torch.zeros(100), N=100, BLOCK=128),
    ),
    (
        "two values to one address",
        "two values",
        lambda: run(kernels.stores_twice, (1,), torch.zeros(16), torch.zeros(16, dtype=torch.int32), BLOCK=16),
    ),
    ("misaligned", "misaligned load", lambda: run(kernels.reads_misaligned, (1,), torch.zeros(4), torch.zeros(4))),
    (
        "deadlock",
        "deadlock",
        lambda: run(
            kernels.waits_for_all,
            (3,),
            torch.zeros(1, dtype=torch.int32),
            torch.zeros(4, dtype=torch.int32),
            PROGRAMS=4,
            schedule="preemptive",
            max_switches=2000,
        ),
    ),
]


@pytest.mark.parametrize(("message", "launch"), [x[1:] for x in FAULTS], ids=[x[0] for x in FAULTS])
def test_fault_is_found(message: str, launch: Callable[[], object]) -> None:
    with pytest.raises(KernelFault, match=message):
        launch()


def test_uninitialised_read_is_found() -> None:
    x = torch.empty(16)
    with pytest.raises(KernelFault, match="uninitialised"):
        run(kernels.copy_reads_past_the_end, (1,), x, torch.zeros(16), N=16, BLOCK=16, uninitialised=(x,))


def test_int32_overflow_is_found() -> None:
    with pytest.raises(AssertionError, match="overflow"):
        run(kernels.offset_in_int32, (1,), torch.zeros(4), torch.zeros(4), 262144)
    run(kernels.offset_in_int64, (1,), torch.zeros(4), torch.zeros(4), 262144)


def test_device_assert_is_found() -> None:
    with pytest.raises(AssertionError, match="boom"):
        run(kernels.asserts_negative, (1,), torch.zeros(4), torch.zeros(4))


def test_bfloat16_rounds_to_nearest_even() -> None:
    x, out = torch.randn(256), torch.zeros(256, dtype=torch.bfloat16)
    run(kernels.to_bfloat16, (1,), x, out, BLOCK=256)
    assert torch.equal(out, x.bfloat16())


def split_sum(semantics: str, schedule: str, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    x, out, ticket = torch.randn(256), torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    partial = torch.empty(4)
    traffic = run(
        kernels.split_sum,
        (4,),
        x,
        partial,
        ticket,
        out,
        SEMANTICS=semantics,
        CHUNK=64,
        SPLITS=4,
        schedule=schedule,
        order_seed=seed,
        races=True,
        uninitialised=(partial,),
    )
    return x, out, ticket, traffic.read["x"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_right_protocol_passes_in_every_order_and_each_byte_is_read_once(schedule: str) -> None:
    for seed in range(4):
        x, out, ticket, bytes_read = split_sum("acq_rel", schedule, seed)
        torch.testing.assert_close(out[0], x.sum())
        assert ticket.item() == 0
        assert bytes_read == 256 * 4


def test_a_relaxed_ticket_is_a_race() -> None:
    with pytest.raises(KernelFault, match="race"):
        split_sum("relaxed", "preemptive", 0)


def test_programs_that_wait_for_each_other_run_when_preempted() -> None:
    out = torch.zeros(4, dtype=torch.int32)
    run(
        kernels.waits_for_all,
        (4,),
        torch.zeros(1, dtype=torch.int32),
        out,
        PROGRAMS=4,
        schedule="preemptive",
        order_seed=1,
    )
    assert out.tolist() == [0, 1, 2, 3]


def test_real_compilation_works_after_interpretation() -> None:
    test_bfloat16_rounds_to_nearest_even()
    compiled = compile_for(kernels.to_bfloat16, 80, {"x": "*fp32", "out": "*bf16"}, {"BLOCK": 256})
    assert "ptx" in compiled.asm
