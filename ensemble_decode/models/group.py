"""A group: one set of weights, its adapters and KV pools, and one forward for all its rows."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ensemble_decode import ops
from ensemble_decode.models.attention import Forward, running
from ensemble_decode.models.fast import PackedLinear, make_fast, rounded_weights
from ensemble_decode.models.loading import Quantization, load_model, load_tokenizer
from ensemble_decode.models.lora import Adapter, load_adapter, put_adapters
from ensemble_decode.ops.paged_attention import BLOCK_SIZE

#: Largest difference between the fast and the original logits at load, root mean square relative to the logits' spread, of
#: models with so many layers at most.
_CHECK_TOLERANCE, _CHECK_LAYERS = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}, 32
_CHECK_TOKENS = 21


@dataclass(slots=True)
class Rows:
    """What one forward computes: T tokens of S (sequence, pool) pairs laid one after another.

    Attributes
    ----------
    tokens, positions : int64 [T]
    adapter : int32 [T] or None
    query_start : int32 [S + 1]
    context_len : int32 [S]
    block_table : int32 [S, max_blocks]
        Rows of this group's cache: pool · blocks of a pool + block.
    outputs : int64 [R] or None
        Rows whose hidden states are wanted; None: all, in order.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    adapter: torch.Tensor | None
    query_start: torch.Tensor
    context_len: torch.Tensor
    block_table: torch.Tensor
    outputs: torch.Tensor | None


