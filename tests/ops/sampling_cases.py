"""Rows, parameters and the judge that the tests of the sampling operators share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ensemble_decode.ops import EnsembleSample, reference

#: By contract exp and log may differ between back ends by this much, relative, and nothing else may.
TOLERANCE = 1e-5
POISON = 1e30  # what lies between the rows of a strided tensor


@dataclass
class Case:
    """Arguments of ``ensemble_sample``, all of them tensors."""

    target: Tensor
    expert: Tensor | None
    anti_expert: Tensor | None
    alpha: Tensor | None
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    position: Tensor
    nucleus: str = "combined"
    target_is_combined: bool = False

    @property
    def batch(self) -> int:
        return self.target.shape[0]

    @property
    def logits(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.target, self.expert, self.anti_expert

    @property
    def keywords(self) -> dict:
        names = ("alpha", "temperature", "top_k", "top_p", "min_p", "seed", "position", "nucleus", "target_is_combined")
        return {name: getattr(self, name) for name in names}

    def rows(self, index: Tensor) -> Case:
        """The case of these rows only, in this order."""
        names = ("alpha", "temperature", "top_k", "top_p", "min_p", "seed", "position")
        given = {name: value[index] for name in names if (value := getattr(self, name)) is not None}
        return replace(
            self,
            target=self.target[index],
            expert=None if self.expert is None else self.expert[:, index],
            anti_expert=None if self.anti_expert is None else self.anti_expert[:, index],
            **given,
        )

    def run(self, operator: object) -> EnsembleSample:
        return EnsembleSample(*operator(*self.logits, **self.keywords))  # type: ignore[operator]

    @property
    def scores(self) -> tuple[Tensor, Tensor]:
        """(s, z / T), float32 [B, V]."""
        heat = torch.where(self.temperature == 0, 1.0, self.temperature).unsqueeze(1)
        return reference.combine(*self.logits, self.alpha) / heat, self.target.float() / heat


def logits(batch: int, vocab: int, generator: torch.Generator) -> Tensor:
    """Rows of several shapes, float32: flat, like a language model's, peaked, and full of ties."""
    rank = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(batch)])
    noise = torch.randn(batch, vocab, generator=generator)
    zipf = -torch.log(rank + 2.0)
    shapes = (noise, 1.3 * zipf + 0.5 * noise, 4 * zipf + noise, (2 * noise).round() / 2)
    return torch.stack([shapes[row % 4][row] for row in range(batch)]) if batch else noise


def strided(x: Tensor, padding: int) -> Tensor:
    """The same values with ``padding`` poisoned elements after each row."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + padding), POISON).to(x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def make_case(
    vocab: int,
    parameters: list[tuple[float, int, float, float]],
    *,
    pairs: int = 0,
    difference: bool = False,
    dtype: torch.dtype = torch.float32,
    padding: int = 0,
    nucleus: str = "combined",
    seed: int = 0,
) -> Case:
    """One row for each (top_p, top_k, min_p, temperature)."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(parameters)

    def like_model(x: Tensor) -> Tensor:
        return strided(x.to(dtype), padding)

    target = like_model(logits(batch, vocab, generator))
    experts = [
        like_model(torch.stack([logits(batch, vocab, generator) for _ in range(pairs)])) for _ in range(2 * (pairs > 0))
    ]
    weights = torch.tensor([0.0, 0.5, 1.0, -1.0, 2.0])
    top_p, top_k, min_p, temperature = (torch.tensor(x) for x in zip(*parameters, strict=True))
    return Case(
        target,
        experts[0] if pairs else None,
        experts[1] if pairs and not difference else None,
        weights[torch.randint(5, (batch, pairs), generator=generator)] if pairs else None,
        temperature.float(),
        top_k.int(),
        top_p.float(),
        min_p.float(),
        torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator),
        torch.randint(2**17, (batch,), generator=generator),
        nucleus,
    )


@dataclass
class Judge:
    """Holds an operator to the reference, token by token, and counts the flips that the contract allows."""

    rows: int = 0
    flips: int = 0

    def check(self, case: Case, got: EnsembleSample) -> None:
        want = case.run(reference.ensemble_sample)
        score, target_score = case.scores
        self.rows += case.batch
        for row in (got.token != want.token).nonzero().flatten().tolist():
            self.flips += 1
            token = int(got.token[row])
            both = f"row {row}: token {token}, the reference has {int(want.token[row])}"
            assert want.token[row] >= 0, both
            assert 0 <= token < score.shape[1], both
            assert self._excused(case, row, token, score[row], target_score[row]), (
                f"{both}, and they are not near a tie"
            )
        valid = want.token >= 0
        for name, mine, scores in (
            ("logprob", got.logprob, score),
            ("target_logprob", got.target_logprob, target_score),
        ):
            truth = torch.full((case.batch,), math.nan, dtype=torch.float64)
            if not (name == "target_logprob" and case.target_is_combined):
                index = got.token[valid].unsqueeze(1)
                truth[valid] = scores[valid].double().log_softmax(-1).gather(1, index).squeeze(1)
            try:
                torch.testing.assert_close(mine.double(), truth, rtol=1e-6, atol=3e-6, equal_nan=True)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None

    @staticmethod
    def _excused(case: Case, row: int, token: int, score: Tensor, target_score: Tensor) -> bool:
        """Whether errors of 1e-5 in exp and log can make of this row what the operator made of it."""
        filters = target_score if case.nucleus == "target" else score
        top_k, top_p, min_p = int(case.top_k[row]), float(case.top_p[row]), float(case.min_p[row])
        surely = reference.kept(filters, top_k, top_p * (1 - TOLERANCE) if top_p < 1 else 1.0, min_p)
        possibly = reference.kept(filters, top_k, top_p * (1 + TOLERANCE), min_p)
        keys = score.double()
        slack = 0.0
        if case.temperature[row] != 0:
            keys = keys + reference.gumbel_noise(case.seed[row : row + 1], case.position[row : row + 1], len(score))[0]
            slack = TOLERANCE * max(1.0, keys[surely].max().abs().item())
        return bool(possibly[token]) and bool(keys[token] >= keys[surely].max() - slack)


def endless(grid: list, seed: int) -> Iterator:
    """The grid in a shuffled order, again and again."""
    while True:
        for i in torch.randperm(len(grid), generator=torch.Generator().manual_seed(seed)).tolist():
            yield grid[i]
        seed += 1


def chi_square(counts: Tensor, probabilities: Tensor, least: float = 5.0) -> tuple[float, float]:
    """(p-value, covered mass) of Pearson's test; cells expecting fewer than ``least`` are left to one pooled cell."""
    draws = counts.sum().double()
    expected = probabilities.double() * draws
    own = expected >= least
    observed = torch.cat([counts[own].double(), counts[~own].sum(0, keepdim=True).double()])
    expected = torch.cat([expected[own], expected[~own].sum(0, keepdim=True)])
    used = expected >= least
    statistic = ((observed - expected) ** 2 / expected.clamp(min=1e-300))[used].sum()
    freedom = torch.tensor((used.sum().item() - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2)), float(probabilities[own].sum())
