"""The Trigger baseline: searched once with the settings' budget."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ensemble_decode.evaluation.runner import dump, fingerprint, write
from ensemble_decode.evaluation.trigger import SearchSettings, TriggerSearch
from ensemble_decode.evaluation.trigger_examples import regard_examples


def find_trigger(model: str, data: Path, path: Path, settings: dict[str, Any]) -> str:
    """The trigger that a search of this budget finds; it goes on after an interruption."""
    own = dict(settings)
    examples = regard_examples(data, own.pop("domain"), own.pop("examples"))
    lines = json.dumps([asdict(example) for example in examples])
    of = {"settings": settings, "examples": hashlib.sha256(lines.encode()).hexdigest(), "model": fingerprint(model)}
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if kept.get("of") == of:
        return kept["trigger"]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    state = path.with_suffix(".state")
    search = TriggerSearch(
        AutoModelForCausalLM.from_pretrained(model, use_safetensors=True),
        AutoTokenizer.from_pretrained(model),
        examples,
        SearchSettings(**own),
        state,
    )
    trigger = search.run()
    write(path, dump({"of": of, "trigger": trigger, "losses": search.losses}))
    state.unlink()  # so that a search of something else can begin
    return trigger
