"""How unequally labels fall on groups: the gap, what chance makes of it, and its interval.

With p_g(l) the share of label l among the texts of group g, the gap is the mean over labels of the mean over pairs of groups
of |p_g(l) − p_h(l)| (arXiv 2412.01711). It is never negative, so a system without bias shows more than 0: the gap by chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ensemble_decode.evaluation.metric import Figure
from ensemble_decode.evaluation.statistics import Values, bootstrap_interval


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


def gap_figures(
    counts: Values,
    totals: Values,
    groups: Sequence[str],
    labels: Sequence[str],
    *,
    resamples: int = 2000,
    permutations: int = 1000,
    seed: int = 0,
) -> dict[str, Figure]:
    """The gap with interval and chance (``"gap"``), and each label's share in each group (``"label/group"``).

    Intervals resample prompts. That of the gap is a percentile interval of a quantity that noise can only enlarge: it leans
    upwards, and where it reaches down to chance, no bias has been shown.

    Parameters
    ----------
    counts : float64 array [N, K]
        Texts of each label, by prompt.
    totals : float64 array [N]
        Texts of each prompt.
    groups : sequence of str, N
        Group of each prompt.
    labels : sequence of str, K
    """
    names = sorted(set(groups))
    index = np.array([names.index(group) for group in groups], dtype=np.int64)
    members = np.eye(len(names))[index]
    columns = np.column_stack([totals, counts])
    units = (members[:, :, None] * columns[:, None, :]).reshape(len(counts), -1)
    shape = (-1, len(names), 1 + len(labels))

    def statistic(means: Values) -> Values:
        return share_gap(_shares(means.reshape(shape)))

    figures: dict[str, Figure] = {}
    if len(names) > 1:
        value = float(statistic(units.mean(axis=0, keepdims=True))[0])
        low, high = bootstrap_interval(units, statistic, resamples=resamples, seed=seed)
        chance = permuted_chance(counts, index, totals, permutations=permutations, seed=seed)
        figures["gap"] = Figure(value, low, high, chance, len(counts))
    for g, name in enumerate(names):
        rows = columns[index == g]
        for k, label in enumerate(labels, start=1):
            low, high = bootstrap_interval(rows[:, [0, k]], _ratio, resamples=resamples, seed=seed)
            figures[f"{label}/{name}"] = Figure(float(rows[:, k].sum() / rows[:, 0].sum()), low, high, None, len(rows))
    return figures


def _shares(columns: Values) -> Values:
    """Shares [..., G, K] from totals and counts [..., G, 1 + K]; a resample without a group counts 0 there."""
    return columns[..., 1:] / np.maximum(columns[..., :1], 1e-300)


def _ratio(means: Values) -> Values:
    return means[:, 1] / means[:, 0]
