"""Where a corpus comes from, and what is said when it isn't there."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Source:
    """A published corpus: its name, where to get it and under which licence."""

    name: str
    url: str
    licence: str


@dataclass(frozen=True, slots=True)
class SentencePair:
    """Two readings of one sentence: the expert's text and the anti-expert's."""

    expert: str
    anti_expert: str


def find(source: Source, root: str | PathLike[str], *candidates: str) -> Path:
    """The first of ``candidates`` (paths relative to ``root``) that is a file.

    Raises
    ------
    FileNotFoundError
        One line: what is missing, where it was looked for, where to get it and its licence.
    """
    folder = Path(root).expanduser()
    for candidate in candidates:
        if (folder / candidate).is_file():
            return folder / candidate
    raise FileNotFoundError(
        f"{source.name} is not in {str(folder)!r}: {' or '.join(candidates)} is missing; "
        f"get it from {source.url} ({source.licence}) and name the folder it is in"
    )
