"""Sampling parameters of a request: vLLM's names, plus α."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from ensemble_decode.models.layout import Layout
from ensemble_decode.models.pairs import FLOAT32_MAX

_INT64 = 1 << 63
_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1
# Parameters become float32 on their way to the sampler: what would be 0 or infinite there is refused here.
_FLOAT32_TINY = 2.0**-126
#: What is not below this is rounded to 1.
_FLOAT32_BELOW_1 = 1 - 2.0**-25
#: Scores divided by less may overflow.
_LEAST_TEMPERATURE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt.

    Parameters
    ----------
    alpha : float or dict of str to float, optional
        Weight of the pairs: one number for all, or by pair name (pairs not named are off). None: each pair's own.
        α = 0 turns a pair off, and its models are then not run for this request.
    temperature : float
        0 is greedy.
    top_k, top_p, min_p : int, float, float
        Filters, in the order temperature, top-k, top-p, min-p; 0 (or −1), 1 and 0 turn them off.
    nucleus : {"combined", "target"}
        Which distribution the filters look at: the ensemble's (arXiv 2412.01711) or the target's (DExperts).
    max_tokens, min_tokens : int
        Most and fewest new tokens; no end of sequence and no stop token id before ``min_tokens``.
    n : int
        Samples of the prompt; its forward is computed once.
    seed : int, optional
        64 bits. Sample i uses ``seed + i·0x9E3779B97F4A7C15``. None: the engine draws one and reports it.
    stop, stop_token_ids, ignore_eos, include_stop_str_in_output, skip_special_tokens
        As in vLLM.
    logprobs, prompt_logprobs : int, optional
        Log-probabilities of each token and of the k best, under the ensemble at this temperature (the prompt's at
        temperature 1), with the target's own beside them.
    repetition_penalty, presence_penalty, frequency_penalty, logit_bias
        As in vLLM, applied to the combined scores.

    Raises
    ------
    ValueError
        One line: the parameter, its value, what is allowed.
    """

    alpha: float | dict[str, float] | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    nucleus: Literal["combined", "target"] = "combined"
    max_tokens: int = 16
    min_tokens: int = 0
    n: int = 1
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    #: ``stop`` as a tuple; derived.
    stops: tuple[str, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        put = object.__setattr__
        if isinstance(self.alpha, dict):
            for name, value in self.alpha.items():
                if not isinstance(name, str):
                    raise ValueError(f"alpha names the pair {name!r}, a string is allowed")
                check_number(f"alpha[{name!r}]", value)
        elif self.alpha is not None:
            check_number("alpha", self.alpha)
        if 0 < check_number("temperature", self.temperature, 0.0) < _LEAST_TEMPERATURE:
            raise ValueError(
                f"temperature is {self.temperature!r}, allowed is 0 (greedy) or {_LEAST_TEMPERATURE:g} and above"
            )
        if not _FLOAT32_TINY <= check_number("top_p", self.top_p) <= 1:
            raise ValueError(f"top_p is {self.top_p!r}, allowed is above 0, at most 1")
        if not 0 <= check_number("min_p", self.min_p) < _FLOAT32_BELOW_1:
            raise ValueError(f"min_p is {self.min_p!r}, allowed is at least 0, below 1")
        check_integer("top_k", self.top_k, -1)
        if self.nucleus not in ("combined", "target"):
            raise ValueError(f"nucleus is {self.nucleus!r}, allowed are 'combined' and 'target'")
        check_integer("max_tokens", self.max_tokens, 1)
        check_integer("min_tokens", self.min_tokens, 0)
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}, allowed is 0 … max_tokens ({self.max_tokens})")
        check_integer("n", self.n, 1, 1024)
        if self.seed is not None:
            check_integer("seed", self.seed, -_INT64, 2 * _INT64 - 1)
        stops = [self.stop] if isinstance(self.stop, str) else [] if self.stop is None else self.stop
        if not isinstance(stops, list | tuple) or not all(isinstance(s, str) and s for s in stops):
            raise ValueError(f"stop is {self.stop!r}, a string or a list of strings, none empty, is allowed")
        put(self, "stops", tuple(stops))
        for token in _listed("stop_token_ids", self.stop_token_ids):
            check_integer("stop_token_ids", token, 0)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}, allowed are True and False")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 0, 1000)
        if check_number("repetition_penalty", self.repetition_penalty) < _FLOAT32_TINY:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty!r}, allowed is above 0 (1 is off)")
        check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, dict):
                raise ValueError(f"logit_bias is {self.logit_bias!r}, a dict of token id to number is allowed")
            for token, value in self.logit_bias.items():
                check_integer("logit_bias", token, 0)
                check_number(f"logit_bias[{token}]", value)

    def check(self, layout: Layout) -> None:
        """Hold what depends on the ensemble against it: pair names and token ids."""
        if isinstance(self.alpha, dict):
            known = [pair.name for pair in layout.pairs]
            for name in self.alpha:
                if name not in known:
                    raise ValueError(
                        f"alpha names the pair {name!r}, known are {', '.join(map(repr, known)) or 'none'}"
                    )
        for name, tokens in (("logit_bias", self.logit_bias or {}), ("stop_token_ids", self.stop_token_ids or [])):
            for token in tokens:
                if token >= layout.vocab_size:
                    raise ValueError(f"{name} names the token {token}, allowed is 0 … {layout.vocab_size - 1}")

    def alphas(self, layout: Layout) -> dict[int, float]:
        """α of every pair that is on, by its index in ``layout.pairs``."""
        found = {}
        for index, pair in enumerate(layout.pairs):
            if self.alpha is None:
                value = pair.alpha
            elif isinstance(self.alpha, dict):
                value = self.alpha.get(pair.name, 0.0)
            else:
                value = self.alpha
            if value != 0:
                found[index] = float(value)
        return found

    @property
    def has_penalties(self) -> bool:
        """Whether penalties or a bias change the scores of every token."""
        return bool(
            self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty or self.logit_bias
        )

    @property
    def has_edits(self) -> bool:
        """Whether anything but α changes the scores, if only of the first tokens."""
        return self.has_penalties or self.min_tokens > 0


def sample_seed(seed: int, index: int) -> int:
    """Seed of sample ``index`` of a request, as a signed 64-bit integer (SAMPLING.md)."""
    value = (seed + index * _GOLDEN) & _MASK64
    return value - (1 << 64) if value >= _INT64 else value


def check_number(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> float:
    """Refuse what is not a finite number of float32 in these bounds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {value!r}, a number is allowed")
    if not -FLOAT32_MAX <= value <= FLOAT32_MAX or not least <= value <= most:
        bounds = (
            "a finite number (of float32)"
            if math.isinf(least) and math.isinf(most)
            else f"a finite number (of float32) from {least:g}"
        )
        raise ValueError(f"{name} is {value!r}, allowed is {bounds}" + ("" if math.isinf(most) else f" to {most:g}"))
    return value


def check_integer(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Refuse what is not an integer in these bounds."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {value!r}, an integer is allowed")
    if value < least or (most is not None and value > most):
        raise ValueError(f"{name} is {value!r}, allowed is {least} " + ("or more" if most is None else f"… {most}"))


def _listed(name: str, value: Any) -> Iterable[Any]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} is {value!r}, a list of token ids is allowed")
    return value
