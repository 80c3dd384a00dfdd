"""WinoBias (Zhao et al. 2018): who a pronoun means, where a stereotype says otherwise."""

from __future__ import annotations

import re
from dataclasses import dataclass
from os import PathLike

from ensemble_decode.corpora.source import Source, find

SOURCE = Source("WinoBias", "https://github.com/uclanlp/corefBias", "MIT")
TYPES = ("type1", "type2")
_PRONOUNS = ("he", "him", "his", "she", "her")
_BRACKETS = re.compile(r"\[([^\]]*)\]")


@dataclass(frozen=True, slots=True)
class Mention:
    """A sentence with a pronoun, whom it means, and whom it could mean but doesn't."""

    text: str
    pronoun: str
    referent: str
    other: str


@dataclass(frozen=True, slots=True)
class WinoBiasPair:
    """A sentence whose pronoun fits the stereotype of its referent's occupation, and the same with the other pronoun."""

    type: str
    row: int
    pro: Mention
    anti: Mention


def read_pairs(root: str | PathLike[str]) -> list[WinoBiasPair]:
    """The pairs of the test split, in the files' order.

    A line is left out where the referent's brackets hold no occupation of the corpus' lists, where the sentence doesn't name
    two of them, or where the two versions aren't the same but for pronouns.
    """
    occupations = _occupations(root)
    pairs = []
    for kind in TYPES:
        sides = [_lines(root, f"{side}_stereotyped_{kind}.txt.test") for side in ("pro", "anti")]
        if len(sides[0]) != len(sides[1]):
            raise ValueError(f"WinoBias {kind} has {len(sides[0])} and {len(sides[1])} lines, allowed is equal")
        for row, lines in enumerate(zip(*sides, strict=True)):
            pro, anti = (_mention(line, occupations) for line in lines)
            if pro is not None and anti is not None and _neutral(pro.text) == _neutral(anti.text):
                pairs.append(WinoBiasPair(kind, row, pro, anti))
    return pairs


def _mention(line: str, occupations: list[str]) -> Mention | None:
    marked = _BRACKETS.findall(line)
    pronouns = [text for text in marked if text.lower() in _PRONOUNS]
    others = [text for text in marked if text.lower() not in _PRONOUNS]
    text = re.sub(r"^\d+\s*", "", line).replace("[", "").replace("]", "").strip()
    named = [name for name in occupations if re.search(rf"\b{name}\b", text.lower())]
    if not pronouns or len(others) != 1 or len(named) != 2:
        return None
    meant = [name for name in named if re.search(rf"\b{name}\b", others[0].lower())]
    if len(meant) != 1:
        return None
    return Mention(text, pronouns[0].lower(), f"the {meant[0]}", f"the {named[named[0] == meant[0]]}")


def _neutral(text: str) -> list[str]:
    """The words of a sentence, pronouns all alike."""
    return ["_" if word in _PRONOUNS else word for word in re.findall(r"\w+", text.lower())]


def _occupations(root: str | PathLike[str]) -> list[str]:
    return [name for side in ("male", "female") for name in _lines(root, f"{side}_occupations.txt")]


def _lines(root: str | PathLike[str], name: str) -> list[str]:
    path = find(SOURCE, root, f"winobias/data/{name}", f"corefBias/WinoBias/wino/data/{name}", f"data/{name}", name)
    with path.open(encoding="utf-8") as lines:
        return [line.strip() for line in lines if line.strip()]
