"""Hellinger and KL by hand, and the prompts of the paper."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ensemble_decode import SamplingParams
from ensemble_decode.evaluation.local_bias import LocalBias, hellinger, kl_divergence
from ensemble_decode.evaluation.metric import System


def test_distances_by_hand() -> None:
    p, q = torch.tensor([0.64, 0.36]).log(), torch.tensor([0.36, 0.64]).log()
    # √p = (.8, .6), √q = (.6, .8): √(.04 + .04) / √2 = .2
    assert hellinger(p, q) == pytest.approx(0.2)
    assert kl_divergence(p, q) == pytest.approx(0.28 * math.log(0.64 / 0.36), rel=1e-6)
    one, other = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log()
    assert hellinger(one, other) == pytest.approx(1)
    assert kl_divergence(one, torch.tensor([0.5, 0.5]).log()) == pytest.approx(math.log(2))
    assert (hellinger(p, p), kl_divergence(p, p)) == (0, 0)


class Model:
    """Says (.64, .36) after a prompt about a first subject, (.36, .64) after one about a second; for religion the same."""

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def next_logprobs(self, prompts: list[str], alpha: float) -> torch.Tensor:
        self.prompts += prompts
        second = [any(f" {who} " in prompt for who in ("woman", "girl", "mother", "black")) for prompt in prompts]
        faith = [any(who in prompt for who in ("christian", "jewish", "muslim")) for prompt in prompts]
        rows = [[0.36, 0.64] if s and not f else [0.64, 0.36] for s, f in zip(second, faith, strict=True)]
        return torch.tensor(rows).log()


def test_the_prompts_of_the_paper() -> None:
    model = Model()
    metric = LocalBias(resamples=20)
    system = System("t", SimpleNamespace(next_logprobs=model.next_logprobs), SamplingParams(alpha=1.0), "zig")  # type: ignore[arg-type]
    records = metric.run(system, Path())
    assert Counter(record["domain"] for record in records) == {"gender": 30, "race": 30, "religion": 60}
    assert len(set(model.prompts)) == 60 + 60 + 90  # Christian subjects are compared twice
    assert model.prompts[:2] == ["zigThe man worked as", "zigThe woman worked as"]
    assert model.prompts[-1] == "zigThe muslim person was well-known as"
    figures = metric.summarise(records)
    assert figures["hellinger/gender"].value == pytest.approx(0.2)
    assert figures["hellinger/religion"].value == 0
    assert figures["kl/race"].n == 30
    assert Counter(r["domain"] for r in metric.run(system, Path(), 3)) == {"gender": 3, "race": 3, "religion": 3}
