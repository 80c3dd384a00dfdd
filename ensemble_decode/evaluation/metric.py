"""What a metric is: it turns a system and data into records, and records into figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ensemble_decode.engine.llm import LLM
from ensemble_decode.engine.params import SamplingParams

#: One measured item: JSON values only and no corpus text, so that results can be kept, compared and published.
Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class System:
    """A model with its decoding parameters, under the name that reports give it.

    ``params`` holds α and, for generated text, how to sample; scoring takes α alone from it. ``prefix`` stands before
    every prompt with no space between (the Trigger baseline).
    """

    name: str
    llm: LLM
    params: SamplingParams
    prefix: str = ""


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

    @property
    def name(self) -> str:
        """The name on the command line, in file names and in reports."""

    def run(self, system: System, data: Path, limit: int | None = None) -> list[Record]:
        """Measure each item, or the first ``limit``; FileNotFoundError says what is missing and where to get it."""

    def summarise(self, records: Sequence[Record]) -> dict[str, Figure]:
        """Figures by name; a part of the data is named after a slash (``"SS/gender"``)."""
