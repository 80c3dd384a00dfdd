"""What the scores of rows are made of."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ensemble_decode.engine.batch import Steering
from ensemble_decode.engine.combination import Combination, Hidden
from ensemble_decode.models.layout import Layout, PairLayout

LAYOUT = Layout(6, 32, 0, 5, (PairLayout("apart", 1.0, 1, 2), PairLayout("shared", 1.0, 3, 4)))
#: By pool; the sides of "apart" have heads of their own, those of "shared" one.
GROUPS = [0, 1, 2, 3, 3]


class Head:
    """Two columns more than the vocabulary has; keeps the logits that it gave."""

    dtype = torch.float32
    head = SimpleNamespace(bias=None)

    def __init__(self, seed: int) -> None:
        self.weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
        self.gave: list[torch.Tensor] = []

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self.gave.append(hidden @ self.weight)
        return self.gave[-1]


@pytest.mark.parametrize("pairs", [[[0], [0]], [[1], [1]], [[0], []], [[0], [1]], [[0, 1], [0, 1]]])
def test_scores_of_pairs(pairs: list[list[int]]) -> None:
    groups = [Head(seed) for seed in range(4)]
    pools = [SimpleNamespace(group=group) for group in GROUPS]
    ensemble = SimpleNamespace(groups=groups, layout=LAYOUT, pools=pools, target=groups[0])
    states = [torch.randn(4, 4, generator=torch.Generator().manual_seed(9 + group)) for group in range(4)]
    first = {(span, pool): span + 2 * (pool == 4) for span in range(2) for pool in range(5)}
    steering = [tuple(Steering(pair, 0.5 + row, row, row) for pair in row_pairs) for row, row_pairs in enumerate(pairs)]
    z, expert, anti, alpha = Combination(ensemble).scores(Hidden(states, first), [0, 1], steering, [0, 0])  # type: ignore[arg-type]
    used = sorted({pair for row_pairs in pairs for pair in row_pairs})
    assert torch.equal(z, (states[0][:2] @ groups[0].weight)[:, :6])
    assert expert is not None
    assert alpha is not None
    assert (anti is not None) == (used == [0])
    change = expert if anti is None else expert - anti
    for row, row_pairs in enumerate(pairs):
        assert alpha[row].tolist() == [0.5 + row if pair in row_pairs else 0.0 for pair in used]
        for place, pair in enumerate(used):
            if pair in row_pairs:
                plus, minus = (1, 2) if pair == 0 else (3, 3)
                expected = states[plus][row] @ groups[plus].weight
                expected = expected - states[minus][first[row, 2 + 2 * pair]] @ groups[minus].weight
                torch.testing.assert_close(change[place, row], expected[:6], rtol=1e-5, atol=1e-5)
    if pairs[0] == pairs[1] == used and len(used) == 1:
        heads = {logits.data_ptr() for group in groups for logits in group.gave}
        assert all(side.data_ptr() in heads for side in (expert, anti) if side is not None), "copied"
