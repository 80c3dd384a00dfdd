"""Timing: that what is timed is what is said, not how long it takes."""

from __future__ import annotations

from ensemble_decode import LLM, SamplingParams, Speculation
from ensemble_decode.benchmarking import compare

from .conftest import Models


def test_turns_with_and_without_speculation_do_the_same_work(models: Models) -> None:
    """The same tokens come out, and every turn computes its whole prompts: none finds the last one's in a cache."""
    llm = LLM(models.model("llama"), dtype="float32", speculation=Speculation("ngram", 3, adaptive=False))
    served = []
    generate = llm.generate

    def watched(*args, **options):
        outputs = generate(*args, **options)
        served.append((llm.engine.speculator is not None, outputs))
        return outputs

    llm.generate = watched  # type: ignore[method-assign]
    speculator = llm.engine.speculator
    found = compare(llm, [None, speculator], 2, 48, 20, SamplingParams(temperature=0.0), rounds=2)
    assert [speculates for speculates, _ in served] == [True, *[False, False, True, True] * 2]
    assert all(output.metrics.cached_tokens == 0 for _, outputs in served for output in outputs)
    texts = [[output.outputs[0].token_ids for output in outputs] for _, outputs in served]
    assert texts[2] == texts[4]
    assert texts[6] == texts[8]
    assert found[0].drafted == 0 < found[1].drafted
    assert llm.engine.speculator is speculator
    assert llm.engine.blocks.prefix_caching
