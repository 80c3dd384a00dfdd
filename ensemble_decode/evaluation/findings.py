"""What a system's figures say against the baseline's, in words: fluency beyond its budget, and metrics that disagree."""

from __future__ import annotations

from collections.abc import Callable

from ensemble_decode.diagnosis import Finding, disagreeing_metrics, perplexity_rise
from ensemble_decode.evaluation.bold import DOMAINS, MORE_DOMAINS
from ensemble_decode.evaluation.comparison import Comparison, Comparisons, is_significant
from ensemble_decode.evaluation.local_bias import SUBJECTS
from ensemble_decode.evaluation.metric import Figure
from ensemble_decode.evaluation.runner import Results

#: Takes the baseline's figure and the difference from it; returns bounds of the improvement, None where nothing bounds them.
Improvement = Callable[[Figure, Comparison], tuple[float, float] | None]


def _more(before: Figure, test: Comparison) -> tuple[float, float]:
    return test.low, test.high


def _less(before: Figure, test: Comparison) -> tuple[float, float]:
    return -test.high, -test.low


def _nearer(before: Figure, test: Comparison) -> tuple[float, float] | None:
    """How much nearer to what chance gives, wherever in their intervals the baseline's figure and the difference lie.

    With a difference of one sign, all improve or all get worse if the corners do.
    """
    if before.low is None or before.high is None or before.chance is None:
        return None
    off = before.low - before.chance, before.high - before.chance
    moves = [abs(x) - abs(x + difference) for x in off for difference in (test.low, test.high)]
    return min(moves), max(moves)


#: metric → figures of bias, and when they are better: headlines, not their parts by domain where there is a whole.
_BETTER: dict[str, dict[str, Improvement]] = {
    "stereoset": {"SS": _nearer, "ICAT": _more},
    "stereoset-intersentence": {"SS": _nearer, "ICAT": _more},
    "crows_pairs": {"CrowS": _nearer},
    "winobias": {"preference": _nearer, "gap": _nearer},
    "winogender": {"agreement": _more, "gap": _nearer, "correlation": _nearer},
    "local_bias": {f"hellinger/{domain}": _less for domain in SUBJECTS},
    "regard": {f"gap/{domain}": _less for domain in DOMAINS | MORE_DOMAINS},
    "toxicity": {f"gap/{domain}": _less for domain in DOMAINS | MORE_DOMAINS},
}


def find(results: Results, comparisons: Comparisons, baseline: str) -> dict[str, list[Finding]]:
    """What was found of every system but the baseline; systems of which nothing was found are left out.

    A figure counts as better or worse where its difference is significant.
    """
    reference = results.get(baseline, {})
    found: dict[str, list[Finding]] = {}
    for system, metrics in results.items():
        if system == baseline:
            continue
        findings = [
            perplexity_rise(reference[name]["PPL"].value, figures["PPL"].value)
            for name, figures in metrics.items()
            if "PPL" in figures and "PPL" in reference.get(name, {})
        ]
        improvements = {
            f"{metric} {name}": bounds
            for metric, tests in comparisons.get(system, {}).items()
            for name, improvement in _BETTER.get(metric, {}).items()
            if is_significant(test := tests.get(name))
            and (bounds := improvement(reference[metric][name], test)) is not None
        }
        findings.append(disagreeing_metrics(improvements))
        if kept := [finding for finding in findings if finding is not None]:
            found[system] = kept
    return found
