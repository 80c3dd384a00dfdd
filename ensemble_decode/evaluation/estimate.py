"""An estimate: a statistic of what was measured on units (target terms, prompts, windows), with its bootstrap interval."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ensemble_decode.evaluation.metric import Figure
from ensemble_decode.evaluation.statistics import Values, interval, resample


def first(means: Values) -> Values:
    """The mean of the first quantity: the statistic of most figures."""
    return means[:, 0]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure before it is one number.

    Parameters
    ----------
    units : sequence of hashable, N
        Names of what is resampled. Two systems are compared on the units that both have.
    values : float64 array [N, K]
        K quantities of each unit.
    statistic : callable
        Takes means of the quantities, [R, K], and returns [R].
    chance : float, optional
        What a system without bias is expected to show.
    """

    units: Sequence[Hashable]
    values: Values
    statistic: Callable[[Values], Values] = first
    chance: float | None = None

    @property
    def value(self) -> float:
        return float(self.statistic(self.values.mean(axis=0, keepdims=True))[0])

    def replicates(self, resamples: int) -> Values:
        """The statistic of ``resamples`` resamples. Estimates with as many units are resampled alike: see :func:`resample`."""
        return self.statistic(resample(self.values, resamples))

    def figure(self, resamples: int) -> Figure:
        """Value, 95 % interval, chance and number of units. One unit has no interval: its resamples are all alike."""
        low, high = interval(self.replicates(resamples), len(self.units)) if len(self.units) > 1 else (None, None)
        return Figure(self.value, low, high, self.chance, len(self.units))

    def only(self, units: Sequence[Hashable]) -> Estimate:
        """The same of some of the units, in their order."""
        place = {unit: row for row, unit in enumerate(self.units)}
        return Estimate(units, self.values[[place[unit] for unit in units]], self.statistic, self.chance)


def figures_of(estimates: Mapping[str, Estimate], resamples: int) -> dict[str, Figure]:
    """The figure of every estimate."""
    return {name: estimate.figure(resamples) for name, estimate in estimates.items()}


def share(units: Sequence[Hashable], hits: Sequence[float], chance: float | None = None) -> Estimate:
    """The share, in percent, of units that hit; a hit of 0.5 is a tie."""
    return Estimate(units, 100.0 * np.asarray(hits, np.float64).reshape(-1, 1), first, chance)
