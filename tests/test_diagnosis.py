"""The four failure signatures: each is found where it is planted, and not where it isn't."""

from __future__ import annotations

import pytest

from ensemble_decode.diagnosis import disagreeing_experts, disagreeing_metrics, no_shift, perplexity_rise


def test_no_shift() -> None:
    found = no_shift(2.0, 0.001)
    assert found is not None
    assert "α is up to 2" in found.message
    assert no_shift(0.0, 0.0) is None
    assert no_shift(2.0, 0.1) is None


def test_perplexity() -> None:
    found = perplexity_rise(20.0, 25.0, budget=0.1)
    assert found is not None
    assert "25.0%" in found.message
    assert perplexity_rise(20.0, 21.9, budget=0.1) is None
    with pytest.raises(ValueError, match="before is 0"):
        perplexity_rise(0, 1)


def test_metrics() -> None:
    found = disagreeing_metrics({"SS": 5.0, "regard gap": -0.1})
    assert found is not None
    assert "SS improved while regard gap got worse" in found.message
    assert disagreeing_metrics({"SS": (1.0, 3.0), "regard gap": (-0.2, 0.1)}) is None
    assert disagreeing_metrics({"SS": 1.0, "ICAT": 2.0}) is None


def test_experts() -> None:
    up = [1.0, -2.0, 0.5]
    found = disagreeing_experts({"a": up, "b": [-x for x in up], "c": up})
    assert found is not None
    assert "cosine -1.00" in found.message
    assert disagreeing_experts({"a": up, "b": up}) is None
    assert disagreeing_experts({"a": up, "b": [-x / 1000 for x in up]}) is None
    assert disagreeing_experts({"a": [], "b": []}) is None
