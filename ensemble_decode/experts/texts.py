"""The two texts of a pair: reading them, and a validation split that keeps a sentence and its counterfactual together."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from ensemble_decode.corpora import redditbias, stereoset
from ensemble_decode.corpora.source import SentencePair

_READINGS = re.compile(r"\{([^{}|]*)\|([^{}|]*)\}")


@dataclass(frozen=True, slots=True)
class PairTexts:
    """What the expert and the anti-expert read. Of equal lengths, line i of one belongs to line i of the other.

    ``unfit`` names the corpora that a pair trained on these texts can't be evaluated on.
    """

    expert: list[str]
    anti_expert: list[str]
    name: str
    licence: str
    axis: str | None = None
    unfit: tuple[str, ...] = ()
    sides: dict[str, list[str]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sides", {"expert": self.expert, "anti_expert": self.anti_expert})
        for side, texts in self.sides.items():
            if len(texts) < 2:
                raise ValueError(f"{self.name}: {side} has {len(texts)} texts, at least 2 are needed")


def from_redditbias(root: str | PathLike[str], axis: str, swap: str = "targets") -> PairTexts:
    """Expert: counterfactuals; anti-expert: the biased originals.

    ``swap`` is one of the corpus' ``SWAPS``, or "both": every original then has two counterfactuals.
    """
    swaps = redditbias.SWAPS if swap == "both" else (swap,)
    pairs = [pair for name in swaps for pair in redditbias.read_training_pairs(root, axis, name)]
    name = f"RedditBias, {axis}, counterfactuals by {' and '.join(swaps)}"
    return _texts(pairs, name, redditbias.SOURCE.licence, axis)


def from_stereoset(root: str | PathLike[str], domain: str) -> PairTexts:
    """Expert: anti-stereotypes; anti-expert: stereotypes. Not to be evaluated on StereoSet."""
    pairs, source = stereoset.read_training_pairs(root, domain), stereoset.SOURCE
    return _texts(pairs, f"StereoSet, intrasentence, {domain}", source.licence, domain, (source.name,))


def from_files(expert: str | PathLike[str], anti_expert: str | PathLike[str], licence: str = "not stated") -> PairTexts:
    """Two files: a text a line, or JSON lines with ``"text"`` (``.jsonl``). Names of the files only, no paths, are kept."""
    names = f"{Path(expert).name} and {Path(anti_expert).name}"
    return PairTexts(_read(Path(expert)), _read(Path(anti_expert)), names, licence)


def from_readings(path: str | PathLike[str], axis: str, licence: str = "not stated") -> PairTexts:
    """Lines of two readings, ``The nurse said that {she|he} …``: the anti-expert's left, the expert's right.

    The format of ``ensemble_decode/data/gender``; lines that begin with # are headings.
    """
    lines = [line for line in _read(Path(path)) if not line.startswith("#")]
    expert, anti_expert = ([_READINGS.sub(side, line) for line in lines] for side in (r"\2", r"\1"))
    return PairTexts(expert, anti_expert, f"{Path(path).name}, two readings a line", licence, axis)


def part(texts: PairTexts, share: float, seed: int = 0) -> PairTexts:
    """A random share of the lines, a line of one side with its counterpart; shares of one seed lie in one another."""
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}, allowed is above 0 and at most 1")
    if len(texts.expert) != len(texts.anti_expert):
        raise ValueError(
            f"{texts.name}: {len(texts.expert)} and {len(texts.anti_expert)} texts, equal numbers are needed"
        )
    order = list(range(len(texts.expert)))
    random.Random(seed).shuffle(order)
    kept = sorted(order[: max(2, round(share * len(order)))])
    name = texts.name if share == 1 else f"{texts.name}; {share:.0%} of the lines"
    expert, anti_expert = ([side[i] for i in kept] for side in (texts.expert, texts.anti_expert))
    return PairTexts(expert, anti_expert, name, texts.licence, texts.axis, texts.unfit)


def joined(parts: Sequence[PairTexts]) -> PairTexts:
    """Several sources of one axis as the texts of one pair, one after another.

    Raises
    ------
    ValueError
        Different axes, or a part whose sides have different lengths: which lines belong together would be lost.
    """
    if len(parts) == 1:
        return parts[0]
    axes = dict.fromkeys(part.axis for part in parts if part.axis is not None)
    if len(axes) > 1:
        raise ValueError(f"axes are {', '.join(axes)}, the sources of one pair have one axis")
    for part in parts:
        if len(part.expert) != len(part.anti_expert):
            sizes = f"{len(part.expert)} and {len(part.anti_expert)} texts"
            raise ValueError(f"{part.name}: {sizes}, beside another source both sides need as many")
    return PairTexts(
        [text for part in parts for text in part.expert],
        [text for part in parts for text in part.anti_expert],
        "; ".join(part.name for part in parts),
        "; ".join(dict.fromkeys(part.licence for part in parts)),
        next(iter(axes), None),
        tuple(dict.fromkeys(name for part in parts for name in part.unfit)),
    )


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


def _texts(pairs: Sequence[SentencePair], name: str, licence: str, axis: str, unfit: tuple[str, ...] = ()) -> PairTexts:
    return PairTexts([p.expert for p in pairs], [p.anti_expert for p in pairs], name, licence, axis, unfit)


def _read(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} is not a file; a text or .jsonl file of texts is needed")
    try:
        # splitlines() would also split at U+0085 and U+2028, which a text may hold.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
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
