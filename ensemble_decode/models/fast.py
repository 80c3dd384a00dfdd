"""transformers' models made fast: packed and merged linears, fused norms, all decoder layers as one.

The modelling code stays transformers' own; what is replaced are leaves (``nn.Linear``, RMS norms) for every family, and the
decoder as a whole for the families that share Llama's layers (one operator for all of them: nothing of Python between
their parts). Whatever is replaced is compared with the original at load (see ``loading`` and ``group``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ensemble_decode import ops
from ensemble_decode.models.attention import current_forward
from ensemble_decode.models.loading import Quantization

#: Decoder layers with exactly Llama's forward, up to biases, q/k norms, the norm's offset and the activation.
FUSED_LAYERS = (
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen3DecoderLayer",
    "GemmaDecoderLayer",
)
#: Linears that read one input and stand side by side in a module, merged into one product.
MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_ACTIVATIONS = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1, "gelu_new": 1, "gelu": 2}


class PackedLinear(nn.Module):
    """One linear, or several with one input, over packed weights; LoRA rows are added by adapter.

    Parameters
    ----------
    weights : list of tensor [N_i, K]
    biases : list of tensor [N_i] or None
    names : list of str
        The module paths these weights had, by which adapters find them.
    pack : callable
        How rows are arranged.
    quantization : {"int8"}, optional
        Keep the weights as int8 with a scale for each output.
    """

    packed: torch.Tensor
    scale: torch.Tensor | None
    bias: torch.Tensor | None
    lora_a: torch.Tensor | None
    lora_b: torch.Tensor | None

    def __init__(
        self,
        weights: list[torch.Tensor],
        biases: list[torch.Tensor | None],
        names: list[str],
        pack: Callable[[torch.Tensor], torch.Tensor] = ops.pack_weight,
        quantization: Quantization | None = None,
    ) -> None:
        super().__init__()
        self.names = names
        self.segments = [w.shape[0] for w in weights]
        self.in_features = weights[0].shape[1]
        self.out_features = sum(self.segments)
        self.dtype = weights[0].dtype
        # A lone weight is not copied on a GPU: a head that is tied to the embedding stays one tensor.
        weight = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        packed, scale = ops.pack_int8(weight, pack) if quantization == "int8" else (pack(weight), None)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        bias = None
        if any(b is not None for b in biases):
            rows = [weights[0].new_zeros(n) if b is None else b for b, n in zip(biases, self.segments, strict=True)]
            bias = torch.cat(rows)
        self.register_buffer("bias", bias, persistent=False)
        self.register_buffer("lora_a", None, persistent=False)
        self.register_buffer("lora_b", None, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = ops.linear(x, self.packed, self.bias, self.out_features, scale=self.scale)
        if self.lora_a is not None and self.lora_b is not None:
            adapter = current_forward().adapter
            if adapter is not None:
                ops.lora_(
                    y.view(-1, self.out_features),
                    x.reshape(-1, self.in_features),
                    self.lora_a,
                    self.lora_b,
                    adapter,
                    self.segments,
                )
        return y


class _FirstOfMerged(nn.Module):
    """Stands where ``q_proj`` was: computes all the merged outputs, returns its own, keeps the others for its siblings."""

    def __init__(self, merged: PackedLinear) -> None:
        super().__init__()
        self.merged = merged
        self.rest: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, *self.rest = self.merged(x).split(self.merged.segments, dim=-1)
        return first


class _NextOfMerged(nn.Module):
    """Stands where ``k_proj`` and ``v_proj`` were: hands out, in the order of calls, what the first computed."""

    def __init__(self, first: _FirstOfMerged) -> None:
        super().__init__()
        self._first = [first]  # in a list, so that it is not a submodule twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._first[0].rest.pop(0)


class RMSNorm(nn.Module):
    """x / rms(x) · (offset + weight), in one operator."""

    weight: torch.Tensor

    def __init__(self, weight: torch.Tensor, eps: float, offset: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.eps = eps
        self.offset = offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(x, self.weight, self.eps, self.offset)


_Tensors = list[torch.Tensor]
_Weights = tuple[
    _Tensors, _Tensors, _Tensors, _Tensors, _Tensors, _Tensors, _Tensors, _Tensors, _Tensors, _Tensors
]  # those of ``ops.decoder_layers``, in its order


class FusedLayers(nn.Module):
    """All the Llama-shaped decoder layers of a model as one operator."""

    def __init__(self, layers: nn.ModuleList, path: str, quantization: Quantization | None = None) -> None:
        super().__init__()
        every = list[Any](layers)
        first = every[0]
        attention = first.self_attn
        head_dim = attention.head_dim
        norms = [(_rms_norm(layer.input_layernorm), _rms_norm(layer.post_attention_layernorm)) for layer in every]
        self._numbers = (
            attention.q_proj.weight.shape[0] // head_dim,
            attention.k_proj.weight.shape[0] // head_dim,
            head_dim,
            first.mlp.gate_proj.weight.shape[0],
            norms[0][0].eps,
            norms[0][0].offset,
            attention.scaling,
            _ACTIVATIONS[_activation_name(first.mlp)],
        )
        q_norm, k_norm = (
            [_rms_norm(getattr(layer.self_attn, name)).weight for layer in every] if hasattr(attention, name) else []
            for name in ("q_norm", "k_norm")
        )
        linears: list[PackedLinear] = []
        for index, layer in enumerate(every):
            attention, mlp = layer.self_attn, layer.mlp
            at_attention, at_mlp = f"{path}.{index}.self_attn", f"{path}.{index}.mlp"
            linears += [
                _pack(attention, at_attention, MERGED[0], quantization),
                _pack(attention, at_attention, ("o_proj",), quantization),
                _pack(mlp, at_mlp, MERGED[1], quantization, ops.pack_gate_up),
                _pack(mlp, at_mlp, ("down_proj",), quantization),
            ]
        #: qkv, o, gate_up and down of each layer.
        self.linears = nn.ModuleList(linears)
        qkv, o, gate_up, down = (linears[part::4] for part in range(4))
        # Laid ready, so that a step looks up none of them through ``nn.Module``.
        self._weights: _Weights = (
            [norm.weight for norm, _ in norms],
            [norm.weight for _, norm in norms],
            [linear.packed for linear in qkv],
            [linear.bias for linear in qkv if linear.bias is not None],
            [linear.packed for linear in o],
            [linear.bias for linear in o if linear.bias is not None],
            [linear.packed for linear in gate_up],
            [linear.packed for linear in down],
            q_norm,
            k_norm,
        )
        self._scales = [linear.scale for linear in linears if linear.scale is not None]
        self._lora: list[torch.Tensor] = []

    def collect_lora(self) -> None:
        """Take up the adapters that were put into the linears; zeros where they leave one alone, of whichever layer."""
        linears = list[Any](self.linears)
        if all(linear.lora_a is None for linear in linears):
            return
        count = next(linear.lora_a for linear in linears if linear.lora_a is not None).shape[0]
        self._lora = []
        for linear in linears:
            if linear.lora_a is None:
                a = linear.packed.new_zeros(count, len(linear.segments), linear.in_features, dtype=linear.dtype)
                b = linear.packed.new_zeros(count, linear.out_features, 1, dtype=linear.dtype)
                linear.lora_a, linear.lora_b = ops.pack_lora(a, b)
            self._lora += [linear.lora_a, linear.lora_b]

    def forward(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """[T, E] → [T, E]; cos and sin [T, R] of the tokens' positions."""
        forward = current_forward()
        return ops.decoder_layers(
            hidden,
            cos,
            sin,
            *self._weights,
            self._lora if forward.adapter is not None else [],
            forward.adapter,
            forward.k_cache,
            forward.v_cache,
            forward.query_start,
            forward.context_len,
            forward.block_table,
            *self._numbers,
            self._scales,
        )


