"""Four signs that steering fails, found in figures and said in words.

Each function takes figures, from an explanation or an evaluation, and returns a :class:`Finding` or None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations


@dataclass(frozen=True, slots=True)
class Finding:
    """A failure signature that was met: its name, and what was seen and what to try, in words."""

    signature: str
    message: str


def no_shift(alpha: float, hellinger: float, least: float = 0.02) -> Finding | None:
    """α is on, and yet the distributions hardly move: the mean Hellinger distance is below ``least``."""
    if alpha == 0 or hellinger >= least:
        return None
    return Finding(
        "no shift",
        f"α is up to {alpha:g}, but the mean Hellinger distance from the target alone is {hellinger:.4f} (below {least:g}). "
        "The expert and the anti-expert may be too alike, or know nothing of this text: check the pair's training, "
        "or raise α.",
    )


def perplexity_rise(before: float, after: float, budget: float = 0.1) -> Finding | None:
    """Perplexity rises by more than the share ``budget``."""
    for name, value in (("before", before), ("after", after)):
        if not value > 0:
            raise ValueError(f"{name} is {value!r}, allowed is above 0")
    rise = after / before - 1
    if rise <= budget:
        return None
    return Finding(
        "perplexity",
        f"Perplexity rises from {before:.2f} to {after:.2f}, by {rise:.1%}: more than the budget of {budget:.1%}. "
        "A smaller α, or a filter on the target's own nucleus, costs less fluency.",
    )


def disagreeing_metrics(improvements: Mapping[str, float | tuple[float, float]]) -> Finding | None:
    """Some metrics get better and others worse.

    Parameters
    ----------
    improvements : mapping of str to float, or to (low, high)
        Positive is better. Of an interval, both ends must have one sign: what chance explains is no disagreement.
    """
    better, worse = [], []
    for name, value in improvements.items():
        low, high = value if isinstance(value, tuple) else (value, value)
        if low > 0:
            better.append(name)
        elif high < 0:
            worse.append(name)
    if not better or not worse:
        return None
    return Finding(
        "metrics disagree",
        f"{', '.join(better)} improved while {', '.join(worse)} got worse. They measure different things: "
        "no single one of them shows that the text is fairer; read samples before you choose.",
    )


def disagreeing_experts(contributions: Mapping[str, Sequence[float]], least: float = 0.05) -> Finding | None:
    """Two pairs pull the same tokens in opposite directions: the cosine of their contributions is below −0.3.

    Parameters
    ----------
    contributions : mapping of str to list of float
        By pair, on the same tokens. A pair whose root mean square is below ``least`` has no say.
    """
    size = {name: math.sqrt(math.fsum(x * x for x in values)) for name, values in contributions.items()}
    worst: tuple[float, str, str] | None = None
    for a, b in combinations(contributions, 2):
        count = len(contributions[a])
        if count == 0 or min(size[a], size[b]) < least * math.sqrt(count):
            continue
        cosine = math.fsum(x * y for x, y in zip(contributions[a], contributions[b], strict=True)) / (size[a] * size[b])
        if cosine < -0.3 and (worst is None or cosine < worst[0]):
            worst = (cosine, a, b)
    if worst is None:
        return None
    cosine, a, b = worst
    return Finding(
        "experts disagree",
        f"{a!r} and {b!r} pull the same tokens in opposite directions (cosine {cosine:.2f}): they partly undo each other. "
        "Steer with one of them, or give each its own α.",
    )
