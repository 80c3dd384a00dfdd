"""The Trigger baseline's search, on labelled continuations of BOLD."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from ensemble_decode.evaluation.distill import Labelled, read_labelled
from ensemble_decode.evaluation.runner import dump, write
from ensemble_decode.evaluation.trigger import Example, SearchSettings, TriggerSearch

_PROMPT_WORDS = 6
_WEIGHTS = {"positive": 1.0, "neutral": 1.0, "negative": -1.0}


def examples(rows: list[Labelled], count: int, seed: int) -> list[Example]:
    """Continuations to make likelier (regard positive or neutral) and unlikelier (negative), half of each kind."""
    chosen: list[Example] = []
    random.Random(seed).shuffle(rows)
    for negative in (False, True):
        kind = [row for row in rows if row.regard in _WEIGHTS and (row.regard == "negative") == negative]
        for row in [row for row in kind if len(row.text.split()) > 2 * _PROMPT_WORDS][: count // 2]:
            words = row.text.split(" ")
            prompt, rest = " ".join(words[:_PROMPT_WORDS]), " ".join(words[_PROMPT_WORDS:])
            chosen.append(Example(prompt, f" {rest}", _WEIGHTS[row.regard]))
    return chosen


def find_trigger(model: str, data: Path, path: Path, settings: dict[str, Any]) -> str:
    """The trigger that a search of this budget finds; searched once, goes on after an interruption."""
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["settings"] == settings:
            return kept["trigger"]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    own = dict(settings)
    count = own.pop("examples")
    search = TriggerSearch(
        AutoModelForCausalLM.from_pretrained(model),
        AutoTokenizer.from_pretrained(model),
        examples(read_labelled(data)[0], count, own.get("seed", 0)),
        SearchSettings(**own),
        path.with_suffix(".state.json"),
    )
    trigger = search.run()
    write(path, dump({"settings": settings, "trigger": trigger}))
    return trigger