class FusedDecoder(nn.Module):
    """A decoder with Llama's forward: embedding, the positions' angles, all layers as one operator, norm.

    What transformers' own forward does besides (masks, caches, defaults) has no use here, and its wrappers take 0.2 ms a step.
    """

    def __init__(self, decoder: Any, path: str, quantization: Quantization | None) -> None:
        super().__init__()
        self.embed_tokens = decoder.embed_tokens
        self.rotary_emb = decoder.rotary_emb
        self.layers = FusedLayers(decoder.layers, f"{path}.layers", quantization)
        self.norm = _rms_norm(decoder.norm)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, E] of tokens at positions, both int64 [T]."""
        hidden = self.embed_tokens(tokens)
        cos, sin = self.rotary_emb(hidden, positions[None])
        return self.norm(self.layers(hidden, cos[0], sin[0]))


class Decoder(nn.Module):
    """Any other decoder, its leaves made fast, called as :class:`FusedDecoder` is."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, E] of tokens at positions, both int64 [T]."""
        out = self.decoder(input_ids=tokens[None], position_ids=positions[None], use_cache=False)
        return out.last_hidden_state[0]


def _can_be_fused(layer: Any) -> bool:
    return (
        type(layer).__name__ in FUSED_LAYERS
        and _activation_name(layer.mlp) in _ACTIVATIONS
        and layer.mlp.gate_proj.bias is None
    )


