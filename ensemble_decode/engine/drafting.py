"""Arithmetic of drafting, without models: what is being accepted, what steps cost, how deep to draft; and prompt lookup."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

#: Depths must promise this much more tokens a second than none.
_MARGIN = 1.03
#: Tokens that a running rate remembers, that it brings from its prior, and that it keeps when it is looked at again.
_WINDOW, _PRIOR = 32.0, 4.0


@dataclass(slots=True)
class Acceptance:
    """Running share of drafted tokens that the ensemble samples too: their mean, over a window once it is full.

    ``weight`` is how many tokens ``rate`` stands for, ``idle`` how many steps went by since a draft.
    """

    rate: float
    weight: float = _PRIOR
    window: float = _WINDOW
    idle: int = 0

    def observe(self, accepted: int, drafted: int) -> None:
        """Take in a step: ``accepted`` of ``drafted`` tokens agreed, and nothing is known of those after the first that didn't."""
        for agreed in [1.0] * accepted + [0.0] * (accepted < drafted):
            self.weight = min(self.weight + 1, self.window)
            self.rate += (agreed - self.rate) / self.weight

    def beside(self, prior: float) -> float:
        """The rate, with ``prior`` as what a few more tokens would have given: the others' rate, for a sequence with few of its own."""
        return (_PRIOR * prior + self.weight * self.rate) / (_PRIOR + self.weight)

    def doubt(self) -> None:
        """What was found is old: what is seen next counts more."""
        self.weight = min(self.weight, _PRIOR)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sequence that may draft in a step.

    Attributes
    ----------
    rate : float
        Share of its drafted tokens that is accepted.
    most : int
        Tokens that may be drafted.
    rows : float
        Rows that verifying one token adds to a step, as mean over its pools.
    keys : float
        Tokens of context that one such row reads.
    unseen : int
        Tokens that the drafting model computes for the first drafted token.
    early : bool
        Whether it ends before others, and none waits for its place.
    """

    rate: float
    most: int
    rows: float = 1.0
    keys: float = 0.0
    unseen: int = 1
    early: bool = False


#: Seconds of steps by (rows, tokens of context that all these rows read), elementwise.
Seconds = Callable[[np.ndarray, np.ndarray], np.ndarray]


def best_depths(
    candidates: Sequence[Candidate],
    tokens: float,
    rows: float,
    keys: float,
    plain: Seconds,
    verify: Seconds,
    draft: Seconds | None,
    stake: float = math.inf,
) -> tuple[list[int], float]:
    """How many tokens each candidate drafts, so that the work is done soonest; all 0 where that gains too little.

    Token i of a draft is kept with probability aⁱ at acceptance a (Leviathan et al. 2023). So the most promising tokens
    are taken one after the other, over all candidates, and the best of these plans is kept: a step costs its forward over
    all rows, and one forward of the draft model a depth. A token that comes with a draft is worth a sequence's share of a step.
    But a candidate whose end comes ``early``, with nobody to take its place, spares later steps no more than its own rows.

    Parameters
    ----------
    candidates : sequence of Candidate
    tokens, rows, keys : float
        What the step yields and computes without any draft.
    plain, verify, draft : Seconds
        Of the step without drafts, of the one that verifies some, and of the draft model's; None: drafts are free.
    stake : float
        Seconds that drafts may add to the step, all of which are lost if none is accepted.

    Returns
    -------
    depths : list of int
    saved : float
        Seconds that they save on each token of the step.
    """
    most = max((candidate.most for candidate in candidates), default=0)
    depth = np.arange(most)
    chances = np.array([candidate.rate for candidate in candidates])[:, None] ** (depth + 1)
    chances[depth >= np.array([candidate.most for candidate in candidates])[:, None]] = 0.0
    weights = np.array([candidate.rows for candidate in candidates])
    order = np.argsort(-(chances / weights[:, None]).ravel(), kind="stable")[: np.count_nonzero(chances)]
    if not len(order):
        return [0] * len(candidates), 0.0
    who, depth = np.divmod(order, most)
    context = np.array([candidate.keys for candidate in candidates])[who]
    more = weights[who]
    seconds = verify(rows + np.cumsum(more), keys + np.cumsum(more * context))
    if draft is not None:
        unseen = np.array([candidate.unseen for candidate in candidates])[who]
        new = np.where(depth == 0, unseen, 1) * (depth == np.arange(most)[:, None])  # rows of each depth's forward
        totals = np.cumsum(new, 1)
        seconds = seconds + np.where(totals, draft(totals, np.cumsum(new * context, 1)), 0.0).sum(0)
    before = float(plain(np.array(rows), np.array(keys)))
    own = weights * np.array([candidate.keys for candidate in candidates])
    early = np.array([candidate.early for candidate in candidates])
    worth = np.where(early, before - plain(rows - weights, keys - own), before / tokens)
    worth = np.cumsum(chances.ravel()[order] * worth[who])
    gains = np.where(seconds - before <= stake, (before + worth) / seconds, 0.0)
    best = int(np.argmax(gains))
    if gains[best] <= _MARGIN:
        return [0] * len(candidates), 0.0
    saved = before / tokens * (1 - 1 / float(gains[best]))
    return np.bincount(who[: best + 1], minlength=len(candidates)).tolist(), saved


class Costs:
    """Seconds of a step by (pools that compute it, rows, context), measured at start-up and corrected by what steps really take.

    Rows are counted as the mean over the pools: a step in which half of the sequences are steered has fewer rows in
    the experts' pools than in the target's.

    Parameters
    ----------
    measured : dict
        For each tuple of pools, seconds by number of rows, on an empty cache; lines between them, and on from the last two.
    per_key : dict
        For each tuple of pools, seconds for each token of context that a row reads.
    per_verification : dict
        For each tuple of pools, seconds that a step with drafts in it takes longer than one of as many rows without: where steps
        of one token a row are replayed from a graph, it is not.
    """

    def __init__(
        self,
        measured: Mapping[tuple[int, ...], Mapping[int, float]],
        per_key: Mapping[tuple[int, ...], float] | None = None,
        per_verification: Mapping[tuple[int, ...], float] | None = None,
    ) -> None:
        self._tables = {pools: _rising(table) for pools, table in measured.items()}
        self._per_key = dict(per_key or {})
        self._per_verification = dict(per_verification or {})
        #: What steps really take over what was measured, by pools and whether drafts are verified.
        self._scale: dict[tuple[tuple[int, ...], bool], float] = {}
        self._sources: dict[tuple[int, ...], tuple[int, ...]] = {}

    def seconds(self, pools: tuple[int, ...], rows: float, keys: float = 0.0, *, verifies: bool = False) -> float:
        """Of a step of ``rows`` rows through ``pools`` that read ``keys`` tokens of context in all; ``verifies``: drafts are in it."""
        return float(self.curve(pools, np.array(rows), np.array(keys), verifies=verifies))

    def curve(
        self, pools: tuple[int, ...], rows: np.ndarray, keys: np.ndarray, *, verifies: bool = False
    ) -> np.ndarray:
        """:meth:`seconds` of many steps."""
        return self._scale_of(pools, verifies) * self._measured(pools, rows, keys, verifies)

    def _scale_of(self, pools: tuple[int, ...], verifies: bool) -> float:
        """A verification is taken to be no cheaper, over what was measured, than a step without."""
        plain = self._scale.get((pools, False), 1.0)
        return max(plain, self._scale.get((pools, True), plain)) if verifies else plain

    def _measured(self, pools: tuple[int, ...], rows: np.ndarray, keys: np.ndarray, verifies: bool) -> np.ndarray:
        source = self._source(pools)
        xs, ys = self._tables[source]
        slope = (ys[-1] - ys[-2]) / (xs[-1] - xs[-2]) if len(xs) > 1 else ys[0] / xs[0]
        found = np.interp(rows, xs, ys) + np.maximum(rows - xs[-1], 0.0) * slope
        if verifies:
            found = found + self._per_verification.get(source, 0.0)
        return found + keys * self._per_key.get(source, 0.0)

    def observe(
        self, pools: tuple[int, ...], rows: float, keys: float, seconds: float, *, verifies: bool = False
    ) -> None:
        """Correct the estimate for ``pools``: neighbours come and go, and drafts in a batch may cost more than one row's did.

        One outlier moves it little.
        """
        scale = self._scale.get((pools, verifies), self._scale_of(pools, verifies))
        ratio = seconds / float(self._measured(pools, np.array(rows), np.array(keys), verifies))
        self._scale[pools, verifies] = scale + 0.05 * (min(ratio, 3 * scale) - scale)

    def _source(self, pools: tuple[int, ...]) -> tuple[int, ...]:
        """The measured pools that stand for ``pools``: these, or the smallest set with all of them, or the largest."""
        if (found := self._sources.get(pools)) is None:
            wider = [known for known in self._tables if set(pools) <= set(known)]
            found = min(wider, key=len) if wider else max(self._tables, key=len)
            self._sources[pools] = found
        return found


def _rising(table: Mapping[int, float]) -> tuple[list[int], list[float]]:
    """Rows and seconds, made to rise: more rows never cost less, whatever the clock said."""
    xs = sorted(table)
    ys = [min(table[x] for x in xs[i:]) for i in range(len(xs))]
    return xs, ys


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
