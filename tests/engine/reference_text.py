"""Steered text the slow way: one prompt at a time, no cache, plain transformers in fp32. The definition for the engine."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ensemble_decode import SamplingParams
from ensemble_decode.ops import reference


@cache
def load(path: str, adapter: str | None = None) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model if adapter is None else PeftModel.from_pretrained(copy.deepcopy(model), adapter).eval()


@dataclass(frozen=True)
class Side:
    """One side of a pair: a model, its adapter, and a prompt of its own (None: the request's)."""

    path: str
    adapter: str | None = None
    prompt: tuple[int, ...] | None = None


@torch.inference_mode()
def next_logits(side: Side, prompt: list[int], output: list[int]) -> torch.Tensor:
    tokens = (list(prompt) if side.prompt is None else list(side.prompt)) + output
    return load(side.path, side.adapter)(torch.tensor([tokens])).logits[:, -1].float()


def generate(
    target: Side,
    pairs: list[tuple[Side, Side]],
    alphas: list[float],
    prompt: list[int],
    params: SamplingParams,
    eos: int | None = 2,
) -> list[int]:
    """Token ids of one sample."""
    output: list[int] = []
    while len(output) < params.max_tokens:
        z = next_logits(target, prompt, output)
        expert = anti = alpha = None
        if pairs:
            expert = torch.stack([next_logits(plus, prompt, output) for plus, _ in pairs])[..., : z.shape[-1]]
            anti = torch.stack([next_logits(minus, prompt, output) for _, minus in pairs])[..., : z.shape[-1]]
            alpha = torch.tensor([alphas])
        token, _, _ = reference.ensemble_sample(
            z,
            expert,
            anti,
            alpha=alpha,
            temperature=torch.tensor([params.temperature]),
            top_k=torch.tensor([params.top_k]),
            top_p=torch.tensor([params.top_p]),
            min_p=torch.tensor([params.min_p]),
            seed=torch.tensor([params.seed or 0]),
            position=torch.tensor([len(prompt) + len(output)]),
            nucleus=params.nucleus,
        )
        output.append(int(token))
        if output[-1] == eos and not params.ignore_eos:
            break
    return output
