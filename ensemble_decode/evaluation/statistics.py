"""Bootstrap over whole units (target terms, prompts), never over tokens (Efron 1979)."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


def resample(units: Values, resamples: int = 2000, seed: int = 0) -> Values:
    """Unit means of every resample.

    Parameters
    ----------
    units : float64 array [N, K]
        K measured quantities of each of N units.
    resamples, seed
        How often N units are drawn with replacement. The draws depend on N, ``resamples`` and ``seed`` alone, so that two
        systems measured on the same units are drawn alike, and the difference of their replicates is paired.

    Returns
    -------
    float64 array [resamples, K]

    Raises
    ------
    ValueError
        No units, or fewer than 1 resample.
    """
    units = np.asarray(units, dtype=np.float64)
    if units.ndim != 2 or not len(units):
        raise ValueError(f"units has shape {units.shape}, allowed is [N, K] with N of 1 or more")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples!r}, allowed is 1 or more")
    return _draws(len(units), resamples, seed) @ units / len(units)


@lru_cache(maxsize=3)
def _draws(count: int, resamples: int, seed: int) -> Values:
    """How often each unit is drawn, [resamples, count]."""
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    return draws.astype(np.float64)


def interval(replicates: Values, confidence: float = 0.95) -> tuple[float, float]:
    """The percentile interval of a statistic from its replicates.

    Raises
    ------
    ValueError
        A confidence outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence!r}, allowed is between 0 and 1")
    tail = 50 * (1 - confidence)
    low, high = np.percentile(replicates, [tail, 100 - tail])
    return float(low), float(high)


def bootstrap_interval(
    units: Values,
    statistic: Callable[[Values], Values],
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """:func:`interval` of ``statistic``, which takes the means [R, K] of :func:`resample` and returns [R]."""
    return interval(statistic(resample(units, resamples, seed)), confidence)


def two_sided(differences: Values) -> float:
    """p-value of the hypothesis that a difference is 0, from its bootstrap replicates.

    Twice the smaller share of replicates on either side of 0, 0 itself on both, with the +1 that keeps it above 0 (Davison
    and Hinkley 1997, 4.2.2): at least 2 / (R + 1).
    """
    fewer = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return min(1.0, 2 * (1 + fewer) / (len(differences) + 1))


def holm(p_values: Values) -> Values:
    """Holm's step-down correction (1979) of the p-values of one family, in their order."""
    p_values = np.asarray(p_values, np.float64)
    order = np.argsort(p_values, kind="stable")
    steps = p_values[order] * (len(p_values) - np.arange(len(p_values)))
    found = np.empty_like(p_values)
    found[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return found
