"""StereoSet (Nadeem et al. 2021), development set. The text is offensive: never print it."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from ensemble_decode.corpora.source import SentencePair, Source, find

SOURCE = Source("StereoSet", "https://github.com/moinnadeem/StereoSet", "CC BY-SA 4.0")
TASKS = ("intrasentence", "intersentence")
DOMAINS = ("gender", "profession", "race", "religion")
LABELS = ("stereotype", "anti-stereotype", "unrelated")


@dataclass(frozen=True, slots=True)
class Sentence:
    """One of the three readings of an example."""

    id: str
    text: str
    label: str


@dataclass(frozen=True, slots=True)
class Example:
    """A context about a target term, and a stereotype, an anti-stereotype and an unrelated sentence.

    In the intrasentence task the sentences fill the context's blank; in the intersentence task they follow it.
    """

    id: str
    task: str
    domain: str
    term: str
    context: str
    sentences: tuple[Sentence, ...]

    def __getitem__(self, label: str) -> Sentence:
        for sentence in self.sentences:
            if sentence.label == label:
                return sentence
        raise KeyError(label)


def read_examples(root: str | PathLike[str], task: str = "intrasentence") -> list[Example]:
    """The examples of a task, from ``dev.json``, ``dev.json.gz`` or ``dev_<task>.jsonl``, in the file's order.

    Parameters
    ----------
    root : path
        The folder of these files, of the upstream repository, or one that has them as ``stereoset``.
    task : {"intrasentence", "intersentence"}
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}, allowed are {', '.join(TASKS)}")
    names = ("dev.json", "dev.json.gz", f"dev_{task}.jsonl")
    folders = ("", "data/", "stereoset/", "StereoSet/data/")
    path = find(SOURCE, root, *[folder + name for folder in folders for name in names])
    return [_example(row, task, path) for row in _rows(path, task)]


def draw(examples: Sequence[Example], count: int | None) -> list[Example]:
    """At most ``count`` examples of each domain, drawn by the digest of their ids, in their order; None: all."""
    if count is None:
        return list(examples)
    if count < 1:
        raise ValueError(f"examples is {count}, allowed is 1 or more of each domain")
    order = sorted(examples, key=lambda example: hashlib.sha256(example.id.encode()).digest())
    kept = {e.id for domain in DOMAINS for e in [e for e in order if e.domain == domain][:count]}
    return [example for example in examples if example.id in kept]


def read_training_pairs(root: str | PathLike[str], domain: str, task: str = "intrasentence") -> list[SentencePair]:
    """Anti-stereotypes (expert) and stereotypes (anti-expert) of a domain. Never evaluate on what was trained on."""
    if domain not in DOMAINS:
        raise ValueError(f"domain is {domain!r}, allowed are {', '.join(DOMAINS)}")
    examples = [example for example in read_examples(root, task) if example.domain == domain]
    return [SentencePair(_full(e, "anti-stereotype"), _full(e, "stereotype")) for e in examples]


def _full(example: Example, label: str) -> str:
    text = example[label].text
    return text if example.task == "intrasentence" else f"{example.context} {text}"


def _rows(path: Path, task: str) -> list[dict[str, Any]]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = data.decode("utf-8-sig")
    try:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        return json.loads(text)["data"][task]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not StereoSet's format ({type(error).__name__}), get it from {SOURCE.url}"
        ) from None


def _example(row: dict[str, Any], task: str, path: Path) -> Example:
    try:
        sentences = tuple(Sentence(s["id"], s["sentence"], s["gold_label"]) for s in row["sentences"])
        example = Example(row["id"], task, row["bias_type"], row["target"], row["context"], sentences)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} has an example without {error}, get StereoSet from {SOURCE.url}") from None
    if sorted(s.label for s in sentences) != sorted(LABELS):
        raise ValueError(f"{path}: example {example.id} has other labels than one each of {', '.join(LABELS)}")
    return example
