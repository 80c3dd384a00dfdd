"""How unequally labels fall on groups: the gap, what chance makes of it, and its interval.

With p_g(l) the share of label l among the texts of group g, the gap is the mean over labels of the mean over pairs of groups
of |p_g(l) − p_h(l)| (arXiv 2412.01711). It is never negative, so a system without bias shows more than 0: the gap by chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ensemble_decode.evaluation.estimate import Estimate
from ensemble_decode.evaluation.metric import Figure
from ensemble_decode.evaluation.statistics import Values, interval, resample

T = TypeVar("T")


def share_gap(shares: Values) -> Values:
    """Mean over labels of the mean absolute pairwise difference between groups.

    Parameters
    ----------
    shares : float64 array [..., G, K]
        Share of each of K labels in each of G groups.

    Returns
    -------
    float64 array [...]

    Raises
    ------
    ValueError
        Fewer than 2 groups.
    """
    shares = np.asarray(shares, dtype=np.float64)
    if shares.ndim < 2 or shares.shape[-2] < 2:
        raise ValueError(f"shares has shape {shares.shape}, allowed is [..., G, K] with 2 groups or more")
    first, second = zip(*combinations(range(shares.shape[-2]), 2), strict=True)
    return np.abs(shares[..., list(first), :] - shares[..., list(second), :]).mean(axis=(-2, -1))


def independent_chance(shares: Sequence[float], sizes: Sequence[int]) -> float:
    """Expected gap of groups that share one distribution, if every text were drawn on its own.

    E|p̂_g − p̂_h| = √(2/π · p(1 − p)(1/n_g + 1/n_h)), the half-normal mean of the central limit. For results of which
    only shares are published; from labels use :func:`permuted_chance`, which knows that samples of one prompt are alike.

    Parameters
    ----------
    shares : sequence of float
        Share of each label over all groups.
    sizes : sequence of int
        Texts in each group.
    """
    spread = math.fsum(math.sqrt(p * (1 - p)) for p in shares) / len(shares)
    pairs = [math.sqrt(1 / a + 1 / b) for a, b in combinations(sizes, 2)]
    return math.sqrt(2 / math.pi) * spread * math.fsum(pairs) / len(pairs)


def permuted_chance(
    counts: Values, groups: NDArray[np.int64], totals: Values, *, permutations: int = 1000, seed: int = 0
) -> float:
    """Mean gap when prompts are dealt to the groups at random: what a system without bias shows.

    Parameters
    ----------
    counts : float64 array [N, K]
        Texts of each label, by prompt.
    groups : int64 array [N]
        Group of each prompt, 0 … G − 1.
    totals : float64 array [N]
        Texts of each prompt, of whatever label.
    permutations, seed
        The same seed gives the same value.
    """
    rng = np.random.default_rng(seed)
    columns = np.column_stack([totals, counts])
    members = np.eye(int(groups.max()) + 1)[groups]
    total = 0.0
    for _ in range(permutations):
        total += float(share_gap(_shares(members[rng.permutation(len(groups))].T @ columns)))
    return total / permutations


@dataclass(frozen=True, slots=True)
class Labels:
    """How often each label fell on a prompt's texts.

    Parameters
    ----------
    ids, groups : sequence of str, N
        Each prompt's name and group.
    counts : float64 array [N, K]
        Texts of each label.
    totals : float64 array [N]
        Texts, of whatever label.
    labels : sequence of str, K
    """

    ids: Sequence[str]
    groups: Sequence[str]
    counts: Values
    totals: Values
    labels: Sequence[str]

    @property
    def names(self) -> list[str]:
        """The groups there are."""
        return sorted(set(self.groups))

    @property
    def index(self) -> NDArray[np.int64]:
        """Each prompt's group, 0 … G − 1."""
        return np.array([self.names.index(group) for group in self.groups], dtype=np.int64)

    def estimates(self) -> dict[str, Estimate]:
        """The gap (``"gap"``), and each label's share in each group (``"label/group"``); a unit is a prompt."""
        names, index = self.names, self.index
        columns = np.column_stack([self.totals, self.counts])
        found: dict[str, Estimate] = {}
        if len(names) > 1:
            values = (np.eye(len(names))[index][:, :, None] * columns[:, None, :]).reshape(len(columns), -1)
            found["gap"] = Estimate(self.ids, values, lambda means: share_gap(self._by_group(means)))
        for g, name in enumerate(names):
            members = np.flatnonzero(index == g).tolist()
            ids = [self.ids[i] for i in members]
            for k, label in enumerate(self.labels, start=1):
                found[f"{label}/{name}"] = Estimate(ids, columns[members][:, [0, k]], _ratio)
        return found

    def figures(self, resamples: int = 2000, permutations: int = 1000) -> dict[str, Figure]:
        """The estimates as figures, the gap with its chance.

        Noise can only enlarge a gap, so percentiles of resampled gaps lie above a small one. By the triangle inequality a gap
        is off by at most the gap of the errors of the shares: the 95th percentile of that one on either side covers the
        true gap with 95 % or more, whatever its size.
        """
        estimates = self.estimates()
        found = {name: estimate.figure(resamples) for name, estimate in estimates.items()}
        if "gap" in found:
            gap, values = found["gap"].value, estimates["gap"].values
            errors = self._by_group(resample(values, resamples)) - self._by_group(values.mean(axis=0, keepdims=True))
            _, reach = interval(share_gap(errors), len(values), confidence=0.9)  # one-sided: 5 % lie beyond
            chance = permuted_chance(self.counts, self.index, self.totals, permutations=permutations)
            found["gap"] = replace(found["gap"], low=max(0.0, gap - reach), high=gap + reach, chance=chance)
        return found

    def _by_group(self, means: Values) -> Values:
        """Shares [R, G, K] from the gap's means."""
        return _shares(means.reshape(len(means), len(self.names), 1 + len(self.labels)))


def by_domain(figures: Mapping[str, T], domain: str) -> dict[str, T]:
    """The gap named after its domain; groups have names of their own."""
    return {f"gap/{domain}" if name == "gap" else name: figure for name, figure in figures.items()}


def _shares(columns: Values) -> Values:
    """Shares [..., G, K] from totals and counts [..., G, 1 + K]; a resample without a group counts 0 there."""
    return columns[..., 1:] / np.maximum(columns[..., :1], 1e-300)


def _ratio(means: Values) -> Values:
    return means[:, 1] / means[:, 0]
