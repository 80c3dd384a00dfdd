"""What people run today, as well as one would write it by hand: transformers' ``generate``, alone and with a processor."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

Generate = Callable[[list[list[int]], int], None]


class CachedPair(LogitsProcessor):
    """z + α(z⁺ − z⁻) as a processor, the honest way: each expert has a cache of its own, masked and with positions."""

    def __init__(self, expert: torch.nn.Module, anti_expert: torch.nn.Module, alpha: float, mask: torch.Tensor) -> None:
        self.sides = [expert, anti_expert]
        self.caches: list = [None, None]
        self.alpha = alpha
        self.mask = mask

    @torch.inference_mode()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.caches[0] is None:
            tokens: torch.Tensor = input_ids
            positions = (self.mask.cumsum(1) - 1).clamp_min(0)
        else:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
            tokens, positions = input_ids[:, -1:], self.mask.sum(1, keepdim=True) - 1
        logits = []
        for index, side in enumerate(self.sides):
            out = side(
                input_ids=tokens,
                attention_mask=self.mask,
                position_ids=positions,
                past_key_values=self.caches[index],
                use_cache=True,
                logits_to_keep=1,
            )
            self.caches[index] = out.past_key_values
            logits.append(out.logits[:, -1].float())
        return scores + self.alpha * (logits[0] - logits[1])  # type: ignore[return-value]


def load(path: str, dtype: str, adapter: str | None = None) -> torch.nn.Module:
    """A transformers model; an adapter is merged into the weights, the fastest way to run it there."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model.eval()


def transformers_alone(model: torch.nn.Module) -> Generate:
    """``generate`` on the target alone."""
    return lambda prompts, new: _generate(model, prompts, new, None)


def transformers_assisted(model: torch.nn.Module, assistant: torch.nn.Module) -> Generate:
    """``generate`` with a smaller model that drafts; transformers allows one prompt at a time."""
    return lambda prompts, new: _generate(model, prompts, new, None, assistant)


def transformers_cached_pair(
    model: torch.nn.Module, expert: torch.nn.Module, anti_expert: torch.nn.Module, alpha: float
) -> Generate:
    """``generate`` with :class:`CachedPair`."""

    def run(prompts: list[list[int]], new: int) -> None:
        mask = torch.ones(len(prompts), len(prompts[0]), dtype=torch.int64)
        _generate(model, prompts, new, LogitsProcessorList([CachedPair(expert, anti_expert, alpha, mask)]))

    return run


@torch.inference_mode()
def _generate(
    model: torch.nn.Module,
    prompts: list[list[int]],
    new: int,
    processors: LogitsProcessorList | None,
    assistant: torch.nn.Module | None = None,
) -> None:
    ids = torch.tensor(prompts)
    out = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=True,
        temperature=1.0,
        top_p=0.9,
        top_k=0,
        pad_token_id=0,
        logits_processor=processors,
        assistant_model=assistant,
    )
    if out.shape != (len(prompts), len(prompts[0]) + new):
        raise RuntimeError(f"generate returned {tuple(out.shape)}, expected {new} new tokens a row")


def seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