class Group:
    """One loaded model on one device, made fast in place.

    Parameters
    ----------
    path : str
        Hub id or folder.
    dtype : torch.dtype
    adapters : list of str
        LoRA folders; adapter i serves pool ``i + 1`` of the group where ``bare`` is true, pool i otherwise.
    bare : bool
        Whether a member uses the weights without an adapter.
    max_model_len : int, optional
        Longest sequence that will be served (a sliding window must not be shorter).
    device : torch.device
        Where weights, adapters and caches lie, and where :meth:`forward` takes its rows.
    quantization : {"int8"}, optional
        Keep the weights of all linears, the head's too, as int8; embeddings, norms and adapters stay in ``dtype``.
    """

    def __init__(
        self,
        path: str,
        dtype: torch.dtype,
        adapters: list[str] | None = None,
        bare: bool = True,
        max_model_len: int | None = None,
        fuse_layers: bool = True,
        device: torch.device | str = "cpu",
        quantization: Quantization | None = None,
    ) -> None:
        self.path = path
        self.dtype = dtype
        self.device = torch.device(device)
        model = load_model(path, dtype, max_model_len, self.device)
        self.config = model.config.get_text_config()
        self.tokenizer = load_tokenizer(path)
        self.generation_config = model.generation_config
        loaded: list[Adapter] = [load_adapter(folder) for folder in adapters or []]
        #: Adapter index of each pool; −1 is the bare model.
        self.pool_adapters: list[int] = ([-1] if bare else []) + list(range(len(loaded)))
        self.num_layers: int = self.config.num_hidden_layers
        heads = self.config.num_attention_heads
        self.num_kv_heads: int = getattr(self.config, "num_key_value_heads", None) or heads
        self.head_dim: int = getattr(self.config, "head_dim", None) or self.config.hidden_size // heads
        self.max_positions: int = getattr(self.config, "max_position_embeddings", None) or 1 << 20
        self.k_cache: list[torch.Tensor] = []
        self.v_cache: list[torch.Tensor] = []
        self.blocks_per_pool = 0

        tokens = torch.arange(1, 1 + _CHECK_TOKENS, device=self.device) * 7919 % (self.config.vocab_size - 1)
        decoder: nn.Module = model.get_decoder()
        head = model.get_output_embeddings()
        if head is None:
            raise ValueError(f"model {path!r}: no output head")
        # int8 weights are held against a model that has the weights they stand for: what differs then is an error.
        with rounded_weights(decoder, head) if quantization else nullcontext():
            expected = _original_logits(model, tokens)
        root = next(name for name, module in model.named_modules() if module is decoder)
        self.decoder = make_fast(decoder, root, fuse_layers, quantization)
        bias = getattr(head, "bias", None)
        self.vocab_size: int = head.weight.shape[0]
        self.head = PackedLinear([head.weight], [bias], ["lm_head"], quantization=quantization)
        self._check(tokens, expected)
        put_adapters(self.decoder, loaded)

    # ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────
    @property
    def bytes_per_block(self) -> int:
        """KV bytes of one block over all layers and all pools of the group."""
        per_layer = 2 * self.num_kv_heads * BLOCK_SIZE * self.head_dim * self.dtype.itemsize
        return per_layer * self.num_layers * len(self.pool_adapters)

    def allocate(self, num_blocks: int) -> None:
        """Make room for ``num_blocks`` blocks in every pool of the group."""
        self.blocks_per_pool = num_blocks
        size = num_blocks * len(self.pool_adapters)
        caches = [
            ops.new_caches(size, self.num_kv_heads, self.head_dim, self.dtype, self.device)
            for _ in range(self.num_layers)
        ]
        self.k_cache, self.v_cache = ([cache[side] for cache in caches] for side in (0, 1))

    def copy_blocks(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        """Copy blocks (int64 indices within a pool) in every layer and pool."""
        source, destination = (x.to(self.device, non_blocking=True) for x in (source, destination))
        offsets = torch.arange(len(self.pool_adapters), device=self.device).unsqueeze(1) * self.blocks_per_pool
        source, destination = (source + offsets).flatten(), (destination + offsets).flatten()
        for cache in (*self.k_cache, *self.v_cache):
            cache[destination] = cache[source]

    # ── compute ─────────────────────────────────────────────────────────────────────────────────────────────────────
    @torch.inference_mode()
    def forward(self, rows: Rows) -> torch.Tensor:
        """Hidden states [R, E] before the head, at ``rows.outputs``."""
        forward = Forward(
            rows.query_start, rows.context_len, rows.block_table, self.k_cache, self.v_cache, rows.adapter
        )
        with running(forward):
            hidden = self.decoder(rows.tokens, rows.positions)
        return hidden if rows.outputs is None else hidden[rows.outputs]

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits, float32 [R, V], of hidden states [R, E]."""
        head = self.head
        return ops.linear(hidden, head.packed, head.bias, self.vocab_size, out_fp32=True, scale=head.scale)

    def _check(self, tokens: torch.Tensor, expected: torch.Tensor) -> None:
        """Hold the fast model against the original: two chunks through the paged cache, all logits compared."""
        length, cut = len(tokens), _CHECK_TOKENS * 2 // 3
        pools, self.pool_adapters = self.pool_adapters, [-1]
        self.allocate(-(-length // BLOCK_SIZE))
        table = torch.arange(self.blocks_per_pool, dtype=torch.int32, device=self.device)[None]
        parts = []
        for start, stop in ((0, cut), (cut, length)):
            rows = Rows(
                tokens[start:stop],
                torch.arange(start, stop, device=self.device),
                None,
                torch.tensor([0, stop - start], dtype=torch.int32, device=self.device),
                torch.tensor([stop], dtype=torch.int32, device=self.device),
                table,
                None,
            )
            parts.append(self.logits(self.forward(rows)))
        self.pool_adapters = pools
        self.k_cache, self.v_cache, self.blocks_per_pool = [], [], 0
        error = (torch.cat(parts) - expected).square().mean().sqrt() / expected.std()
        # Rounding differs in every layer, and such differences add up like random steps.
        allowed = _CHECK_TOLERANCE[self.dtype] * max(1.0, self.num_layers / _CHECK_LAYERS) ** 0.5
        if not error <= allowed:
            raise ValueError(
                f"model {self.path!r}: {self.config.model_type}'s logits through the fast path differ from transformers' by "
                f"{error:.1%} of their spread, allowed is {allowed:.1%}: this architecture can't be served"
            )


@torch.inference_mode()
def _original_logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    logits = model(input_ids=tokens[None], use_cache=False).logits[0].float()
    model.set_attn_implementation(implementation)
    return logits
