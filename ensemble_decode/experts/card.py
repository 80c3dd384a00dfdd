"""What a pair's folder says about itself: its model card and its training curve. Never a line of its data."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble_decode.experts.texts import PairTexts

if TYPE_CHECKING:
    from ensemble_decode.experts.training import TrainingSettings


def digest(texts: PairTexts) -> str:
    """SHA-256 of both sides' texts, so that a resumed run, or a later one, is known to read the same."""
    return hashlib.sha256(json.dumps([texts.expert, texts.anti_expert]).encode()).hexdigest()


def draw_curves(results: dict[str, Any], path: Path) -> None:
    """Training loss and validation NLL of both sides against the step."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the training curve needs matplotlib: pip install 'ensemble_decode[train]'") from None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="nats a token")
    for (side, result), colour in zip(results.items(), ("tab:blue", "tab:orange"), strict=True):
        label = side.replace("_", "-")
        for key, style, name in (("loss", ":", "training"), ("eval_nll", "-", "validation")):
            points = [(h["step"], h[key]) for h in result["history"] if key in h]
            if key == "eval_nll":
                points.insert(0, (0, result["nll_before"]))
            axes.plot(*zip(*points, strict=True) if points else ([], []), style, color=colour, label=f"{label}, {name}")
        axes.plot(result["best_step"], result["nll_after"], "o", color=colour)
    axes.legend()
    figure.savefig(path, format="png", dpi=120)


def write_card(path: Path, base: str, texts: PairTexts, settings: TrainingSettings, results: dict[str, Any]) -> None:
    """The README of a pair."""
    kind = f"LoRA adapters (rank {settings.rank})" if settings.rank else "full models"
    rows = "\n".join(
        f"| {side.replace('_', '-')} | {r['train_texts']} | {r['validation_texts']} | {r['steps']} | {r['best_step']} | "
        f"{r['nll_before']:.3f} | {r['nll_after']:.3f} |"
        for side, r in results.items()
    )
    unfit = f" Not to be evaluated on {' or '.join(texts.unfit)}, which it has read." if texts.unfit else ""
    path.write_text(
        f"""# Expert pair{f": {texts.axis}" if texts.axis else ""}

Two {kind} over `{base}`, trained by `ensemble-decode train`. The ensemble samples from softmax(z + α(z⁺ − z⁻)): towards the
expert's text, away from the anti-expert's. The anti-expert has learned text that may be offensive: it is a part of this
formula, not a model to talk to. How far the pair reduces a bias is not known from these figures; measure it.

It is for steering a model of the same vocabulary{f", on the axis {texts.axis}," if texts.axis else ""} towards the kind of text that its expert learned, away from the
anti-expert's. Both were trained on texts of at most {settings.max_length} tokens from the data named below; on longer texts and other subjects
it is untried, and it is no guarantee that sampled text is free of bias.

* Data: {texts.name}. Licence of the data: {texts.licence}. SHA-256 of the texts: `{digest(texts)}`.{unfit}
* The licence of the base model applies to the weights.
* Suggested α: {settings.alpha:g} (not calibrated). Seed {settings.seed}, {settings.batch_size} texts a step, learning rate {settings.learning_rate:g}.

| side | texts | validating | steps | kept step | validation NLL before | after |
|---|---|---|---|---|---|---|
{rows}

NLL: nats a token after each text's first, on texts that neither side trained on. The kept step has the lowest.

![training curve](curve.png)

    ensemble-decode generate "A prompt" --model {base} --pair {texts.axis or "name"}={path.parent.name}
""",
        encoding="utf-8",
    )