def _activation_name(mlp: Any) -> str:
    config = mlp.config
    return getattr(config, "hidden_act", None) or config.hidden_activation


def _weight_and_bias(linear: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    if isinstance(linear, Conv1D):
        return linear.weight.t(), linear.bias
    return linear.weight, linear.bias


def _pack(
    parent: nn.Module,
    path: str,
    names: tuple[str, ...],
    quantization: Quantization | None,
    pack: Callable[[torch.Tensor], torch.Tensor] = ops.pack_weight,
) -> PackedLinear:
    """Pack ``parent``'s linears ``names`` into one and let the originals' weights go."""
    linears = [getattr(parent, name) for name in names]
    weights, biases = zip(*(_weight_and_bias(x) for x in linears), strict=True)
    packed = PackedLinear(list(weights), list(biases), [f"{path}.{name}" for name in names], pack, quantization)
    for name in names:
        setattr(parent, name, None)
    return packed


def _is_linear(module: nn.Module | None) -> bool:
    return type(module) in (nn.Linear, Conv1D)


def _is_rms_norm(module: nn.Module) -> bool:
    kind = type(module).__name__
    # Families differ in the details: only those whose forward was read are replaced.
    return kind in (
        "LlamaRMSNorm",
        "MistralRMSNorm",
        "Qwen2RMSNorm",
        "Qwen3RMSNorm",
        "GemmaRMSNorm",
        "Phi3RMSNorm",
        "GraniteRMSNorm",
        "SmolLM3RMSNorm",
    )


def _rms_norm(norm: Any) -> RMSNorm:
    eps = getattr(norm, "variance_epsilon", None)
    return RMSNorm(
        norm.weight.detach(), norm.eps if eps is None else eps, 1.0 if type(norm).__name__ == "GemmaRMSNorm" else 0.0
    )


def make_fast(
    decoder: nn.Module, root: str, fuse_layers: bool = True, quantization: Quantization | None = None
) -> FusedDecoder | Decoder:
    """``decoder``, whose module path in the full model is ``root``, with what can be made fast made so; it is used up."""
    layers = getattr(decoder, "layers", None)
    if fuse_layers and layers is not None and len(layers) > 0 and all(_can_be_fused(layer) for layer in layers):
        return FusedDecoder(decoder, root, quantization)
    _make_leaves_fast(decoder, root, quantization)
    return Decoder(decoder)


@contextmanager
def rounded_weights(decoder: nn.Module, head: Any) -> Iterator[None]:
    """Inside, the linears that :func:`make_fast` would keep as int8 have the weights that int8 stands for."""
    linears: list[Any] = [*(module for module in decoder.modules() if _is_linear(module)), head]
    originals = [linear.weight for linear in linears]
    try:
        for linear, original in zip(linears, originals, strict=True):
            rows, _ = _weight_and_bias(linear)
            rounded = ops.dequantize(*ops.quantize_int8(rows)).to(original.dtype)
            rounded = rounded.t() if isinstance(linear, Conv1D) else rounded
            linear.weight = nn.Parameter(rounded, requires_grad=False)
        yield
    finally:
        for linear, original in zip(linears, originals, strict=True):
            linear.weight = original


def _make_leaves_fast(module: nn.Module, path: str, quantization: Quantization | None) -> None:
    if isinstance(module, PackedLinear):
        return
    for names in MERGED:
        if all(_is_linear(getattr(module, name, None)) for name in names):
            first = _FirstOfMerged(_pack(module, path, names, quantization))
            setattr(module, names[0], first)
            for name in names[1:]:
                setattr(module, name, _NextOfMerged(first))
    for name, child in list(module.named_children()):
        if _is_linear(child):
            setattr(module, name, _pack(module, path, (name,), quantization))
        elif _is_rms_norm(child):
            setattr(module, name, _rms_norm(child))
        else:
            _make_leaves_fast(child, f"{path}.{name}" if path else name, quantization)


def packed_linears(decoder: nn.Module) -> Iterator[PackedLinear]:
    """Every packed linear below ``decoder``, once."""
    for module in decoder.modules():
        if isinstance(module, PackedLinear):
            yield module
