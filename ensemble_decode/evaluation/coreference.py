"""Whom a causal language model takes a pronoun to mean: by how it goes on after ``"he" refers to``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ensemble_decode.corpora.winobias import Mention
from ensemble_decode.evaluation.metric import System


@dataclass(frozen=True, slots=True)
class Reading:
    """What a system makes of a mention.

    ``logprob`` is the sentence's; ``margin`` is log p(referent) − log p(other) after the sentence and ``"pronoun" refers
    to``, so that the pronoun is understood where it is above 0.
    """

    logprob: float
    margin: float


def read_mentions(system: System, mentions: Sequence[Mention]) -> list[Reading]:
    """The readings of all mentions, scored together: two texts each, of which one gives the sentence too."""
    texts: list[list[int]] = []
    lengths: list[tuple[int, int]] = []
    for mention in mentions:
        sentence = system.encode(mention.text)
        question = system.encode_more(f' "{mention.pronoun.capitalize()}" refers to')
        for person in (mention.referent, mention.other):
            texts.append(sentence + question + system.encode_more(f" {person}"))
        lengths.append((len(sentence), len(sentence) + len(question)))
    scores = [score.logprobs for score in system.score(texts)]
    return [
        Reading(_sum(referent[:sentence]), _sum(referent[asked:]) - _sum(other[asked:]))
        for (sentence, asked), referent, other in zip(lengths, scores[::2], scores[1::2], strict=True)
    ]


def _sum(logprobs: Sequence[float | None]) -> float:
    return math.fsum(value for value in logprobs if value is not None)
