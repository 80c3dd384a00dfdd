"""Operators: one file each, with its docstring, schema, fake and dispatch; `reference` defines them all."""

from . import reference, reference_layers
from .decoder_layers import decoder_layers, pack_gate_up
from .ensemble_sample import EnsembleSample, combine, ensemble_logprob, ensemble_sample
from .linear import dequantize, linear, pack_int8, pack_weight, quantize_int8
from .lora import lora_, pack_lora
from .paged_attention import new_caches, paged_attention
from .rms_norm import rms_norm
from .threads import num_threads, set_num_threads

__all__ = [
    "EnsembleSample",
    "combine",
    "decoder_layers",
    "dequantize",
    "ensemble_logprob",
    "ensemble_sample",
    "linear",
    "lora_",
    "new_caches",
    "num_threads",
    "pack_gate_up",
    "pack_int8",
    "pack_lora",
    "pack_weight",
    "paged_attention",
    "quantize_int8",
    "reference",
    "reference_layers",
    "rms_norm",
    "set_num_threads",
]
