"""Where peers fail: four prompts of unequal length in one batch, on GPT-2, against each prompt alone. Must be 4 of 4.

What was seen of each system by running it stands beside its name; that the text is also right, and not only the same, is
held by test_correctness.py and test_beam_search.py.
"""

from __future__ import annotations

import pytest

from ensemble_decode import LLM, BeamSearchParams, ExpertPair, SamplingParams
from tests.conftest import Models
from tests.engine.test_correctness import ensemble, prompts

GREEDY = {"temperature": 0.0, "max_tokens": 12, "alpha": 0.8}


def generated(llm: LLM, batch: list[list[int]], options: list[dict]) -> list[list[int]]:
    params = [SamplingParams(**each) for each in options]
    return [output.outputs[0].token_ids for output in llm.generate(batch, params, use_tqdm=False)]


PEERS = {
    "the paper's processor, which recomputes its experts without a mask: 1 of 4": ("full", [GREEDY] * 4),
    "Hugging Face's guidance, whose negative branch has no position ids: 1 of 4": ("guidance", [GREEDY] * 4),
    "proxy-tuning without a mask from the caller: 1 of 4": ("expert alone", [GREEDY] * 4),
    "language-model-arithmetic, several models: 1 of 4": ("three", [GREEDY] * 4),
    "DExperts with the target's top-p 0.9: changes greedy text": (
        "full",
        [{**GREEDY, "nucleus": "target", "top_p": 0.9}] * 4,
    ),
    "FlashInfer, which reads the first row's seed for every row": (
        "full",
        [{**GREEDY, "temperature": 1.0, "seed": seed} for seed in (3, 1, 4, 5)],
    ),
}


@pytest.mark.parametrize("peer", PEERS)
def test_a_ragged_batch_equals_each_prompt_alone_where_a_peer_fails(peer: str, models: Models) -> None:
    kind, options = PEERS[peer]
    guidance = {"a": ExpertPair.from_prompts(anti_expert="")}
    pairs = guidance if kind == "guidance" else ensemble("gpt2", kind, models)[0]
    llm = LLM(models.model("gpt2"), pairs, dtype="float32", enable_prefix_caching=False)
    alone = [generated(llm, [prompt], [each])[0] for prompt, each in zip(prompts(), options, strict=True)]
    assert generated(llm, prompts(), options) == alone
    if "seed" in options[0]:  # the same prompt in every row: only its seed tells a row from its neighbours
        rows = generated(llm, [prompts()[1]] * 4, options)
        assert rows == [generated(llm, [prompts()[1]], [each])[0] for each in options]
        assert len({tuple(row) for row in rows}) > 1


def test_three_beams_of_a_ragged_batch_equal_each_prompt_alone_where_hugging_face_s_guidance_fails(
    models: Models,
) -> None:
    """Its negative branch's cache is not reordered with the beams: 0 of 8."""
    llm = LLM(models.model("gpt2"), {"a": ExpertPair.from_prompts(anti_expert="")}, dtype="float32")
    params = BeamSearchParams(beam_width=3, max_tokens=8, alpha=0.8)
    together = llm.beam_search(prompts(8), params, use_tqdm=False)
    alone = [llm.beam_search(prompt, params, use_tqdm=False)[0] for prompt in prompts(8)]
    assert [[s.tokens for s in o.sequences] for o in together] == [[s.tokens for s in o.sequences] for o in alone]
