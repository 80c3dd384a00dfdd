"""The kernels beside attention: norms, rotary embedding with the cache, gating, LoRA, and the layer they make up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")
pytest.importorskip("greenlet", reason="needs greenlet")

from ensemble_decode.kernels import activation, decoder_layer, lora, rms_norm, rotary
from ensemble_decode.ops import pack_lora, reference_layers
from tests.ops.cpu import DTYPES, ROUNDING, needs_library, random, relative_error
from tests.ops.test_decoder_layers import FAMILIES, TOLERANCE, Layer
from tests.ops.test_lora import CASES, make, merged

from .aot import compile_call, resources, sass, uses_fp64
from .interp import SCHEDULES
from .standin import Planned, interpreted, memory_starts_as_nan, planned, standing_in


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 45, 576])
def test_rms_norm_equals_the_reference(width: int, dtype: torch.dtype) -> None:
    x, y, weight = random(2, 3, width, dtype=dtype), random(6, width, dtype=dtype), random(width, dtype=dtype)
    with interpreted(races=True), memory_starts_as_nan():
        out = rms_norm.rms_norm(x, weight, 1e-5, 1.0)
        total, normed = rms_norm.add_rms_norm(x.view(6, width), y, weight, 1e-5, 0.0)
        plain = rms_norm.add(total, y, dtype)
    assert relative_error(out, reference_layers.rms_norm(x, weight, 1e-5, 1.0)) < ROUNDING[dtype]
    exact = x.view(6, width).float() + y.float()
    assert torch.equal(total, exact)
    assert relative_error(normed, reference_layers.rms_norm(exact, weight, 1e-5)) < ROUNDING[dtype]
    assert torch.equal(plain, (exact + y.float()).to(dtype))


@pytest.mark.parametrize("kind", range(3), ids=["silu", "gelu_tanh", "gelu"])
def test_gating_equals_the_reference(kind: int) -> None:
    x = random(3, 2 * 1030, scale=3.0)
    with interpreted(races=True), memory_starts_as_nan():
        out = activation.gated(x, kind)
    gate, up = x.chunk(2, dim=1)
    assert relative_error(out, reference_layers.ACTIVATIONS[kind](gate) * up) < ROUNDING[torch.float32]


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_lora_equals_the_dense_product(case: tuple, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    y, x, a, b, adapter, segments = make(case, dtype)
    expected, before = y.double() + merged(x, a, b, adapter, segments), y.clone()
    with standing_in():
        torch.ops.ensemble_decode.lora_(y, x, *pack_lora(a, b), adapter, segments)
    assert relative_error(y, expected) < ROUNDING[dtype]
    assert torch.equal(y[adapter < 0], before[adapter < 0])


def test_lora_reads_an_adapter_once_a_tile_and_none_for_rows_without() -> None:
    y, x, a, b = random(32, 64), random(32, 128), random(2, 16, 128), random(2, 64, 16)
    adapter = torch.tensor([-1] * 16 + [0] * 8 + [1] * 8, dtype=torch.int32)
    with interpreted() as seen:
        lora.lora_(y, x, a, b, adapter, [64])
    assert seen["down.a"] == 2 * 16 * 128 * 4
    assert seen["down.x"] == 16 * 128 * 4
    assert seen["up.b"] == 2 * 64 * 16 * 4


@needs_library
@pytest.mark.parametrize(
    ("family", "dtype"), [*((x, torch.float32) for x in FAMILIES), ("llama", torch.bfloat16)], ids=str
)
def test_a_layer_equals_transformers(family: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    with standing_in():
        layer = Layer.make(family, dtype)
        sequences = [random(n, 48, dtype=dtype) for n in (1, 9)]
        for x, out in zip(sequences, layer.whole(sequences), strict=True):
            assert relative_error(out, layer.expected(x)) < TOLERANCE[dtype]


@needs_library
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_layer_in_any_order_of_programs(schedule: str) -> None:
    """Norms per head, odd sizes, adapters; the rows' own weights are those an adapter was merged into."""
    torch.manual_seed(0)
    with standing_in(schedule=schedule, races=True):
        layer = Layer.make(
            "qwen3", hidden_size=45, intermediate_size=51, num_attention_heads=3, num_key_value_heads=1, head_dim=22
        )
        changes = layer.add_lora(torch.float32)
        x = random(5, 45)
        plain, _, adapted = layer.whole([x, x, x], [-1, 0, 1])
    assert relative_error(plain, layer.expected(x)) < TOLERANCE[torch.float32]
    for linear, delta in zip(layer.projections(), changes[1], strict=True):
        linear.weight.data += delta
    assert relative_error(adapted, layer.expected(x)) < TOLERANCE[torch.float32]


