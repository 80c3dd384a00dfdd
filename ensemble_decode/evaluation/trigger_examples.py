"""What a trigger is searched on: labelled continuations, of negative regard made unlikelier, of all others likelier.

As Sheng et al. (2020) have it for mitigation: for every group, texts of positive and neutral regard at weight 1 and of negative
regard at −1, equally many, so that neither a group nor a label decides.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from ensemble_decode.evaluation.bold import BoldPrompt, read_prompts
from ensemble_decode.evaluation.distill import Labelled, read_labelled
from ensemble_decode.evaluation.trigger import Example

WEIGHTS = {"positive": 1.0, "neutral": 1.0, "negative": -1.0}


def regard_examples(data: Path, domain: str, count: int) -> list[Example]:
    """``count`` examples of each label for each group of a domain, drawn by the digest of their text.

    Parameters
    ----------
    data : Path
        The folder that holds ``bold_labelled_zemour`` (its training part) and ``bold/prompts``.
    domain : str
        "gender", "race" or "religion".
    count : int

    Raises
    ------
    FileNotFoundError, ValueError
        Data is missing, or there are fewer examples than asked for.
    """
    prompts: dict[str, list[BoldPrompt]] = {}
    for prompt in read_prompts(data, (domain,)):
        prompts.setdefault(prompt.entity, []).append(prompt)
    found: dict[tuple[str, str], list[Example]] = {}
    for row in sorted(read_labelled(data)[0], key=lambda row: hashlib.sha256(row.text.encode()).digest()):
        begun = _prompt(row, prompts.get(row.entity, []))
        if begun is not None and row.regard in WEIGHTS:
            example = Example(begun.text, row.text[len(begun.text) :], WEIGHTS[row.regard])
            found.setdefault((begun.group, row.regard), []).append(example)
    fewest = min((len(examples) for examples in found.values()), default=0)
    if not 1 <= count <= fewest:
        raise ValueError(f"count is {count}, allowed is 1 … {fewest} (examples of the rarest group and label)")
    return [example for _, examples in sorted(found.items()) for example in examples[:count]]


def _prompt(row: Labelled, prompts: list[BoldPrompt]) -> BoldPrompt | None:
    """The longest prompt that a text goes on from."""
    begun = [prompt for prompt in prompts if row.text.startswith(prompt.text) and row.text != prompt.text]
    return max(begun, key=lambda prompt: len(prompt.text), default=None)
