"""``LLM.next_logprobs``: the distributions that the untouched models have, and that the sampler reports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ensemble_decode import LLM, ExpertPair, SamplingParams
from tests.conftest import VOCAB, Models
from tests.models.test_loading import with_tokenizer

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17, 18], list(range(20, 60)), [5, 6]]


@pytest.fixture(scope="module")
def llm(models: Models) -> LLM:
    pairs = {
        "lora": ExpertPair(models.adapter("llama", 1), models.adapter("llama", 2)),
        "full": ExpertPair(models.model("llama", 3), models.model("llama", 4)),
    }
    return LLM(models.model("llama"), pairs, dtype="float32", max_num_seqs=4, max_num_batched_tokens=16)


def test_against_transformers(llm: LLM, models: Models) -> None:
    """One prompt is longer than a step, one a single token; every row is that of its prompt alone."""
    z, plus, minus = (AutoModelForCausalLM.from_pretrained(models.model("llama", seed)) for seed in (0, 3, 4))
    found = llm.next_logprobs(PROMPTS, alpha={"full": 0.4})
    assert found.shape == (len(PROMPTS), VOCAB)
    with torch.inference_mode():
        for row, prompt in zip(found, PROMPTS, strict=True):
            last = [model(torch.tensor([prompt])).logits[0, -1] for model in (z, plus, minus)]
            expected = (last[0] + 0.4 * (last[1] - last[2])).log_softmax(-1)
            torch.testing.assert_close(row, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.7, {"lora": 1.0}, {"lora": 1.0, "full": -0.3}])
def test_what_the_sampler_reports(llm: LLM, alpha: float | dict[str, float]) -> None:
    outputs = llm.generate(PROMPTS, SamplingParams(alpha=alpha, logprobs=VOCAB, max_tokens=1), use_tqdm=False)
    found = llm.next_logprobs(PROMPTS, alpha)
    for row, output in zip(found, outputs, strict=True):
        (entry,) = output.outputs[0].logprobs or []
        reported = torch.tensor([entry[token].logprob for token in range(VOCAB)])
        torch.testing.assert_close(row, reported, rtol=0, atol=1e-4)


def test_a_pair_of_prompts_has_views_of_its_own(models: Models, tmp_path: Path) -> None:
    folder = str(with_tokenizer(models.model("llama"), tmp_path / "model", 190))
    llm = LLM(folder, {"cfg": ExpertPair.from_prompts(anti_expert="w4 w5")}, dtype="float32", max_num_seqs=2)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        minus = model(torch.tensor([[4, 5]])).logits[0, -1]
        for row, prompt in zip(llm.next_logprobs(PROMPTS[:3], 0.5), PROMPTS[:3], strict=True):
            z = model(torch.tensor([prompt])).logits[0, -1]
            torch.testing.assert_close(row, (z + 0.5 * (z - minus)).log_softmax(-1), rtol=0, atol=1e-4)


def test_blocks_are_given_back(llm: LLM) -> None:
    free = llm.engine.blocks.num_free
    llm.next_logprobs(PROMPTS, 1.0)
    assert llm.engine.blocks.num_free == free
    with pytest.raises(ValueError, match="next_logprobs: prompt 1: "):
        llm.next_logprobs([[5], []])
    with pytest.raises(ValueError, match="alpha names the pair 'x'"):
        llm.next_logprobs([5], {"x": 1.0})
