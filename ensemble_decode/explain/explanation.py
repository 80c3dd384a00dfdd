"""What an explanation holds: plain data, and its exports."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble_decode.diagnosis import Finding, disagreeing_experts, no_shift

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, slots=True)
class TokenEffect:
    """One token at one step, under the target alone and under the ensemble.

    Probabilities and ranks (from 1) are those at the request's temperature, before top-k, top-p and min-p.
    ``contributions`` are changes of the token's log-odds log(p / (1 − p)), in nats, by pair name, and "edits" for penalties,
    bias and bans; they sum to ``log_odds``. ``kept`` says whether the filters let it through, ``target_kept`` whether
    they would have without the pairs.
    """

    token_id: int
    text: str
    target_prob: float
    prob: float
    target_rank: int
    rank: int
    log_odds: float
    contributions: dict[str, float]
    kept: bool
    target_kept: bool


@dataclass(frozen=True, slots=True)
class Step:
    """One generated token, the tokens that moved most, and how far the whole distribution moved.

    ``hellinger`` is ‖√p − √q‖₂/√2 (0 … 1), ``kl`` is KL(ensemble ‖ target) in nats; ``num_kept`` counts the tokens that passed
    the filters.
    """

    chosen: TokenEffect
    raised: list[TokenEffect]
    lowered: list[TokenEffect]
    hellinger: float
    kl: float
    num_kept: int
    num_target_kept: int


@dataclass(frozen=True, slots=True)
class Total:
    """A pair (or "edits") over all steps: the sum of its log-odds for the chosen tokens, and of their magnitudes."""

    name: str
    alpha: float | None
    log_odds: float
    absolute: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """A continuation and what every pair did to every token of it."""

    prompt: str
    text: str
    finish_reason: str
    seed: int
    temperature: float
    alphas: dict[str, float]
    steps: list[Step]
    #: By step and pair: the log-odds of the tokens that moved most, for judging whether pairs agree.
    moved: dict[str, list[float]] = field(default_factory=dict)

    @property
    def hellinger(self) -> float:
        """Mean over the steps."""
        return sum(step.hellinger for step in self.steps) / len(self.steps)

    @property
    def kl(self) -> float:
        """Mean over the steps, nats."""
        return sum(step.kl for step in self.steps) / len(self.steps)

    @property
    def totals(self) -> list[Total]:
        names: dict[str, float | None] = dict(self.alphas)
        for step in self.steps:
            for name in step.chosen.contributions:
                names.setdefault(name, None)
        found = []
        for name, alpha in names.items():
            values = [step.chosen.contributions.get(name, 0.0) for step in self.steps]
            found.append(Total(name, alpha, sum(values), sum(map(abs, values))))
        return found

    def findings(self) -> list[Finding]:
        """What a single explanation can tell of the failure signatures: no shift, and experts that disagree."""
        strength = max((abs(alpha) for alpha in self.alphas.values()), default=0.0)
        found = [no_shift(strength, self.hellinger), disagreeing_experts(self.moved)]
        return [finding for finding in found if finding is not None]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        body = asdict(self)
        del body["moved"]
        return {
            **body,
            "hellinger": self.hellinger,
            "kl": self.kl,
            "totals": [asdict(total) for total in self.totals],
            "findings": [asdict(finding) for finding in self.findings()],
        }

    def to_json(self, indent: int | None = None) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=indent, allow_nan=False)

    def to_pandas(self) -> pandas.DataFrame:
        """One row a step and token: the chosen one and those that moved most; contributions are columns of their own."""
        import pandas

        rows = []
        for number, step in enumerate(self.steps):
            for role, effects in (("chosen", [step.chosen]), ("raised", step.raised), ("lowered", step.lowered)):
                for effect in effects:
                    row = asdict(effect)
                    given = row.pop("contributions")
                    row |= {f"log_odds[{name}]": value for name, value in given.items()}
                    rows.append({"step": number, "role": role, **row, "hellinger": step.hellinger, "kl": step.kl})
        return pandas.DataFrame(rows)

    def to_html(self) -> str:
        """A page of its own: no external resources."""
        from ensemble_decode.explain.page import render

        return render(self)

    def save_html(self, path: str | Path) -> None:
        Path(path).write_text(self.to_html(), encoding="utf-8")

    def to_terminal(self, color: bool = False) -> str:
        from ensemble_decode.explain.terminal import render

        return render(self, color)

    def __str__(self) -> str:
        return self.to_terminal()
