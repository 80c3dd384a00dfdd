"""WikiText-2 perplexity in named protocols. Without its window a perplexity means nothing, so figures carry it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from ensemble_decode.corpora.source import Source, find
from ensemble_decode.evaluation.estimate import Estimate, figures_of
from ensemble_decode.evaluation.metric import Figure, Record, System

SOURCE = Source("WikiText-2", "https://huggingface.co/datasets/Salesforce/wikitext", "CC BY-SA 3.0")
PROTOCOLS = ("paper", "huggingface")
SPLITS = ("test", "valid")
_FILES = {
    "paper": ("wikitext-2/{}.txt", "wikitext-2-v1/wiki.{}.tokens", "wiki.{}.tokens"),
    "huggingface": ("wikitext-2-raw/wiki.{}.raw", "wiki.{}.raw"),
}


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp of the mean negative log-likelihood of a token.

    "paper" (arXiv 2412.01711): text with ``<unk>``, windows of the model's length − 32, no overlap. "huggingface" (the
    guide of transformers): raw text, windows of the model's length (less what a trigger takes of it), stride 512. The first token of a window has nothing
    before it and is not counted, after a trigger neither; with a stride below the window, a token is counted once, with the longest context.

    Records are one per window: the sum of its negative log-likelihoods, and its tokens.
    """

    protocol: str = "paper"
    window: int | None = None
    stride: int | None = None
    tokens: int | None = None
    resamples: int = 2000
    #: Part of what records depend on: older windows of "huggingface" were a token shorter than the model's length.
    longest: str = "the model's length"
    generates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol is {self.protocol!r}, allowed are {', '.join(PROTOCOLS)}")
        for name in ("window", "stride", "tokens"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise ValueError(f"{name} is {value!r}, allowed is 2 or more")

    @property
    def name(self) -> str:
        return f"perplexity-{self.protocol}"

    def check(self, data: Path) -> None:
        """Find the test set."""
        _find(data, self.protocol, "test")

    def run(self, system: System, data: Path, limit: int | None = None) -> list[Record]:
        """Score every window of the test set, or the first ``limit``."""
        if system.llm.tokenizer is None:
            raise ValueError("perplexity needs a tokenizer, this model has none")
        ids = system.llm.tokenizer(read_text(data, self.protocol), add_special_tokens=False, verbose=False)["input_ids"]
        window, stride = self.lengths(system.llm.ensemble.layout.max_model_len, len(system.prefix_ids))
        spans = windows(len(ids[: self.tokens]), window, stride)[:limit]
        scores = system.score([ids[begin:end] for begin, end, _ in spans])
        records = []
        for (begin, end, counted), score in zip(spans, scores, strict=True):
            values = [value for value in score.logprobs[max(counted, begin + 1) - begin :] if value is not None]
            records.append({"begin": begin, "end": end, "nll": -math.fsum(values), "tokens": len(values)})
        return records

    def estimates(self, records: Sequence[Record]) -> dict[str, Estimate]:
        """The perplexity; a unit is a window."""
        values = np.array([(record["nll"], record["tokens"]) for record in records], dtype=np.float64)
        return {"PPL": Estimate([record["begin"] for record in records], values, lambda m: np.exp(m[:, 0] / m[:, 1]))}

    def summarise(self, records: Sequence[Record]) -> dict[str, Figure]:
        """The perplexity with its interval, and the window that it holds for."""
        longest = max(record["end"] - record["begin"] for record in records)
        return figures_of(self.estimates(records), self.resamples) | {"PPL/window": Figure(longest)}

    def lengths(self, max_model_len: int, prefix: int = 0) -> tuple[int, int]:
        """Window and stride for a model of this length. The last token is scored, not computed: it takes no position."""
        most = max_model_len + 1 - prefix
        longest = max_model_len - 32 if self.protocol == "paper" else min(max_model_len, most)
        window = longest if self.window is None else self.window
        if not 2 <= window <= most:
            raise ValueError(
                f"window is {window}, allowed is 2 … {most} (the model's length and one, less the trigger)"
            )
        stride = self.stride or (window if self.protocol == "paper" else min(512, window))
        if stride > window:
            raise ValueError(f"stride is {stride}, allowed is at most the window, {window}")
        return window, stride


def read_text(data: Path, protocol: str, split: str = "test") -> str:
    """The test set, or the validation set, as both protocols join it: blank lines between the rows of the data set."""
    # The data set's rows keep their newline, blank ones are empty.
    with _find(data, protocol, split).open(encoding="utf-8") as lines:
        return "\n\n".join(line if line.strip() else "" for line in lines)


def _find(data: Path, protocol: str, split: str) -> Path:
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, allowed are {', '.join(SPLITS)}")
    return find(SOURCE, data, *(name.format(split) for name in _FILES[protocol]))


def windows(length: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, end, first counted token) of each window over ``length`` tokens."""
    spans: list[tuple[int, int, int]] = []
    counted = 0
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        if end - max(counted, begin + 1) > 0:
            spans.append((begin, end, counted))
        counted = end
        if end == length:
            break
    return spans
