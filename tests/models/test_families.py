"""Logits through the paged cache, in odd chunks, against plain transformers, for every family."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from ensemble_decode import LLM
from tests.conftest import FAMILIES, VOCAB, Models


def plain_logprobs(path: str, tokens: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[0].float()
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:]).unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("name", FAMILIES)
def test_logprobs_equal_transformers(name: str, models: Models) -> None:
    path = models.model(name)
    llm = LLM(path, dtype="float32", max_num_batched_tokens=7)
    torch.manual_seed(3)
    texts = [torch.randint(0, VOCAB, (length,)).tolist() for length in (2, 23, 70)]
    for text, score in zip(texts, llm.score(texts), strict=True):
        assert score.logprobs[0] is None
        expected = plain_logprobs(path, text)
        torch.testing.assert_close(torch.tensor(score.logprobs[1:]), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_half_precision_is_close(name: str, dtype: str, models: Models) -> None:
    path = models.model(name)
    text = torch.arange(3, 60).tolist()
    score = LLM(path, dtype=dtype).score([text])[0]
    torch.testing.assert_close(torch.tensor(score.logprobs[1:]), plain_logprobs(path, text), rtol=0.05, atol=0.25)


def test_sharded_checkpoint_loads(models: Models, tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(models.model("llama"))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    text = list(range(5, 40))
    whole, sharded = (LLM(p, dtype="float32").score([text])[0] for p in (models.model("llama"), tmp_path / "sharded"))
    assert whole.logprobs == sharded.logprobs
