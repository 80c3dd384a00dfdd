"""Bootstrap over whole units (target terms, prompts), never over tokens (Efron 1979).

With few units percentiles are too narrow: resamples spread by the root of (n − 1) / n too little, and the normal quantile stands
where Student's belongs. Both are mended by taking percentiles further out, the expanded percentile bootstrap (Hesterberg 2015).
It needs scipy, which the extra ``evaluate`` brings.
"""

from __future__ import annotations

import math
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


def interval(replicates: Values, units: int, confidence: float = 0.95) -> tuple[float, float]:
    """The expanded percentile interval of a statistic from its replicates.

    A level a becomes Φ(t⁻¹(a) √(n / (n − 1))), t with n − 1 degrees of freedom. With fewer than 5 units that is beyond what can be
    resampled: the interval is the replicates' range, and still too narrow.

    Parameters
    ----------
    replicates : float64 array [R]
    units : int
        n, how many were resampled.
    confidence : float

    Raises
    ------
    ValueError
        A confidence outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence!r}, allowed is between 0 and 1")
    tail = 100 * _expanded((1 - confidence) / 2, units)
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
    return interval(statistic(resample(units, resamples, seed)), len(units), confidence)


def two_sided(differences: Values, units: int) -> float:
    """p-value of the hypothesis that a difference is 0, from its bootstrap replicates.

    p₀ is twice the smaller share of replicates on either side of 0, 0 itself on both, with the +1 that keeps it above 0 (Davison
    and Hinkley 1997, 4.2.2). What is returned is the p at which the expanded interval reaches 0: that of Student's
    t = Φ⁻¹(1 − p₀ / 2) √((n − 1) / n) with n − 1 degrees of freedom, n the number of ``units``, 2 or more.
    """
    from scipy.stats import norm, t

    fewer = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    percentile = min(1.0, 2 * (1 + fewer) / (len(differences) + 1))
    return float(2 * t.sf(norm.isf(percentile / 2) * math.sqrt((units - 1) / units), units - 1))


def _expanded(level: float, units: int) -> float:
    """The lower percentile level that stands for ``level``. The replicates of one unit are all alike, so any would do."""
    from scipy.stats import norm, t

    return level if units == 1 else float(norm.cdf(t.ppf(level, units - 1) * math.sqrt(units / (units - 1))))


def holm(p_values: Values) -> Values:
    """Holm's step-down correction (1979) of the p-values of one family, in their order."""
    p_values = np.asarray(p_values, np.float64)
    order = np.argsort(p_values, kind="stable")
    steps = p_values[order] * (len(p_values) - np.arange(len(p_values)))
    found = np.empty_like(p_values)
    found[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return found
