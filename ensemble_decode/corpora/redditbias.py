"""RedditBias (Barikeri et al. 2021): biased comments and their counterfactuals. The text is offensive: never print it."""

from __future__ import annotations

import csv
from os import PathLike
from pathlib import Path

from ensemble_decode.corpora.source import SentencePair, Source, find

SOURCE = Source("RedditBias", "https://github.com/umanlp/RedditBias", "MIT")

#: Axis → bias types of the corpus and, for each, the minority and the majority of its test pairs.
AXES: dict[str, dict[str, tuple[str, str]]] = {
    "gender": {"gender": ("female", "male")},
    "race": {"race": ("black", "white")},
    "religion": {"religion1": ("jews", "christians"), "religion2": ("muslims", "christians")},
    "orientation": {"orientation": ("lgbtq", "straight")},
}
SWAPS = ("targets", "attr")
SPLITS = ("test", "valid")


def read_training_pairs(root: str | PathLike[str], axis: str, swap: str = "targets") -> list[SentencePair]:
    """Biased sentences (anti-expert) and their counterfactuals (expert).

    Parameters
    ----------
    root : path
        The upstream repository, or a folder that has it as ``redditbias``.
    axis : str
        One of :data:`AXES`, or one of its bias types (``"religion1"``).
    swap : {"targets", "attr"}
        What the counterfactual changes: the group (counterfactual data augmentation) or what is said of it.

    Notes
    -----
    The first n lines of a ``*_swapped_*`` file are the originals, the last n their counterfactuals in the same order.
    Literal ``<bos>`` and ``<eos>`` are taken off; pairs whose readings are equal teach nothing and are left out.
    """
    if swap not in SWAPS:
        raise ValueError(f"swap is {swap!r}, allowed are {', '.join(SWAPS)}")
    pairs = []
    for bias in bias_types(axis):
        path = _find(root, f"text_files/{bias}/{bias}_bias_manual_swapped_{swap}_train.txt")
        lines = [clean(line) for line in read_text(path).split("\n")]
        while lines and not lines[-1]:
            lines.pop()
        if not lines or len(lines) % 2:
            raise ValueError(f"{path} has {len(lines)} lines, allowed is an even number: originals, counterfactuals")
        half = len(lines) // 2
        both = zip(lines[:half], lines[half:], strict=True)
        pairs += [SentencePair(counter, biased) for biased, counter in both if biased and counter and biased != counter]
    return pairs


def read_test_pairs(root: str | PathLike[str], bias: str, split: str = "test") -> list[tuple[str, str]]:
    """Sentences of one bias type about the minority and, line by line, about the majority.

    Parameters
    ----------
    bias : str
        A bias type: gender, race, religion1, religion2 or orientation.
    split : {"test", "valid"}
    """
    groups = {name: pair for types in AXES.values() for name, pair in types.items()}
    if bias not in groups:
        raise ValueError(f"bias is {bias!r}, allowed are {', '.join(groups)}")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, allowed are {', '.join(SPLITS)}")
    sides = []
    for group in groups[bias]:
        path = _find(root, f"data/{bias}/reddit_comments_{bias}_{group}_biased_{split}_reduced.csv")
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            if "comments_processed" not in (rows.fieldnames or ()):
                raise ValueError(f"{path} has no column comments_processed, RedditBias' reduced test files have one")
            sides.append([clean(row["comments_processed"]) for row in rows])
    minority, majority = sides
    if len(minority) != len(majority):
        raise ValueError(f"RedditBias {bias} {split} has {len(minority)} and {len(majority)} rows, allowed is equal")
    return list(zip(minority, majority, strict=True))


def bias_types(axis: str) -> tuple[str, ...]:
    """The corpus' bias types of an axis; a bias type names itself."""
    if axis in AXES:
        return tuple(AXES[axis])
    types = [name for group in AXES.values() for name in group]
    if axis in types:
        return (axis,)
    raise ValueError(f"axis is {axis!r}, allowed are {', '.join(dict.fromkeys([*AXES, *types]))}")


def clean(text: str) -> str:
    """Without the literal tokens that some files carry."""
    return text.replace("<bos>", "").replace("<eos>", "").strip()


def read_text(path: Path) -> str:
    """UTF-8, or cp1252 where a file isn't (the annotated religion1 csv)."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


def _find(root: str | PathLike[str], path: str) -> Path:
    return find(SOURCE, root, path, f"redditbias/{path}", f"RedditBias/{path}")
