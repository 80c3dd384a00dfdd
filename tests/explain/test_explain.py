"""``LLM.explain``: what it says is what the models say, computed another way."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ensemble_decode import LLM, ExpertPair, SamplingParams
from tests.conftest import VOCAB, Models
from tests.models.test_loading import with_tokenizer

PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def llm(models: Models) -> LLM:
    pairs = {
        "a": ExpertPair(models.adapter("llama", 1), models.adapter("llama", 2)),
        "b": ExpertPair(models.model("llama", 3), models.model("llama", 4)),
    }
    return LLM(models.model("llama"), pairs, dtype="float32", max_num_seqs=4, max_num_batched_tokens=16)


def params(**changes: object) -> SamplingParams:
    given = {"alpha": {"a": 1.0, "b": 0.3}, "max_tokens": 8, "seed": 1, "ignore_eos": True}
    return SamplingParams(**{**given, **changes})  # type: ignore[arg-type]


def test_probabilities_are_those_of_the_engine(llm: LLM) -> None:
    """Same tokens as generate, and the log-probabilities that it reports, at a temperature."""
    asked = params(temperature=0.7, top_p=0.8, logprobs=0)
    sample = llm.generate([PROMPT], asked, use_tqdm=False)[0].outputs[0]
    found = llm.explain(PROMPT, asked)
    assert [step.chosen.token_id for step in found.steps] == sample.token_ids
    assert sample.logprobs is not None
    for step, entry in zip(found.steps, sample.logprobs, strict=True):
        known = entry[step.chosen.token_id]
        assert math.log(step.chosen.prob) == pytest.approx(known.logprob, abs=1e-4)
        assert math.log(step.chosen.target_prob) == pytest.approx(known.target_logprob, abs=1e-4)
        assert step.chosen.rank == known.rank
        assert step.chosen.kept


def test_against_transformers(llm: LLM, models: Models) -> None:
    """Target's probability and both divergences from the untouched models, a full pair at α = 0.4."""
    found = llm.explain(PROMPT, params(alpha={"b": 0.4}))
    tokens = torch.tensor([PROMPT + [step.chosen.token_id for step in found.steps]])
    with torch.inference_mode():
        z, plus, minus = (
            AutoModelForCausalLM.from_pretrained(models.model("llama", seed))(tokens).logits[0, len(PROMPT) - 1 : -1]
            for seed in (0, 3, 4)
        )
    q, p = z.softmax(-1).double(), (z + 0.4 * (plus - minus)).softmax(-1).double()
    for i, step in enumerate(found.steps):
        token = step.chosen.token_id
        assert step.chosen.target_prob == pytest.approx(float(q[i, token]), rel=1e-3)
        assert step.hellinger == pytest.approx(float((p[i].sqrt() - q[i].sqrt()).norm() / 2**0.5), abs=1e-4)
        assert step.kl == pytest.approx(float((p[i] * (p[i] / q[i]).log()).sum()), abs=1e-4)
        change = torch.logit(p[i, token]) - torch.logit(q[i, token])
        assert step.chosen.log_odds == pytest.approx(float(change), abs=1e-3)


def test_contributions_sum_to_the_change(llm: LLM) -> None:
    asked = params(repetition_penalty=1.5, frequency_penalty=0.5, logit_bias={11: 4.0}, min_tokens=3, ignore_eos=False)
    found = llm.explain(PROMPT, asked)
    for step in found.steps:
        for effect in (step.chosen, *step.raised, *step.lowered):
            assert set(effect.contributions) == {"a", "b", "edits"}
            assert sum(effect.contributions.values()) == pytest.approx(effect.log_odds, abs=1e-3)
    assert any(abs(step.chosen.contributions["edits"]) > 0.01 for step in found.steps)
    assert [total.name for total in found.totals] == ["a", "b", "edits"]


def test_alpha_0_moves_nothing(llm: LLM) -> None:
    found = llm.explain(PROMPT, params(alpha=0.0))
    assert found.alphas == {}
    for step in found.steps:
        assert (step.hellinger, step.kl, step.chosen.log_odds) == (0.0, 0.0, 0.0)
        assert step.raised == step.lowered == []
    assert "no pair is on" in str(found)


def test_target_nucleus(llm: LLM) -> None:
    for step in llm.explain(PROMPT, params(nucleus="target", top_k=3)).steps:
        assert step.chosen.target_kept
        assert step.chosen.target_rank <= 3
        assert step.num_kept == step.num_target_kept == 3


def test_blocks_come_back_and_long_prompts_are_chunked(llm: LLM) -> None:
    free = llm.engine.blocks.num_free
    long = [3 + i % 150 for i in range(70)]
    found = llm.explain(long, params(max_tokens=40))
    sample = llm.generate([long], params(max_tokens=40, logprobs=0), use_tqdm=False)[0].outputs[0]
    assert sample.logprobs is not None
    last = sample.logprobs[-1][sample.token_ids[-1]]
    assert math.log(found.steps[-1].chosen.prob) == pytest.approx(last.logprob, abs=1e-4)
    assert llm.engine.blocks.num_free == free


def test_pairs_of_prompts(models: Models, tmp_path: Path) -> None:
    model = str(with_tokenizer(models.model("llama"), tmp_path / "m", VOCAB))
    llm = LLM(model, {"guide": ExpertPair.from_prompts(anti_expert="w9")}, dtype="float32", max_num_seqs=2)
    asked = params(alpha=1.5, logprobs=0)
    sample = llm.generate(["w5 w6 w7"], asked, use_tqdm=False)[0].outputs[0]
    found = llm.explain("w5 w6 w7", asked)
    assert sample.logprobs is not None
    for step, entry in zip(found.steps, sample.logprobs, strict=True):
        assert math.log(step.chosen.prob) == pytest.approx(entry[step.chosen.token_id].logprob, abs=1e-4)
    assert "".join(step.chosen.text for step in found.steps).split() == sample.text.split()


@pytest.mark.parametrize(("changes", "top", "word"), [({"n": 2}, 5, "n is 2"), ({}, -1, "top is -1")])
def test_errors(llm: LLM, changes: dict, top: int, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        llm.explain(PROMPT, params(**changes), top=top)


def test_exports(llm: LLM) -> None:
    found = llm.explain(PROMPT, params())
    body = json.loads(found.to_json())
    assert body["steps"][0]["chosen"]["token_id"] == found.steps[0].chosen.token_id
    table = found.to_pandas()
    chosen = table[table.role == "chosen"]
    assert len(chosen) == len(found.steps)
    assert chosen["log_odds[a]"].sum() == pytest.approx(found.totals[0].log_odds)
    assert "\x1b[" not in found.to_terminal()
    assert "\x1b[" in found.to_terminal(color=True)
