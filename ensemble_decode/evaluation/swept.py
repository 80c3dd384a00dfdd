"""A stand-in for an LLM that scores at all α of a sweep when the first is asked for, and remembers the rest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensemble_decode.engine.llm import LLM
from ensemble_decode.engine.outputs import Score
from ensemble_decode.engine.params import SamplingParams
from ensemble_decode.engine.sweep import Alpha, score_sweep
from ensemble_decode.evaluation.runner import Task

_PLAIN = SamplingParams(alpha=0.0)


class SweptLLM:
    """An LLM whose :meth:`score` costs one forward of the members for all ``alphas``; all else is the LLM's own.

    For metrics that score the same texts for one system after another. Texts that were scored stay in memory, a number a
    token and α, until they were asked for at every α.
    """

    def __init__(self, llm: LLM, alphas: Sequence[Alpha]) -> None:
        self._llm = llm
        self._alphas = {_key(alpha): alpha for alpha in alphas}
        self._known: dict[str, dict[str, list[NDArray[np.float64]]]] = {}

    def score(self, texts: Any, alpha: Any = None, *, use_tqdm: bool = False) -> list[Score]:
        """As :meth:`LLM.score` for a text or a list of texts, without ranks. An α that is not in the sweep is scored by itself."""
        listed = [texts] if isinstance(texts, str) else texts
        tokens = [self._llm.engine.make_request(text, _PLAIN, score_only=True).prompt_token_ids for text in listed]
        wanted = _key(alpha)
        if wanted not in self._alphas:
            values = score_sweep(self._llm, tokens, [alpha], use_tqdm=use_tqdm)
            return [_score(ids, value[0]) for ids, value in zip(tokens, values, strict=True)]
        name = hashlib.sha256(json.dumps(tokens).encode()).hexdigest()
        if wanted not in self._known.get(name, {}):
            values = score_sweep(self._llm, tokens, list(self._alphas.values()), use_tqdm=use_tqdm)
            self._known[name] = {key: [value[i] for value in values] for i, key in enumerate(self._alphas)}
        found = self._known[name].pop(wanted)
        if not self._known[name]:
            del self._known[name]
        return [_score(ids, value) for ids, value in zip(tokens, found, strict=True)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)


def share_forwards(tasks: Sequence[Task], records: Path) -> list[Task]:
    """The same tasks, metric by metric; those that only score text and are still to be run share one forward of the members.

    One alone goes that way too: a sweep's last bits are not :meth:`LLM.score`'s, and a run must write the same bytes wherever
    it was interrupted. A task with a prefix scores texts of its own, and keeps its LLM.
    """
    found: list[Task] = []
    for name in dict.fromkeys(task.metric.name for task in tasks):
        same = [task for task in tasks if task.metric.name == name]
        missing = [
            task
            for task in same
            if not (task.metric.generates or task.system.prefix or task.path(records).is_file())
            and task.system.llm is same[0].system.llm
        ]
        if missing:
            swept = SweptLLM(same[0].system.llm, [task.system.params.alpha for task in missing])
            llm: Any = swept  # what metrics use of an LLM
            same = [replace(t, system=replace(t.system, llm=llm)) if t in missing else t for t in same]
        found += same
    return found


def _key(alpha: Alpha) -> str:
    return json.dumps(alpha, sort_keys=True)


def _score(tokens: list[int], values: NDArray[np.float64]) -> Score:
    logprobs: list[float | None] = [None, *values.tolist()]
    return Score(None, tokens, logprobs, [None] * len(tokens), [None] * len(tokens))
