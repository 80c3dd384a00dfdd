"""An explanation in a terminal: coloured words and a table; plain where colour is not wanted."""

from __future__ import annotations

from ensemble_decode.explain.explanation import Explanation

_RESET, _BOLD, _DIM = "\x1b[0m", "\x1b[1m", "\x1b[2m"
_RAISED, _LOWERED = (79, 43, 37), (215, 172, 130)  # xterm's 256 colours, strong to weak and weak to strong


def render(explanation: Explanation, color: bool = False) -> str:
    """The text with its words coloured by how far they were moved, then one line a token, totals and findings."""

    def paint(text: str, code: str) -> str:
        return f"{code}{text}{_RESET}" if color and code else text

    words = "".join(paint(step.chosen.text, _shade(step.chosen.log_odds)) for step in explanation.steps)
    names = [total.name for total in explanation.totals]
    lines = [paint(explanation.prompt, _DIM) + words, ""]
    width = max([len(_label(step.chosen.text)) for step in explanation.steps] + [5])
    head = f"{'token':<{width}}  {'target':>7} {'steered':>7}  {'rank':>11}  {'log-odds':>8}  "
    head += "  ".join(f"{name:>8}" for name in names) + f"  {'Hellinger':>9}"
    lines.append(paint(head, _BOLD))
    for step in explanation.steps:
        token = step.chosen
        rank = f"{token.target_rank} → {token.rank}"
        lines.append(
            paint(f"{_label(token.text):<{width}}", _shade(token.log_odds))
            + f"  {token.target_prob:>7.2%} {token.prob:>7.2%}  {rank:>11}  {token.log_odds:>+8.2f}  "
            + "  ".join(f"{token.contributions.get(n, 0.0):>+{max(8, len(n))}.2f}" for n in names)
            + f"  {step.hellinger:>9.3f}"
            + ("" if token.target_kept else "  outside the target's own nucleus")
        )
    lines += ["", f"mean Hellinger {explanation.hellinger:.3f} · mean KL {explanation.kl:.3f} nats"]
    for total in explanation.totals:
        alpha = "" if total.alpha is None else f" (α = {total.alpha:g})"
        lines.append(f"{total.name}{alpha}: {total.log_odds:+.2f} log-odds in all, {total.absolute:.2f} in magnitude")
    if not explanation.alphas:
        lines.append("no pair is on: this is the target's own text")
    for finding in explanation.findings():
        lines.append(paint(f"{finding.signature}: ", _BOLD) + finding.message)
    return "\n".join(lines)


def _shade(log_odds: float) -> str:
    size = abs(log_odds)
    if size < 0.25:
        return ""
    level = 0 if size >= 2 else 1 if size >= 1 else 2
    code = _RAISED[level] if log_odds > 0 else _LOWERED[2 - level]
    return f"\x1b[1;38;5;{code}m"


def _label(text: str) -> str:
    return "".join(c if c.isprintable() else "␤" if c == "\n" else "·" for c in text.removeprefix(" ")) or "·"
