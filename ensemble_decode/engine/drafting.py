"""Arithmetic of drafting, without models: what is being accepted, what steps cost, how deep to draft; and prompt lookup."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass

#: Weight of one drafted token in the running acceptance rate.
_WEIGHT = 0.12
#: A depth must promise this much more tokens a second than none.
_MARGIN = 1.03
#: Steps between two looks whether drafting pays again; doubled after each that it didn't.
_PAUSE, _LONGEST_PAUSE = 32, 512

Seconds = Callable[[int], float]


@dataclass(slots=True)
class Acceptance:
    """Running share of drafted tokens that the ensemble samples too, of one sequence."""

    rate: float
    pause: int = _PAUSE
    waited: int = 0

    def observe(self, accepted: int, drafted: int) -> None:
        """Take in a step: ``accepted`` of ``drafted`` tokens agreed, and nothing is known of those after the first that didn't."""
        for agreed in [1.0] * accepted + [0.0] * (accepted < drafted):
            self.rate += _WEIGHT * (agreed - self.rate)
        if accepted and accepted == drafted:
            self.pause = self.waited = _PAUSE  # a try that went well is followed by the next one at once

    def depth(self, most: int, sequences: int, verify: Seconds, draft: Seconds) -> int:
        """How many tokens to draft in a step; see :func:`best_depth`. Where none pay, one is tried now and then."""
        depth = best_depth(self.rate, most, sequences, verify, draft)
        if depth:
            self.pause, self.waited = _PAUSE, 0
            return depth
        if not best_depth(0.95, most, sequences, verify, draft):
            return 0  # nothing that could be accepted would pay for it
        self.waited += 1
        if self.waited < self.pause:
            return 0
        self.pause, self.waited = min(2 * self.pause, _LONGEST_PAUSE), 0
        return 1


def best_depth(rate: float, most: int, sequences: int, verify: Seconds, draft: Seconds) -> int:
    """The depth of most tokens a second, 0 … ``most``.

    A step that drafts k tokens yields (1 − a^(k+1)) / (1 − a) at acceptance a (Leviathan et al. 2023, formula 1) and costs k
    draft steps and a forward over k + 1 positions; all ``sequences`` of the step are taken to draft as deep as this one.
    """
    rate = min(rate, 0.999)
    best, most_tokens = 0, _MARGIN / verify(sequences)
    for depth in range(1, most + 1):
        tokens = (1 - rate ** (depth + 1)) / (1 - rate)
        found = tokens / (depth * draft(sequences) + verify(sequences * (depth + 1)))
        if found > most_tokens:
            best, most_tokens = depth, found
    return best


class Costs:
    """Seconds of a step by (pools that compute it, rows), measured at start-up and corrected by what steps really take.

    Parameters
    ----------
    measured : dict
        For each tuple of pools, seconds by number of rows; lines between them, and on from the last two.
    """

    def __init__(self, measured: Mapping[tuple[int, ...], Mapping[int, float]]) -> None:
        self._tables = {pools: sorted(table.items()) for pools, table in measured.items()}
        self._scale = dict.fromkeys(self._tables, 1.0)

    def seconds(self, pools: tuple[int, ...], rows: int) -> float:
        """Of a step of ``rows`` rows through ``pools``; of the largest set measured where this one was not."""
        pools = self._known(pools)
        table = self._tables[pools]
        upper = min(max(bisect_left(table, (rows, 0.0)), 1), len(table) - 1)
        if len(table) == 1:
            return self._scale[pools] * table[0][1] * max(1.0, rows / table[0][0])
        (x0, y0), (x1, y1) = table[upper - 1], table[upper]
        return self._scale[pools] * max(y0 + (y1 - y0) * (rows - x0) / (x1 - x0), min(y0, y1))

    def observe(self, pools: tuple[int, ...], rows: int, seconds: float) -> None:
        """Correct the estimate for ``pools``: contexts grow, neighbours come and go. One outlier moves it little."""
        pools = self._known(pools)
        ratio = self._scale[pools] * seconds / self.seconds(pools, rows)
        self._scale[pools] += 0.05 * (min(ratio, 3 * self._scale[pools]) - self._scale[pools])

    def _known(self, pools: tuple[int, ...]) -> tuple[int, ...]:
        return pools if pools in self._tables else max(self._tables, key=len)


class NgramIndex:
    """Prompt lookup: what followed the last time that the text ended as it does now. One dict entry a token and length."""

    LENGTHS = (4, 3, 2)

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # an n-gram → where its latest successor stands
        self._indexed = 0

    def propose(self, tokens: list[int], most: int) -> list[int]:
        """Up to ``most`` tokens that followed the longest known ending of ``tokens``, which only ever grows."""
        # The last token's own n-grams have no successor yet: they are entered when one is there.
        for end in range(max(self._indexed, 1), len(tokens)):
            for length in self.LENGTHS:
                if end >= length:
                    self._after[tuple(tokens[end - length : end])] = end
        self._indexed = len(tokens)
        for length in self.LENGTHS:
            if len(tokens) >= length and (start := self._after.get(tuple(tokens[-length:]))) is not None:
                found = tokens[start : start + most]
                # A text that repeats itself goes on beyond its own end.
                period = len(tokens) - start
                while len(found) < most:
                    found.append(found[len(found) - period])
                return found
        return []
