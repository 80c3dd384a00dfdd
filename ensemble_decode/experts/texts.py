"""The two texts of a pair: reading them, and a validation split that keeps a sentence and its counterfactual together."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from ensemble_decode.corpora import redditbias, stereoset
from ensemble_decode.corpora.source import SentencePair


@dataclass(frozen=True, slots=True)
class PairTexts:
    """What the expert and the anti-expert read. Of equal lengths, line i of one belongs to line i of the other."""

    expert: list[str]
    anti_expert: list[str]
    name: str
    licence: str
    axis: str | None = None
    sides: dict[str, list[str]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sides", {"expert": self.expert, "anti_expert": self.anti_expert})
        for side, texts in self.sides.items():
            if len(texts) < 2:
                raise ValueError(f"{self.name}: {side} has {len(texts)} texts, at least 2 are needed")


def from_redditbias(root: str | PathLike[str], axis: str, swap: str = "targets") -> PairTexts:
    """Expert: counterfactuals; anti-expert: the biased originals."""
    pairs = redditbias.read_training_pairs(root, axis, swap)
    return _texts(pairs, f"RedditBias, {axis}, counterfactuals by {swap}", redditbias.SOURCE.licence, axis)


def from_stereoset(root: str | PathLike[str], domain: str) -> PairTexts:
    """Expert: anti-stereotypes; anti-expert: stereotypes. Not to be evaluated on StereoSet."""
    pairs = stereoset.read_training_pairs(root, domain)
    return _texts(pairs, f"StereoSet, intrasentence, {domain}", stereoset.SOURCE.licence, domain)


def from_files(expert: str | PathLike[str], anti_expert: str | PathLike[str], licence: str = "not stated") -> PairTexts:
    """Two files: a text a line, or JSON lines with ``"text"`` (``.jsonl``). Names of the files only, no paths, are kept."""
    names = f"{Path(expert).name} and {Path(anti_expert).name}"
    return PairTexts(_read(Path(expert)), _read(Path(anti_expert)), names, licence)


def split(texts: PairTexts, share: float, seed: int) -> dict[str, tuple[list[str], list[str]]]:
    """Training and validation texts of each side.

    Texts that occur twice, and a sentence and its counterfactual, fall on the same side of the split.

    Parameters
    ----------
    share : float
        About this part of the texts validates, in (0, 0.5].
    """
    if not 0 < share <= 0.5:
        raise ValueError(f"validation share is {share}, allowed is above 0 and at most 0.5")
    parent: dict[str, str] = {}

    def root(text: str) -> str:
        parent.setdefault(text, text)
        while parent[text] != text:
            parent[text] = parent[parent[text]]
            text = parent[text]
        return text

    for text in texts.expert + texts.anti_expert:
        root(text)
    if len(texts.expert) == len(texts.anti_expert):
        for one, other in zip(texts.expert, texts.anti_expert, strict=True):
            parent[root(one)] = root(other)
    groups = list(dict.fromkeys(root(text) for text in texts.anti_expert + texts.expert))
    random.Random(seed).shuffle(groups)
    size = dict.fromkeys(groups, 0)
    for text in texts.expert + texts.anti_expert:
        size[root(text)] += 1
    wanted = share * sum(size.values())
    held: set[str] = set()
    total = 0
    for group in groups:
        if total and total + size[group] > wanted:
            continue
        held.add(group)
        total += size[group]
    parts = {}
    for side, lines in texts.sides.items():
        validation = [line for line in lines if root(line) in held]
        train = [line for line in lines if root(line) not in held]
        if not train or not validation:
            raise ValueError(
                f"{texts.name}: {side} has {len(train)} texts to train and {len(validation)} to validate, at least 1 of "
                "each is needed (more distinct texts, or another seed or validation share)"
            )
        parts[side] = (train, validation)
    return parts


def _texts(pairs: Sequence[SentencePair], name: str, licence: str, axis: str) -> PairTexts:
    return PairTexts([p.expert for p in pairs], [p.anti_expert for p in pairs], name, licence, axis)


def _read(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} is not a file; a text or .jsonl file of texts is needed")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}") from None
    if path.suffix != ".jsonl":
        return [line.strip() for line in lines if line.strip()]
    texts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f'{path} line {number} is no object with a "text", one JSON object a line is needed')
        texts.append(text.strip())
    return texts
