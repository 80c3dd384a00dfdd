"""A model of words for tests that check what is scored: no weights, and probabilities that a hand can work out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ensemble_decode.engine.outputs import Score


class Words:
    """What metrics use of an LLM: a tokenizer of words, and a log-probability for each word from those before it.

    ``logprob`` takes the words before and the word. The first word of a text has none, as with a tokenizer that puts nothing
    before a text.
    """

    bos_token_id = 0

    def __init__(self, logprob: Callable[[list[str], str], float]) -> None:
        self.tokenizer = self
        self._words = ["<bos>"]
        self._logprob = logprob
        self.seen: list[str] = []

    def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> dict[str, list[int]]:
        for word in text.split():
            if word not in self._words:
                self._words.append(word)
        return {"input_ids": [self._words.index(word) for word in text.split()]}

    def score(self, texts: Sequence[list[int]], alpha: object = None, use_tqdm: bool = False) -> list[Score]:
        found = []
        for ids in texts:
            words = [self._words[i] for i in ids]
            self.seen.append(" ".join(words))
            logprobs = [None, *[self._logprob(words[:i], words[i]) for i in range(1, len(words))]]
            found.append(Score(None, list(ids), logprobs, [None] * len(ids), [None] * len(ids)))
        return found
