"""int8 weights mean the matrix that they stand for: everything here is held against the dequantized weights."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ensemble_decode.ops import (
    decoder_layers,
    dequantize,
    library,
    linear,
    pack_gate_up,
    pack_int8,
    pack_weight,
    quantize_int8,
)

from .cpu import (
    DTYPES,
    ROUNDING,
    SHAPES,
    SUM_ERROR,
    needs_library,
    on_one_and_two_threads,
    random,
    relative_error,
    threads,
    variant,
)
from .test_decoder_layers import TOLERANCE, Layer, in_one_call

__all__ = ["variant"]
ODD = {"hidden_size": 45, "intermediate_size": 51, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 22}


def test_every_row_is_rounded_to_its_own_scale() -> None:
    weight = torch.stack([random(64), random(64) * 1e-3, torch.zeros(64), torch.full((64,), -2.54)])
    quantized, scale = quantize_int8(weight)
    assert quantized.abs().amax(1).tolist() == [127, 127, 0, 127]
    torch.testing.assert_close(scale, torch.tensor([*(weight[:2].abs().amax(1) / 127).tolist(), 1.0, 0.02]))
    assert ((dequantize(quantized, scale) - weight).abs() <= scale.unsqueeze(1) * 0.5001).all()


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 13, 97])
def test_linear_equals_the_dequantized_one(variant: str, dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(rows)
    for n, k in SHAPES:
        x, weight, bias = random(rows, k, dtype=dtype), random(n, k, dtype=dtype, scale=k**-0.5), random(n, dtype=dtype)
        packed, scale = pack_int8(weight)
        for b in (None, bias):
            exact = torch.nn.functional.linear(
                x.double(), dequantize(*quantize_int8(weight)).double(), None if b is None else b.double()
            )
            assert relative_error(linear(x, packed, b, n, True, scale), exact) < SUM_ERROR
            assert relative_error(linear(x, packed, b, n, scale=scale), exact) < ROUNDING[dtype]


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(variant: str, dtype: torch.dtype) -> None:
    x, (packed, scale) = random(200, 65, dtype=dtype), pack_int8(random(300, 65, dtype=dtype))
    batch = on_one_and_two_threads(lambda: linear(x, packed, None, 300, True, scale))
    for first, last in [(0, 1), (7, 8), (3, 8), (90, 103), (96, 200)]:
        assert torch.equal(linear(x[first:last], packed, None, 300, True, scale), batch[first:last])


class Int8Layer(Layer):
    """The operator reads int8 weights, transformers' module has what they stand for."""

    def weights(self) -> dict[str, Any]:
        attention, mlp = self.module.self_attn, self.module.mlp
        parts = {
            "qkv": torch.cat([x.weight for x in (attention.q_proj, attention.k_proj, attention.v_proj)]),
            "o": attention.o_proj.weight,
            "gate_up": torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
            "down": mlp.down_proj.weight,
        }
        packed = {name: pack_int8(w, pack_gate_up if name == "gate_up" else pack_weight) for name, w in parts.items()}
        scales = [scale for _, scale in packed.values()]
        return {**super().weights(), **{name: weight for name, (weight, _) in packed.items()}, "scales": scales}

    def expected(self, hidden: Tensor) -> Tensor:
        original = [linear.weight.data for linear in self.projections()]
        for projection in self.projections():
            rounded = dequantize(*quantize_int8(projection.weight))
            projection.weight.data = rounded.to(projection.weight.dtype)
        out = super().expected(hidden)
        for projection, weight in zip(self.projections(), original, strict=True):
            projection.weight.data = weight
        return out


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("changes", [{}, ODD], ids=["even", "odd"])
def test_layer_equals_the_dequantized_one(variant: str, dtype: torch.dtype, changes: dict[str, int]) -> None:
    torch.manual_seed(0)
    layer = Int8Layer.make("qwen3", dtype, **changes)
    width = changes.get("hidden_size", 48)
    sequences = [random(n, width, dtype=dtype) for n in (1, 20)]
    for x, out in zip(sequences, layer.whole(sequences), strict=True):
        assert relative_error(out, layer.expected(x)) < TOLERANCE[dtype]


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_with_adapters_is_batch_invariant(variant: str, dtype: torch.dtype) -> None:
    """Adapters are added to what int8 gives, unscaled; company and threads change no bit."""
    torch.manual_seed(0)
    layer = Int8Layer.make("llama", dtype)
    layer.add_lora(dtype)
    sequences, adapters = [random(n, 48, dtype=dtype) for n in (3, 40, 19)], [1, -1, 0]
    with threads(2):
        batch = layer.whole(sequences, adapters)
    for x, together, adapter in zip(sequences, batch, adapters, strict=True):
        with threads(1):
            assert torch.equal(layer.whole([x], [adapter])[0], together)


