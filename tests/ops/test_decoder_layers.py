from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ensemble_decode.ops import decoder_layers, library, new_caches, pack_gate_up, pack_lora, pack_weight
from ensemble_decode.ops.paged_attention import BLOCK_SIZE

from .cpu import DTYPES, needs_library, random, relative_error, threads, variant

__all__ = ["variant"]
SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 1,
    "vocab_size": 8,
    "max_position_embeddings": 1024,
}
FAMILIES = {
    "llama": {},
    "llama with biases and exact gelu": {"attention_bias": True, "hidden_act": "gelu"},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
}
#: Largest error relative to the largest output. transformers rounds every intermediate, so it is the looser one.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass
class Layer:
    """transformers' layer with random weights, and the same as the operator takes it."""

    module: torch.nn.Module
    rotary: torch.nn.Module
    activation: int
    offset: float
    lora: list[Tensor] = field(default_factory=list)

    @classmethod
    def make(cls, family: str, dtype: torch.dtype = torch.float32, **changes: int) -> "Layer":
        config = AutoConfig.for_model(family.split()[0], **{**SHAPE, **FAMILIES[family], **changes})
        config._attn_implementation = "eager"
        model = AutoModelForCausalLM.from_config(config).to(dtype).eval().requires_grad_(False)
        for parameter in model.parameters():  # biases and norms too, which start as constants
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5)
        name = getattr(config, "hidden_activation", None) or config.hidden_act
        activation = {"silu": 0, "gelu_pytorch_tanh": 1, "gelu": 2}[name]
        rotary = LlamaRotaryEmbedding(config)
        return cls(model.model.layers[0], rotary, activation, 1.0 if family == "gemma" else 0.0)

    def expected(self, hidden: Tensor) -> Tensor:
        """transformers' output for one sequence [T, E]."""
        tokens = hidden.shape[0]
        mask = torch.full((tokens, tokens), torch.finfo(hidden.dtype).min, dtype=hidden.dtype).triu(1)[None, None]
        position = torch.arange(tokens)[None]
        out = self.module(
            hidden[None],
            attention_mask=mask,
            position_ids=position,
            position_embeddings=self.rotary(hidden[None], position),
        )
        return (out[0] if isinstance(out, tuple) else out).view(tokens, -1)

    def weights(self) -> dict[str, Any]:
        attention, mlp = self.module.self_attn, self.module.mlp
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        return {
            "norm1": self.module.input_layernorm.weight,
            "norm2": self.module.post_attention_layernorm.weight,
            "qkv": pack_weight(torch.cat([x.weight for x in parts])),
            "qkv_bias": None if parts[0].bias is None else torch.cat([x.bias for x in parts]),
            "o": pack_weight(attention.o_proj.weight),
            "o_bias": attention.o_proj.bias,
            "gate_up": pack_gate_up(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])),
            "down": pack_weight(mlp.down_proj.weight),
            "q_norm": attention.q_norm.weight if hasattr(attention, "q_norm") else None,
            "k_norm": attention.k_norm.weight if hasattr(attention, "k_norm") else None,
        }

    def arguments(
        self,
        hidden: Tensor,
        counts: list[int],
        lengths: list[int],
        caches: tuple[Tensor, Tensor],
        table: Tensor,
        adapter: Tensor | None = None,
    ) -> dict[str, object]:
        """The operator's arguments for the last ``counts`` tokens of sequences of ``lengths``, by name."""
        attention, norm = self.module.self_attn, self.module.input_layernorm
        position = torch.cat([torch.arange(n - c, n) for c, n in zip(counts, lengths, strict=True)])[None]
        cos, sin = self.rotary(hidden[None], position)
        found = self.weights()
        scales = found.pop("scales", [])
        weights = {name: [] if x is None else [x] for name, x in found.items()}
        return {
            "hidden": hidden,
            "cos": cos[0],
            "sin": sin[0],
            **weights,
            "lora": self.lora if adapter is not None else [],
            "adapter": adapter,
            "k_cache": [caches[0]],
            "v_cache": [caches[1]],
            "query_start": torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32),
            "context_len": torch.tensor(lengths, dtype=torch.int32),
            "block_table": table,
            "num_heads": attention.q_proj.weight.shape[0] // attention.head_dim,
            "num_kv_heads": attention.k_proj.weight.shape[0] // attention.head_dim,
            "head_dim": attention.head_dim,
            "intermediate": self.module.mlp.gate_proj.weight.shape[0],
            "eps": norm.eps if hasattr(norm, "eps") else norm.variance_epsilon,
            "weight_offset": self.offset,
            "scale": attention.scaling,
            "activation": self.activation,
            "scales": scales,
        }

    def paging(self, lengths: list[int], dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Caches full of NaN and a scattered block table."""
        width = max(-(-n // BLOCK_SIZE) for n in lengths)
        attention = self.module.self_attn
        heads = attention.k_proj.weight.shape[0] // attention.head_dim
        caches = new_caches(width * len(lengths), heads, attention.head_dim, dtype)
        for cache in caches:
            cache.fill_(float("nan"))
        return caches, torch.randperm(width * len(lengths)).int().view(len(lengths), width)

    def whole(self, sequences: list[Tensor], adapters: list[int] | None = None) -> list[Tensor]:
        """The operator's output for whole sequences in one call."""
        lengths = [len(x) for x in sequences]
        caches, table = self.paging(lengths, sequences[0].dtype)
        adapter = None
        if adapters is not None:
            adapter = torch.tensor(adapters, dtype=torch.int32).repeat_interleave(torch.tensor(lengths))
        out = decoder_layers(**self.arguments(torch.cat(sequences), lengths, lengths, caches, table, adapter))
        return list(out.split(lengths))

    def add_lora(self, dtype: torch.dtype, count: int = 2, rank: int = 4) -> list[list[Tensor]]:
        """Random adapters; returns, for each, what it adds to the seven projections' weights."""
        attention, mlp = self.module.self_attn, self.module.mlp
        groups = (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        )
        changes: list[list[Tensor]] = [[] for _ in range(count)]
        self.lora = []
        for linears in groups:
            k, widths = linears[0].weight.shape[1], [x.weight.shape[0] for x in linears]
            a = random(count, len(linears) * rank, k, dtype=dtype, scale=k**-0.5)
            b = random(count, sum(widths), rank, dtype=dtype, scale=rank**-0.5)
            self.lora += pack_lora(a, b)
            for index in range(count):
                for up, down in zip(b[index].split(widths), a[index].split(rank), strict=True):
                    changes[index].append(up.float() @ down.float())
        return changes

    def projections(self) -> list[torch.nn.Module]:
        attention, mlp = self.module.self_attn, self.module.mlp
        return [
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
            attention.o_proj,
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
        ]


def in_one_call(calls: list[dict[str, Any]]) -> dict[str, Any]:
    """The arguments of one call for the layers of several, whose first one's tokens it takes."""
    return {
        name: [x for call in calls for x in call[name]] if isinstance(value, list) else value
        for name, value in calls[0].items()
    }


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(variant: str, family: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = Layer.make(family, dtype)
    sequences = [random(n, 48, dtype=dtype) for n in (1, 20, 70)]
    for x, out in zip(sequences, layer.whole(sequences), strict=True):
        assert relative_error(out, layer.expected(x)) < TOLERANCE[dtype]


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_sizes(variant: str, dtype: torch.dtype) -> None:
    """Widths that are no multiple of anything: padding inside packed weights must not leak."""
    layer = Layer.make(
        "qwen3", dtype, hidden_size=45, intermediate_size=51, num_attention_heads=3, num_key_value_heads=1, head_dim=22
    )
    sequences = [random(n, 45, dtype=dtype) for n in (3, 17)]
    for x, out in zip(sequences, layer.whole(sequences), strict=True):
        assert relative_error(out, layer.expected(x)) < TOLERANCE[dtype]


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_each_row_has_its_adapter(variant: str, family: str, dtype: torch.dtype) -> None:
    """Rows with an adapter equal transformers' layer whose weights the adapter was merged into."""
    torch.manual_seed(0)
    layer = Layer.make(family, dtype)
    changes = layer.add_lora(dtype)
    x = random(19, 48, dtype=dtype)
    plain, first, second = layer.whole([x, x, x], [-1, 0, 1])
    assert torch.equal(plain, layer.whole([x])[0])
    for out, change in ((first, changes[0]), (second, changes[1])):
        original = [linear.weight.data for linear in layer.projections()]
        for linear, delta in zip(layer.projections(), change, strict=True):
            linear.weight.data = (linear.weight.float() + delta).to(dtype)
        assert relative_error(out, layer.expected(x)) < TOLERANCE[dtype]
        for linear, weight in zip(layer.projections(), original, strict=True):
            linear.weight.data = weight


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_threads_and_chunks_do_not_change_a_bit(variant: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = Layer.make("llama", dtype)
    layer.add_lora(dtype)
    lengths, adapters = [3, 40, 290], [1, -1, 0]
    sequences = [random(n, 48, dtype=dtype) for n in lengths]
    with threads(2):
        batch = layer.whole(sequences, adapters)
    for x, together, adapter in zip(sequences, batch, adapters, strict=True):
        with threads(1):
            assert torch.equal(layer.whole([x], [adapter])[0], together)
        caches, table = layer.paging([len(x)], dtype)
        done = 0
        for count in (1, 2, 30, 7, 1, 1, 230, 1, 1, 16):
            count = min(count, len(x) - done)
            done += count
            rows = slice(done - count, done)
            chosen = torch.full((count,), adapter, dtype=torch.int32)
            with threads(1 + count % 2):
                out = decoder_layers(**layer.arguments(x[rows], [count], [done], caches, table, chosen))
            assert torch.equal(out, together[rows])


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["llama with biases and exact gelu", "qwen3"])
def test_layers_of_one_call_equal_one_call_each(variant: str, family: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = [Layer.make(family, dtype) for _ in range(5)]
    for layer, rank in zip(layers, (4, 4, 2, 6, 4), strict=True):
        layer.add_lora(dtype, rank=rank)
    lengths = [1, 40, 3]
    hidden = torch.cat([random(n, 48, dtype=dtype) for n in lengths])
    adapter = torch.tensor([1, -1, 0], dtype=torch.int32).repeat_interleave(torch.tensor(lengths))
    for count in (1, 2, 5):
        one_by_one, calls = hidden, []
        for layer in layers:
            caches, table = layer.paging(lengths, dtype)
            calls.append(
                layer.arguments(
                    one_by_one, lengths, lengths, caches, calls[0]["block_table"] if calls else table, adapter
                )
            )
            with threads(count):
                one_by_one = decoder_layers(**calls[-1])
        together = in_one_call(calls)
        written = [(call["k_cache"][0].clone(), call["v_cache"][0].clone()) for call in calls]
        for cache in (*together["k_cache"], *together["v_cache"]):
            cache.fill_(float("nan"))
        with threads(count):
            assert torch.equal(decoder_layers(**together), one_by_one)
        for (k, v), call in zip(written, calls, strict=True):
            assert torch.equal(call["k_cache"][0].nan_to_num(7.0), k.nan_to_num(7.0))
            assert torch.equal(call["v_cache"][0].nan_to_num(7.0), v.nan_to_num(7.0))


@needs_library
def test_says_what_does_not_fit() -> None:
    layer = Layer.make("llama")
    caches, table = layer.paging([4], torch.float32)
    good = layer.arguments(random(4, 48), [4], [4], caches, table)
    for change, message in (
        ({"down": good["o"] * 2}, "down has 2 tensors, it must have 1"),
        ({"k_cache": []}, "k_cache has 0 tensors, it must have 1"),
        ({"q_norm": good["norm1"] * 2}, "q_norm has 2 tensors, it must have 0 or 1"),
        ({"down": good["o"]}, r"down is \[2, 96, 32\], it must be \[2, 88, 32\]"),
        ({"norm1": [random(47)]}, r"norm1 is \[47\], it must be \[48\]"),
        ({"activation": 3}, r"activation is 3, it must be 0 \(silu\)"),
        ({"cos": random(3, 16)}, r"cos is \[3, 16\], it must be \[4, 16\]"),
        ({"block_table": table + 9}, r"block_table\[0, 0\] is 9, it must be a block below 1"),
        (
            {"lora": [random(1)], "adapter": torch.zeros(4, dtype=torch.int32)},
            "lora has 1 tensors, it must have 0 or 8",
        ),
        ({"hidden": random(4, 48, dtype=torch.float16)}, "has another dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            decoder_layers(**{**good, **change})


@needs_library
def test_is_a_well_behaved_operator() -> None:
    layer = Layer.make("llama")
    caches, table = layer.paging([4], torch.float32)
    arguments = layer.arguments(random(4, 48), [4], [4], tuple(x.zero_() for x in caches), table)
    order = [a.name for a in torch.ops.ensemble_decode.decoder_layers.default._schema.arguments]
    torch.library.opcheck(torch.ops.ensemble_decode.decoder_layers, tuple(arguments[name] for name in order))


@needs_library
def test_says_what_does_not_fit_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer.make("llama")
    caches, table = layer.paging([4], torch.float32)
    good = layer.arguments(random(4, 48), [4], [4], caches, table)
    monkeypatch.setattr(library, "available", False)
    for change, message in (
        ({"down": good["o"] * 2}, "down has 2 tensors, it must have 1"),
        ({"norm1": []}, "norm1 has 0 tensors, it must have one for each layer"),
        ({"qkv_bias": good["norm1"] * 2}, "qkv_bias has 2 tensors, it must have 0 or 1"),
        ({"scales": good["norm1"]}, "scales has 1 tensors, it must have 0 or 4"),
    ):
        with pytest.raises(RuntimeError, match=message):
            decoder_layers(**{**good, **change})


def test_works_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "available", False)
    layer = Layer.make("qwen3")
    layer.add_lora(torch.float32)
    x = random(20, 48)
    plain, adapted = layer.whole([x, x], [-1, 0])
    assert relative_error(plain, layer.expected(x)) < TOLERANCE[torch.float32]
    assert relative_error(adapted, layer.expected(x)) > 1e-2
