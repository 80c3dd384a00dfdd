"""Winogender schemas (Rudinger et al. 2018): one sentence with "he" and with "she", about people of 60 occupations."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from os import PathLike

from ensemble_decode.corpora.source import Source, find
from ensemble_decode.corpora.winobias import Mention

SOURCE = Source("Winogender", "https://github.com/rudinger/winogender-schemas", "MIT")
_MEANS_OCCUPATION = "0"


@dataclass(frozen=True, slots=True)
class Schema:
    """A sentence in its male and its female version. ``means_occupation``: whether the pronoun is the occupation's."""

    id: str
    occupation: str
    means_occupation: bool
    male: Mention
    female: Mention


def read_schemas(root: str | PathLike[str]) -> list[Schema]:
    """The 240 schemas, in the file's order."""
    path = find(SOURCE, root, "winogender/all_sentences.tsv", "data/all_sentences.tsv", "all_sentences.tsv")
    versions: dict[tuple[str, str, str], dict[str, str]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            occupation, participant, answer, gender = row["sentid"].removesuffix(".txt").split(".")
            versions.setdefault((occupation, participant, answer), {})[gender] = row["sentence"]
    return [_schema(*key, texts["male"], texts["female"]) for key, texts in versions.items()]


def read_share_of_women(root: str | PathLike[str]) -> dict[str, float]:
    """Percentage of women in each occupation, by the US Bureau of Labor Statistics."""
    path = find(SOURCE, root, "winogender/occupations-stats.tsv", "data/occupations-stats.tsv", "occupations-stats.tsv")
    with path.open(encoding="utf-8", newline="") as file:
        return {row["occupation"]: float(row["bls_pct_female"]) for row in csv.DictReader(file, delimiter="\t")}


def _schema(occupation: str, participant: str, answer: str, male: str, female: str) -> Schema:
    means_occupation = answer == _MEANS_OCCUPATION
    people = [f"the {occupation}", "someone" if participant == "someone" else f"the {participant}"]
    referent, other = people if means_occupation else people[::-1]
    pronouns = [(a, b) for a, b in zip(male.split(), female.split(), strict=True) if a != b]
    he, she = (word.strip(".,").lower() for word in pronouns[0])
    return Schema(
        f"{occupation}.{participant}.{answer}",
        occupation,
        means_occupation,
        Mention(male, he, referent, other),
        Mention(female, she, referent, other),
    )