@needs_library
@pytest.mark.parametrize(
    ("module", "name", "broken"),
    [
        (decoder_layer, "rotary_and_cache", lambda f: lambda qkv, cos, sin, *rest: f(qkv, cos, -sin, *rest)),
        (decoder_layer, "gated", lambda f: lambda x, kind: f(x.roll(x.shape[1] // 2, 1), kind)),
        (decoder_layer, "add", lambda f: lambda x, y, dtype: f(x, x, dtype)),
        (decoder_layer, "add_rms_norm", lambda f: lambda x, y, *rest: f(y, y, *rest)),
        (decoder_layer, "lora_", lambda f: lambda y, x, a, b, adapter, s: f(y, x, a, b, adapter.roll(1), s)),
    ],
    ids=["rotated backwards", "gate and up exchanged", "no residual", "residual left out", "a neighbour's adapter"],
)
def test_a_planted_bug_is_found(module: Any, name: str, broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(module, name, broken(getattr(module, name)))
    with standing_in():
        layer = Layer.make("llama")
        changes = layer.add_lora(torch.float32)
        x = random(9, 48)
        plain, adapted = layer.whole([x, x], [-1, 0])
    wrong = relative_error(plain, layer.expected(x)) > TOLERANCE[torch.float32]
    for linear, delta in zip(layer.projections(), changes[0], strict=True):
        linear.weight.data += delta
    assert wrong or relative_error(adapted, layer.expected(x)) > TOLERANCE[torch.float32]


@needs_library
def test_operators_are_well_behaved_through_the_dispatcher() -> None:
    """Schemas, aliasing and fakes of the CUDA implementations, where they stand in for the CPU's."""
    ops = torch.ops.ensemble_decode
    y, x, a, b, adapter, segments = make(CASES[1], torch.float32)
    with standing_in():
        layer = Layer.make("llama")
        caches, table = layer.paging([4], torch.float32)
        arguments = layer.arguments(random(4, 48), [4], [4], tuple(c.zero_() for c in caches), table)
        names = [argument.name for argument in ops.decoder_layers.default._schema.arguments]
        utilities = ("test_schema", "test_faketensor")
        torch.library.opcheck(
            ops.decoder_layers, tuple(arguments[name] for name in names), test_utils=utilities, rtol=1e-4, atol=1e-4
        )
        torch.library.opcheck(ops.rms_norm, (x, random(x.shape[1]), 1e-5, 0.0), test_utils=utilities)
        torch.library.opcheck(ops.lora_, (y, x, a, b, adapter, segments), test_utils=utilities)
        torch.library.opcheck(ops.linear, (x, random(7, x.shape[1]), None, 7, True), test_utils=utilities)


def llama_layer(dtype: torch.dtype, tokens: int = 8, sequences: int = 8, rank: int = 16) -> list[Planned]:
    """The launches of a layer of Llama 3.1 8B with adapters, on tensors that hold nothing."""
    e, h, hkv, d, i = 4096, 32, 8, 128, 14336
    with planned() as launches, torch.device("meta"):

        def empty(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=dtype)

        widths = ((e, (h + 2 * hkv) * d, 3), (h * d, e, 1), (e, 2 * i, 2), (i, e, 1))
        factors = [f for k, n, parts in widths for f in (empty(3, parts * rank, k), empty(3, n, rank))]
        index = [torch.empty(n, dtype=torch.int32) for n in (tokens, sequences + 1, sequences)]
        decoder_layer.decoder_layer(
            empty(tokens, e),
            empty(tokens, d),
            empty(tokens, d),
            empty(e),
            empty(e),
            *(empty((h + 2 * hkv) * d, e), None),
            *(empty(e, h * d), None),
            empty(2 * i, e),
            empty(e, i),
            *(empty(d), empty(d)),
            factors,
            index[0],
            *(empty(100, hkv, 16, d), empty(100, hkv, 16, d)),
            *index[1:],
            torch.empty(sequences, 64, dtype=torch.int32),
            *(h, hkv, d, i, 1e-5, 0.0, d**-0.5, 0),
        )
    return launches


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        *((arch, torch.bfloat16) for arch in (80, 90, 100, "gfx942")),
        (80, torch.float32),
    ],
    ids=str,
)
def test_compiles_without_spills_and_with_wide_accesses(arch: int | str, dtype: torch.dtype) -> None:
    by_name = {x.name: x for x in llama_layer(dtype) if x.name != "attend"}  # that one has a file of its own
    assert set(by_name) == {"norm_rows", "rotate_and_write", "gate_rows", "down", "up", "merge"}
    for name, launch in by_name.items():
        arguments = {
            **launch.arguments,
            **({"PRECISION": "ieee"} if arch == "gfx942" and name in ("down", "up") else {}),
        }
        compiled = compile_call(launch.kernel, arch, arguments, **launch.options)
        used = resources(compiled)
        assert used.spill_bytes == used.stack_bytes == 0
        assert used.registers <= (216 if name == "down" else 128)
        assert used.shared_bytes <= 48 * 1024
        if isinstance(arch, int):
            text = sass(compiled)
            assert not uses_fp64(text)
            assert "LDG.E.128" in text or "LDGSTS.E.BYPASS.128" in text


def test_launches_of_a_layer() -> None:
    names = [launch.name for launch in llama_layer(torch.bfloat16)]
    adapter = ["down", "up"]
    assert names == [
        *("norm_rows", *adapter, "rotate_and_write", "attend", "merge", *adapter),
        *("norm_rows", *adapter, "gate_rows", *adapter, "norm_rows"),
    ]


def test_rotary_equals_the_reference_for_a_part_of_a_head() -> None:
    torch.manual_seed(0)
    tokens, h, hkv, d, turned = 6, 3, 1, 20, 12
    qkv, cos, sin = random(tokens, (h + 2 * hkv) * d), random(tokens, turned), random(tokens, turned)
    caches = [torch.full((2, hkv, 16, d), float("nan")) for _ in range(2)]
    index = [torch.tensor(x, dtype=torch.int32) for x in ([0, 4, 6], [7, 2], [[1], [0]])]
    with interpreted(races=True), memory_starts_as_nan():
        q = rotary.rotary_and_cache(qkv, cos, sin, None, None, *caches, *index, h, 1e-5, 0.0)
    heads = qkv.view(tokens, -1, d)
    torch.testing.assert_close(q, reference_layers.rotate(heads[:, :h], cos, sin))
    keys = reference_layers.rotate(heads[:, h : h + 1], cos, sin)
    torch.testing.assert_close(caches[0][1, 0, 3:7], keys[:4, 0])
    torch.testing.assert_close(caches[0][0, 0, :2], keys[4:, 0])
    assert torch.equal(caches[1][1, 0, 3:7], heads[:4, h + 1])
    assert caches[0].isnan().sum() == caches[1].isnan().sum() == (2 * 16 - tokens) * d
