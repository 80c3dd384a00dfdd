"""``quantization="int8"``: the engine serves, to the token, the model whose weights were rounded."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from ensemble_decode import LLM, ExpertPair, SamplingParams, ops
from tests.conftest import VOCAB, Models


def rounded(path: str, to: Path) -> str:
    """A copy of a model whose linears, the head's too, have the weights that int8 stands for; embeddings stay."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.config.tie_word_embeddings = False
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            rows = module.weight.t() if isinstance(module, Conv1D) else module.weight
            weight = ops.dequantize(*ops.quantize_int8(rows))
            module.weight = nn.Parameter(weight.t().contiguous() if isinstance(module, Conv1D) else weight)
    model.save_pretrained(to)
    return str(to)


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-tied", "gemma", "gpt_neox"])
def test_logprobs_are_those_of_the_rounded_model(name: str, models: Models, tmp_path: Path) -> None:
    text = torch.randint(0, VOCAB, (70,), generator=torch.Generator().manual_seed(0)).tolist()
    path = rounded(models.model(name), tmp_path)
    int8, expected, original = (
        torch.tensor(LLM(model, dtype="float32", **options).score([text])[0].logprobs[1:])
        for model, options in ((models.model(name), {"quantization": "int8"}), (path, {}), (models.model(name), {}))
    )
    torch.testing.assert_close(int8, expected, rtol=0, atol=1e-4)
    assert (int8 - original).abs().max() > 1e-3  # the test can fail


def test_steered_text_is_that_of_the_rounded_models(models: Models, tmp_path: Path) -> None:
    """Target, a full expert and adapters over the int8 target; embeddings tied to the target's head."""
    target, expert = models.model("llama-tied"), models.model("llama-tied", 1)
    params = SamplingParams(alpha={"full": 0.6, "lora": -0.5}, temperature=0.9, max_tokens=16, seed=3)
    prompts = [list(range(3, 3 + n)) for n in (1, 9, 30)]

    def texts(target: str, expert: str, **options: str) -> list[list[int]]:
        lora = ExpertPair(models.adapter("llama-tied", 1), models.adapter("llama-tied", 2))
        llm = LLM(target, {"full": ExpertPair(expert), "lora": lora}, dtype="float32", **options)
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]

    expected = texts(rounded(target, tmp_path / "target"), rounded(expert, tmp_path / "expert"))
    assert texts(target, expert, quantization="int8") == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_company_changes_nothing(dtype: str, models: Models) -> None:
    pair = ExpertPair(models.adapter("llama", 1), models.adapter("llama", 2))
    llm = LLM(models.model("llama"), {"a": pair}, dtype=dtype, quantization="int8", enable_prefix_caching=False)
    params = SamplingParams(alpha=0.8, max_tokens=12, seed=5, logprobs=2)
    prompts = [list(range(3, 3 + n)) for n in (2, 17, 40, 5, 33, 8, 21)]
    together = llm.generate(prompts, params, use_tqdm=False)
    for prompt, batch in zip(prompts, together, strict=True):
        (alone,) = llm.generate(prompt, params, use_tqdm=False)
        assert alone.outputs[0].token_ids == batch.outputs[0].token_ids
        assert alone.outputs[0].logprobs == batch.outputs[0].logprobs


def test_a_wrong_scale_is_found_at_load(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.pack_int8

    def wrong(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
        packed, scale = right(*args)
        return packed, scale * 1.01

    monkeypatch.setattr(ops, "pack_int8", wrong)
    with pytest.raises(ValueError, match="logits through the fast path differ from transformers'"):
        LLM(models.model("llama"), dtype="float32", quantization="int8")


def test_unknown_kinds_are_refused(models: Models) -> None:
    with pytest.raises(ValueError, match=r"quantization is 'int4', allowed are None, 'int8'"):
        LLM(models.model("llama"), quantization="int4")
