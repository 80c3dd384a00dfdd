"""Systems said in one line: ``--system "NAME: alpha=1; top_p=0.9; nucleus=target; trigger=…"``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ensemble_decode.cli.common import CommandError, parse_alpha

if TYPE_CHECKING:
    from ensemble_decode import LLM, SamplingParams
    from ensemble_decode.evaluation.metric import System

TARGET = "target"
FORM = "NAME: key=value; key=value"


@dataclass(frozen=True, slots=True)
class SystemSpec:
    """A :class:`~ensemble_decode.evaluation.metric.System` before its model is loaded."""

    name: str
    params: SamplingParams
    prefix: str = ""
    beam_width: int | None = None

    def of(self, llm: LLM) -> System:
        """The system; a pair that the model doesn't have is a ValueError."""
        from ensemble_decode.evaluation.metric import System

        try:
            self.params.check(llm.ensemble.layout)
        except ValueError as error:
            raise CommandError(f"--system {self.name!r}: {error}") from None
        return System(self.name, llm, self.params, self.prefix, self.beam_width)


def sweep(alphas: Sequence[float]) -> list[SystemSpec]:
    """All pairs at each α, sampled as arXiv 2412.01711 does; α = 0 is the target alone."""
    from ensemble_decode.evaluation.bold import paper_params

    return [SystemSpec(TARGET if alpha == 0 else f"α {alpha:g}", paper_params(alpha)) for alpha in alphas]


def parse_system(text: str) -> SystemSpec:
    """A system from ``"NAME: key=value; …"``.

    Keys are α (a number, ``pair=number,pair=number``, or ``@calibration.json``; left out: each pair's own) and how to sample; what is not named
    is as in arXiv 2412.01711 (top-p 0.9, temperature 1). ``beam_width`` searches instead of sampling. ``trigger=`` comes last: all that follows it, spaces and
    semicolons too, stands before every prompt and sentence.

    Raises
    ------
    CommandError
        One line: the system, what is wrong in it, what is allowed.

    Examples
    --------
    >>> parse_system("one pair: alpha=gender=1,race=0.5; top_p=1; min_p=0.1").params.alpha
    {'gender': 1.0, 'race': 0.5}
    """
    from ensemble_decode.evaluation.bold import paper_params

    name, colon, settings = text.partition(":")
    name = name.strip()
    if not colon or not name:
        raise CommandError(f"--system is {text!r}, allowed is {FORM!r}")
    values: dict[str, Any] = {}
    prefix = ""
    while settings.strip():
        key, equals, rest = settings.partition("=")
        key = key.strip()
        if not equals or key not in _KEYS:
            raise CommandError(
                f"--system {name!r} says {settings.strip()!r}, allowed are {', '.join(_KEYS)}, each followed by =value"
            )
        if key == "trigger":
            prefix = rest
            break
        value, _, settings = rest.partition(";")
        try:
            values[key] = _KEYS[key](value.strip())
        except ValueError:
            allowed = _ALLOWED.get(key, "a number")
            raise CommandError(f"--system {name!r}: {key} is {value.strip()!r}, allowed is {allowed}") from None
    width = values.pop("beam_width", None)
    if width is not None and values.keys() - {"alpha"}:
        raise CommandError(f"--system {name!r} says {', '.join(values)} with beam_width, allowed are alpha and trigger")
    try:
        return SystemSpec(name, replace(paper_params(), **values), prefix, width)
    except ValueError as error:
        raise CommandError(f"--system {name!r}: {error}") from None


_KEYS: dict[str, Callable[[str], Any]] = {
    "alpha": parse_alpha,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "nucleus": str,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "beam_width": int,
    "trigger": str,
}
_ALLOWED = {"alpha": "a number, pair=number,pair=number or @FILE", "top_k": "an integer", "beam_width": "an integer"}
