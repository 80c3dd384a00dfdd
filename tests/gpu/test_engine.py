"""The whole engine on a GPU: text that is the CPU's, by every placement, captured or not."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ensemble_decode import LLM, SamplingParams
from ensemble_decode.engine import llm, runner
from tests.conftest import Models
from tests.engine.test_correctness import KINDS, ensemble, prompts

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, alpha=0.5)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.9, seed=11, max_tokens=12, ignore_eos=True, alpha=0.5)


def texts(engine: LLM, params: SamplingParams, count: int = 8) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in engine.generate(prompts(count), params, use_tqdm=False)]


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_tokens_are_the_cpu_s(
    family: str, kind: str, params: SamplingParams, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, _ = ensemble(family, kind, models)
    path = models.model(family)
    expected = texts(LLM(path, pairs, dtype="float32", device="cpu"), params)
    for placement in ("sequential", "lanes"):
        for graphs in (False, True):
            monkeypatch.setattr(llm, "Runner", partial(runner.Runner, graphs=graphs))
            engine = LLM(path, pairs, dtype="float32", device="cuda", placement=placement)
            assert texts(engine, params) == expected, f"{placement}, graphs={graphs}"
            assert engine.runner.graphs is None or engine.runner.graphs.replays > 0


def test_preemption_on_a_gpu(models: Models) -> None:
    pairs, _ = ensemble("llama", "lora", models)
    path = models.model("llama")
    roomy = LLM(path, pairs, dtype="float32", device="cuda")
    tight = LLM(path, pairs, dtype="float32", device="cuda", kv_cache_bytes=9 * roomy.ensemble.bytes_per_block)
    assert texts(tight, SAMPLED) == texts(roomy, SAMPLED)
