"""What a metric is: it turns a system and data into records, and records into figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ensemble_decode.engine.llm import LLM
from ensemble_decode.engine.outputs import Score
from ensemble_decode.engine.params import SamplingParams

if TYPE_CHECKING:
    from ensemble_decode.evaluation.estimate import Estimate

#: One measured item: JSON values only and no corpus text, so that results can be kept, compared and published.
Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class System:
    """A model with its decoding parameters, under the name that reports give it.

    ``params`` holds α and, for generated text, how to sample; scoring takes α alone from it. ``prefix`` stands before
    every prompt with no space between (the Trigger baseline). With a ``beam_width`` text is not sampled: of ``params`` α alone
    counts, and a prompt's samples are its best beams.
    """

    name: str
    llm: LLM
    params: SamplingParams
    prefix: str = ""
    beam_width: int | None = None

    @property
    def prefix_ids(self) -> list[int]:
        """The prefix in tokens, with the beginning-of-text token where the tokenizer puts one."""
        return self._tokenizer()(self.prefix)["input_ids"] if self.prefix else []

    @property
    def start_id(self) -> int:
        """The token before a text's first where the tokenizer puts none: the beginning-of-text token, else the end-of-text token."""
        tokenizer = self._tokenizer()
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if start is None:
            raise ValueError(
                "scoring a first token needs a tokenizer with a beginning- or end-of-text token, this model has none"
            )
        return start

    def encode(self, text: str) -> list[int]:
        """A text that :meth:`score` takes: with the beginning-of-text token where the tokenizer puts one, if no prefix has it."""
        return self._tokenizer()(text, add_special_tokens=not self.prefix)["input_ids"]

    def encode_more(self, text: str) -> list[int]:
        """A text that goes on after another."""
        return self._tokenizer()(text, add_special_tokens=False)["input_ids"]

    def score(self, texts: Sequence[str] | Sequence[list[int]]) -> list[Score]:
        """Log-probabilities of texts after the prefix, whose own tokens are left out of the answer.

        Prefix and text are tokenized apart, so that a text has the same tokens with any prefix.
        """
        before = self.prefix_ids
        ids = [before + (self.encode(text) if isinstance(text, str) else text) for text in texts]
        scores = self.llm.score(ids, alpha=self.params.alpha, use_tqdm=True)
        return [_without(score, len(before)) for score in scores] if before else scores

    def _tokenizer(self) -> Any:
        if self.llm.tokenizer is None:
            raise ValueError("scoring text needs a tokenizer, this model has none")
        return self.llm.tokenizer


@dataclass(frozen=True, slots=True)
class Figure:
    """A number of a report.

    ``low`` and ``high`` bound its bootstrap confidence interval and are None where nothing can be resampled;
    ``chance`` is what a system without bias is expected to show at this sample size; ``n`` counts what was resampled.
    """

    value: float
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    n: int | None = None


class Metric(Protocol):
    """What the runner asks of a metric.

    ``run`` is the expensive half: its records are kept on disk, so a metric's settings are attributes that are fixed
    before. ``summarise`` must be a pure function of the records: the same records give the same figures.
    """

    #: Whether it reads generated text, and so depends on how a system samples; if not, on α and prefix alone.
    generates: ClassVar[bool]

    @property
    def resamples(self) -> int:
        """How often the units are resampled."""

    @property
    def name(self) -> str:
        """The name on the command line, in file names and in reports."""

    def check(self, data: Path) -> None:
        """FileNotFoundError or ValueError, in one line, if something that ``run`` needs is not there."""

    def run(self, system: System, data: Path, limit: int | None = None) -> list[Record]:
        """Measure each item, or the first ``limit``; FileNotFoundError says what is missing and where to get it."""

    def estimates(self, records: Sequence[Record]) -> Mapping[str, Estimate]:
        """The figures that rest on units, which systems are compared by."""

    def summarise(self, records: Sequence[Record]) -> dict[str, Figure]:
        """Figures by name; a part of the data is named after a slash (``"SS/gender"``)."""


def _without(score: Score, count: int) -> Score:
    """Without its first ``count`` tokens."""
    kept = slice(count, None)
    return Score(None, score.token_ids[kept], score.logprobs[kept], score.target_logprobs[kept], score.ranks[kept])