@needs_library
def test_layers_of_one_call_equal_one_call_each(variant: str) -> None:
    torch.manual_seed(0)
    layers, x = [Int8Layer.make("llama") for _ in range(3)], random(9, 48)
    one_by_one, calls = x, []
    for layer in layers:
        caches, _ = layer.paging([9], torch.float32)
        calls.append(layer.arguments(one_by_one, [9], [9], caches, torch.zeros(1, 1, dtype=torch.int32)))
        one_by_one = decoder_layers(**calls[-1])
    together = in_one_call(calls)
    for count in (1, 2, 5):
        with threads(count):
            assert torch.equal(decoder_layers(**together), one_by_one)


@needs_library
def test_adapters_are_not_scaled() -> None:
    torch.manual_seed(0)
    layer, x = Int8Layer.make("llama"), random(19, 48)
    (change,) = layer.add_lora(torch.float32, count=1)
    (out,) = layer.whole([x], [0])
    for projection, delta in zip(layer.projections(), change, strict=True):
        projection.weight.data = dequantize(*quantize_int8(projection.weight)) + delta
    assert relative_error(out, Layer.expected(layer, x)) < TOLERANCE[torch.float32]


@needs_library
def test_says_what_does_not_fit() -> None:
    packed, scale = pack_int8(random(40, 15))
    with pytest.raises(RuntimeError, match=r"packed is \[2, 16, 32\], it must be \[2, 18, 32\]"):
        linear(random(1, 17), packed, None, 40, scale=scale)
    with pytest.raises(RuntimeError, match=r"scale of packed is \[40\], it must be \[64\]"):
        linear(random(1, 15), packed, None, 40, scale=scale[:40])
    with pytest.raises(RuntimeError, match="packed has another dtype"):
        linear(random(1, 16), packed, None, 40)
    layer = Int8Layer.make("llama")
    good = layer.arguments(random(4, 48), [4], [4], *layer.paging([4], torch.float32))
    with pytest.raises(RuntimeError, match="scales has 1 tensors, it must have 0 or 4"):
        decoder_layers(**{**good, "scales": good["scales"][:1]})


@needs_library
def test_is_a_well_behaved_operator() -> None:
    weight = random(40, 17)
    packed, scale = pack_int8(weight)
    torch.library.opcheck(torch.ops.ensemble_decode.pack_weight, (quantize_int8(weight)[0],))
    torch.library.opcheck(torch.ops.ensemble_decode.linear, (random(3, 17), packed, None, 40, True, scale))


def test_works_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "available", False)
    x, weight = random(3, 17), random(40, 17)
    packed, scale = pack_int8(weight)
    torch.testing.assert_close(linear(x, packed, None, 40, scale=scale), x @ dequantize(*quantize_int8(weight)).t())
    layer, hidden = Int8Layer.make("qwen3"), random(20, 48)
    assert relative_error(layer.whole([hidden])[0], layer.expected(hidden)) < TOLERANCE[torch.float32]
