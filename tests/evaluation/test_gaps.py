"""Gaps between groups: worked by hand, against the published ratios, and what chance makes of them."""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_decode.evaluation.gaps import Labels, independent_chance, permuted_chance, share_gap

LABELS = ("positive", "neutral", "negative")


def labelled(counts, groups, texts=5):
    return Labels([f"prompt {i}" for i in range(len(groups))], groups, counts, np.full(len(groups), texts), LABELS)


def test_two_groups_by_hand():
    # |0.6 − 0.4|, |0.3 − 0.3|, |0.1 − 0.2| → (0.2 + 0 + 0.1) / 3
    assert share_gap(np.array([[0.6, 0.3, 0.1], [0.4, 0.3, 0.2]])) == pytest.approx(0.1, abs=1e-15)


def test_three_groups_by_hand():
    # One label: |.5 − .2|, |.5 − .1|, |.2 − .1| → 0.8 / 3
    assert share_gap(np.array([[0.5], [0.2], [0.1]])) == pytest.approx(0.8 / 3, abs=1e-15)


def test_one_group_has_no_gap():
    with pytest.raises(ValueError, match="2 groups or more"):
        share_gap(np.array([[0.5, 0.5]]))


def test_figures_by_hand():
    counts = np.array([[2, 1, 1], [4, 0, 0], [1, 1, 2], [0, 2, 0]], float)  # the last prompt has 2 texts of "other"
    figures = labelled(counts, ["a", "a", "b", "b"], texts=4).figures(50, 50)
    assert figures["positive/a"].value == pytest.approx(6 / 8)
    assert figures["neutral/b"].value == pytest.approx(3 / 8)
    # positive |6/8 − 1/8|, neutral |1/8 − 3/8|, negative |1/8 − 2/8|
    assert figures["gap"].value == pytest.approx((5 + 2 + 1) / 8 / 3)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 3))
def test_the_order_of_prompts_does_not_matter(seed, group_count):
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(5, [0.5, 0.3, 0.15, 0.05], size=30)[:, :3].astype(float)
    groups = np.array([f"g{i % group_count}" for i in range(30)])
    order = rng.permutation(30)

    def gap(rows):
        return labelled(counts[rows], list(groups[rows])).estimates()["gap"].value

    assert gap(order) == pytest.approx(gap(np.arange(30)), abs=1e-12)


def _simulate(rng, shares, prompts):
    counts = np.concatenate([rng.multinomial(5, p, size=n)[:, :3] for p, n in zip(shares, prompts, strict=True)])
    groups = np.repeat(np.arange(len(prompts)), prompts)
    return counts.astype(float), groups


def test_a_planted_gap_is_found_and_none_where_none_is():
    rng = np.random.default_rng(5)
    fair, biased = [0.6, 0.3, 0.07, 0.03], [0.5, 0.3, 0.17, 0.03]
    for shares, planted in (((fair, fair), False), ((fair, biased), True)):
        counts, groups = _simulate(rng, shares, (400, 300))
        names = [f"g{g}" for g in groups]
        gap = labelled(counts, names).figures(300, 200)["gap"]
        assert gap.low is not None
        assert gap.chance is not None
        assert (gap.low > 0) is planted
        assert gap.low <= gap.value <= (gap.high or 0)


@pytest.mark.parametrize("true", [0.0, 0.02, 0.1])
def test_the_interval_covers_the_true_gap_whatever_its_size(true: float) -> None:
    """Of 15 prompts × 2 samples a group; percentiles of resampled gaps cover 0 never and 0.02 in less than half of the cases."""
    rng = np.random.default_rng(11)
    first, second = [0.4 + 0.75 * true, 0.4, 0.2 - 0.75 * true], [0.4 - 0.75 * true, 0.4, 0.2 + 0.75 * true]
    assert share_gap(np.array([first, second])) == pytest.approx(true)
    covered = 0
    for _ in range(200):
        counts = np.concatenate([rng.multinomial(2, shares, size=15) for shares in (first, second)]).astype(float)
        gap = labelled(counts, ["a"] * 15 + ["b"] * 15, texts=2).figures(400, 1)["gap"]
        covered += (gap.low or 0) <= true <= (gap.high or 0)
    assert covered >= 180


def test_chance_is_the_mean_gap_of_unbiased_systems():
    rng = np.random.default_rng(7)
    share = [0.6, 0.3, 0.07, 0.03]
    gaps = []
    for _ in range(400):
        counts, groups = _simulate(rng, (share, share), (60, 40))
        gaps.append(float(share_gap(np.stack([counts[groups == g].sum(0) / (5 * n) for g, n in ((0, 60), (1, 40))]))))
    error = np.std(gaps) / math.sqrt(len(gaps))
    assert independent_chance(share[:3], (300, 200)) == pytest.approx(np.mean(gaps), abs=4 * error)
    # One draw's permutations depend on its own shares; several draws average that out.
    chances = [
        permuted_chance(*_simulate(rng, (share, share), (60, 40)), np.full(100, 5.0), permutations=200, seed=i)
        for i in range(10)
    ]
    assert np.mean(chances) == pytest.approx(np.mean(gaps), abs=4 * error)


def test_samples_that_are_alike_raise_the_chance_level():
    rng = np.random.default_rng(9)
    counts = 5.0 * rng.multinomial(1, [0.5, 0.3, 0.2], size=100)  # all five samples of a prompt have one label
    groups = np.arange(100) % 2
    chance = permuted_chance(counts, groups, np.full(100, 5.0), permutations=400)
    naive = independent_chance(counts.sum(0) / 500, (250, 250))
    assert chance == pytest.approx(naive * math.sqrt(5), rel=0.1)


def _published(name: str) -> dict[str, dict[str, float]]:
    root = os.environ.get("ENSEMBLE_DECODE_DATA")
    if root is None:
        pytest.skip("ENSEMBLE_DECODE_DATA names no folder with paper_results_zemour")
    groups: dict[str, dict[str, float]] = {}
    with (Path(root) / "paper_results_zemour" / f"{name}.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            groups.setdefault(row["subgroup"], {})[row["metric"]] = float(row["score"])
    return groups


def test_gpt2s_published_gender_regard_is_at_chance():
    groups = _published("gpt2__score__gpt2_gender_prompt")
    shares = np.array([[groups[g][f"regard-{label}"] for label in LABELS] for g in sorted(groups)])
    sizes = (5 * 2048, 5 * 1156)
    pooled = (shares * np.array(sizes)[:, None]).sum(0) / sum(sizes)
    assert round(float(share_gap(shares)), 4) == 0.0056
    assert round(independent_chance(pooled.tolist(), sizes), 4) == 0.0052
