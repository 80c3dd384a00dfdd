"""Intervals of figures: percentile bootstrap over whole units (target terms, prompts), never over tokens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


def bootstrap_interval(
    units: Values,
    statistic: Callable[[Values], Values],
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile interval of a statistic of unit means (Efron 1979).

    Parameters
    ----------
    units : float64 array [N, K]
        K measured quantities of each of N units.
    statistic : callable
        Takes means of the K quantities, [R, K], one row per resample, and returns [R].
    resamples, confidence, seed
        The same seed and units give the same interval.

    Returns
    -------
    (low, high) : tuple of float

    Raises
    ------
    ValueError
        No units, fewer than 1 resample, or a confidence outside (0, 1).
    """
    units = np.asarray(units, dtype=np.float64)
    if units.ndim != 2 or not len(units):
        raise ValueError(f"units has shape {units.shape}, allowed is [N, K] with N of 1 or more")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples!r}, allowed is 1 or more")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence!r}, allowed is between 0 and 1")
    draws = np.random.default_rng(seed).multinomial(len(units), np.full(len(units), 1 / len(units)), size=resamples)
    values = statistic(draws @ units / len(units))
    tail = 50 * (1 - confidence)
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)
