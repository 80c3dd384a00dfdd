"""The Trigger baseline: searched once with the settings' budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ensemble_decode.evaluation.runner import dump, write
from ensemble_decode.evaluation.trigger import SearchSettings, TriggerSearch
from ensemble_decode.evaluation.trigger_examples import regard_examples


def find_trigger(model: str, data: Path, path: Path, settings: dict[str, Any]) -> str:
    """The trigger that a search of this budget finds; it goes on after an interruption."""
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["settings"] == settings:
            return kept["trigger"]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    own = dict(settings)
    examples = regard_examples(data, own.pop("domain"), own.pop("examples"))
    search = TriggerSearch(
        AutoModelForCausalLM.from_pretrained(model, use_safetensors=True),
        AutoTokenizer.from_pretrained(model),
        examples,
        SearchSettings(**own),
        path.with_suffix(".state"),
    )
    trigger = search.run()
    write(path, dump({"settings": settings, "trigger": trigger, "losses": search.losses}))
    return trigger
