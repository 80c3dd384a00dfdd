"""From hidden states to the scores of rows.

Three ways lead there, the cheapest that fits is taken:

* all sides on the target's weights and head, and nobody asks for z: hidden states are combined before the head,
  W·(h + Σ α(h⁺ − h⁻)), one head product a row;
* both sides of a pair on one head: one product for their difference, W·(h⁺ − h⁻);
* otherwise each side has its own logits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ensemble_decode.engine.batch import Mixture, Steering
from ensemble_decode.engine.device import Upload
from ensemble_decode.models.ensemble import Ensemble
from ensemble_decode.models.group import Group


@dataclass(slots=True)
class Hidden:
    """Hidden states of one step: ``states[group]`` [R, E], and where each (span, pool)'s outputs begin in it."""

    states: list[torch.Tensor | None]
    first: dict[tuple[int, int], int]


class Combination:
    """Combines what the pools of an ensemble computed, on the target's device.

    ``upload`` brings numbers to that device (see :class:`~ensemble_decode.engine.device.Device`).
    """

    def __init__(self, ensemble: Ensemble, upload: Upload = torch.tensor) -> None:
        self.ensemble = ensemble
        self._upload = upload
        self.groups = ensemble.groups
        self.layout = ensemble.layout

    def combines_hidden(self, steering: Sequence[Steering]) -> bool:
        """Whether every side of ``steering`` runs on the target's weights, and so shares its head."""
        group = self.ensemble.pools[self.layout.target_pool].group
        return all(self._side_groups(item.pair) == (group, group) for item in steering)

    def _side_groups(self, index: int) -> tuple[int, int]:
        """The groups of a pair's two sides."""
        pair, pools = self.layout.pairs[index], self.ensemble.pools
        anti = self.layout.target_pool if pair.anti_expert_pool is None else pair.anti_expert_pool
        return pools[pair.expert_pool].group, pools[anti].group

    def _states(self, hidden: Hidden, keys: list[tuple[int, int]], offsets: list[int]) -> torch.Tensor:
        """Hidden states [len(keys), E] of outputs ``offsets`` of (span, pool) ``keys``, all of one group."""
        states = hidden.states[self.ensemble.pools[keys[0][1]].group]
        assert states is not None
        rows = [hidden.first[key] + offset for key, offset in zip(keys, offsets, strict=True)]
        if rows == list(range(rows[0], rows[0] + len(rows))):
            return states[rows[0] : rows[0] + len(rows)]
        return states[self._upload(rows, dtype=torch.int64)]

    def _sides(self, item: Steering, span: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(span, pool) of a pair's two sides; a pair without an anti-expert has the target there."""
        pair = self.layout.pairs[item.pair]
        if pair.anti_expert_pool is None:
            return (item.expert_span, pair.expert_pool), (span, self.layout.target_pool)
        return (item.expert_span, pair.expert_pool), (item.anti_expert_span, pair.anti_expert_pool)

    def combined_hidden(
        self, hidden: Hidden, spans: list[int], steering: list[tuple[Steering, ...]], offsets: list[int]
    ) -> torch.Tensor:
        """h + Σ α(h⁺ − h⁻) in float32, [rows, E] in the model's dtype; a difference that is not finite counts as 0."""
        h = self._states(hidden, [(span, self.layout.target_pool) for span in spans], offsets)
        by_pair: dict[int, list[tuple[int, Steering]]] = defaultdict(list)
        for row, items in enumerate(steering):
            for item in items:
                by_pair[item.pair].append((row, item))
        if not by_pair:
            return h
        dtype, h = h.dtype, h.float()
        for _, steered in sorted(by_pair.items()):  # in one order, whatever the company
            rows = [row for row, _ in steered]
            alpha = self._upload([item.alpha for _, item in steered], dtype=torch.float32).unsqueeze(1)
            change = difference(*self._side_states(hidden, steered, spans, offsets))
            whole = len(rows) == len(spans)
            h = h + alpha * change if whole else h.index_add(0, self._upload(rows, dtype=torch.int64), alpha * change)
        return h.to(dtype)

    def _side_states(
        self, hidden: Hidden, steered: list[tuple[int, Steering]], spans: list[int], offsets: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """h⁺ and h⁻ [len(steered), E] of the rows that one pair steers."""
        sides = [self._sides(item, spans[row]) for row, item in steered]
        at = [offsets[row] for row, _ in steered]
        plus = self._states(hidden, [expert for expert, _ in sides], at)
        return plus, self._states(hidden, [anti for _, anti in sides], at)

    def scores(
        self, hidden: Hidden, spans: list[int], steering: list[tuple[Steering, ...]], offsets: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """z [B, V], z⁺ and z⁻ [P, B, V] and α [B, P] of rows that need z; z⁻ is None where z⁺ holds differences."""
        size = self.layout.vocab_size
        target = self.ensemble.target
        z = target.logits(self._states(hidden, [(span, self.layout.target_pool) for span in spans], offsets))[:, :size]
        used = sorted({item.pair for items in steering for item in items})
        if not used:
            return z, None, None, None
        apart = all(self.own_heads(pair) for pair in used)
        alpha = torch.zeros(len(spans), len(used), device=z.device)
        expert = anti = None
        for place, pair in enumerate(used):
            steered = [(row, item) for row, items in enumerate(steering) for item in items if item.pair == pair]
            rows = self._upload([row for row, _ in steered], dtype=torch.int64)
            alpha[rows, place] = self._upload([item.alpha for _, item in steered], dtype=torch.float32)
            plus, minus = self.pair_logits(pair, *self._side_states(hidden, steered, spans, offsets), apart)
            if len(used) == 1 and len(steered) == len(spans):  # one pair for all rows, the usual case: not copied
                return z, plus.unsqueeze(0), None if minus is None else minus.unsqueeze(0), alpha
            if expert is None:
                expert = torch.empty(len(used), len(spans), size, device=z.device)
                anti = torch.empty_like(expert) if apart else None
            expert[place, rows] = plus
            if anti is not None and minus is not None:
                anti[place, rows] = minus
        return z, expert, anti, alpha

    def pair_logits(
        self, index: int, plus: torch.Tensor, minus: torch.Tensor, apart: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """z⁺ and z⁻ [rows, V] of a pair's hidden states where both have heads of their own and are wanted ``apart``; else z⁺ − z⁻ and None."""
        size = self.layout.vocab_size
        expert, anti = (self.groups[group] for group in self._side_groups(index))
        if not self.own_heads(index):
            change = difference(plus, minus).to(expert.dtype)
            return difference_logits(expert, change)[:, :size], None
        z_plus, z_minus = expert.logits(plus)[:, :size], anti.logits(minus)[:, :size]
        return (z_plus, z_minus) if apart else (z_plus - z_minus, None)

    def mixture_logits(
        self, hidden: Hidden, mixtures: list[Mixture], spans: list[int], offsets: list[int]
    ) -> torch.Tensor:
        """Weighted sums of the same pools' logits, [rows, V], in whatever group: what drafts are sampled from.

        The pools share one head, and weights of 1 in sum leave its bias as it is: W·Σ w h + b = Σ w (W·h + b).
        """
        states = [
            self._states(hidden, [(span, pool) for span in spans], offsets) for pool in (p for p, _ in mixtures[0])
        ]
        state = states[0]
        if len(states) > 1:
            weights = self._upload([[weight for _, weight in mixture] for mixture in mixtures], dtype=torch.float32)
            state = (weights.unsqueeze(2) * torch.stack(states, 1).float()).sum(1).to(state.dtype)
        group = self.groups[self.ensemble.pools[mixtures[0][0][0]].group]
        logits = group.logits(state)[:, : self.layout.vocab_size]
        missing = self.layout.vocab_size - logits.shape[1]  # a draft model's head may be padded less than the target's
        return torch.nn.functional.pad(logits, (0, missing), value=float("-inf")) if missing else logits

    def own_heads(self, index: int) -> bool:
        """Whether the two sides of a pair end in heads of their own."""
        expert, anti = self._side_groups(index)
        return expert != anti


def difference(plus: torch.Tensor, minus: torch.Tensor) -> torch.Tensor:
    """h⁺ − h⁻ in float32, [rows, E]; 0 for a row in which it is not finite, as the contract has it for logits."""
    change = plus.float() - minus.float()
    return change.masked_fill_(~change.sum(1, keepdim=True).isfinite(), 0.0)


def difference_logits(group: Group, change: torch.Tensor) -> torch.Tensor:
    """W·(h⁺ − h⁻), [rows, V]. A head's bias cancels in a difference of two logits, but W·(h⁺ − h⁻) + b has it."""
    logits = group.logits(change)
    return logits if group.head.bias is None else logits - group.head.bias.float()
