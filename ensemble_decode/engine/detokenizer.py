"""Token ids to text, a token at a time, and the stop strings in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: How many tokens of the prompt are decoded together with the first new ones: whether a word begins with a space can
#: depend on what stands before it.
_CONTEXT = 4
_INCOMPLETE = "�"
#: More tokens than these are not held back for the rest of a character, which has 4 bytes at most: they are no text.
_HELD = 8

Decode = Callable[[list[int]], str]


def decoder(tokenizer: Any, skip_special_tokens: bool) -> Decode:
    """The cheapest correct way to turn ids into text with this tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return lambda ids: backend.decode(ids, skip_special_tokens=skip_special_tokens)
    return lambda ids: tokenizer.decode(
        ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )


def decode_output(decode: Decode, prompt: list[int], output: list[int]) -> str:
    """Text of ``output``, decoded at once, as it reads after ``prompt``."""
    context = prompt[-_CONTEXT:]
    return decode(context + output)[len(decode(context)) :]


class Detokenizer:
    """Text of one sequence as it grows.

    Parameters
    ----------
    decode : callable
        Token ids to text.
    prompt : list of int
        What comes before.
    stops : tuple of str
        The text ends before the first of these (or with it, if ``include_stop``).
    """

    def __init__(
        self, decode: Decode, prompt: list[int], stops: tuple[str, ...] = (), include_stop: bool = False
    ) -> None:
        self._decode = decode
        self._ids = prompt[-_CONTEXT:]
        self._shown = len(self._ids)  # ids whose text is complete
        self._start = 0  # ids from here on are decoded together
        self._stops = stops
        self._include_stop = include_stop
        self._longest_stop = max(map(len, stops), default=0)
        self.pushed = 0  # tokens so far
        self.text = ""
        self.stop: str | None = None

    def push(self, tokens: list[int], may_stop: bool = True) -> str | None:
        """Add tokens; returns the stop string that was met, if any and if it may. ``text`` then ends there."""
        for token in tokens:
            self._ids.append(token)
            self.pushed += 1
            before = self._decode(self._ids[self._start : self._shown])
            after = self._decode(self._ids[self._start :])
            end = len(self._ids)
            # A character of several tokens decodes to a replacement sign until the last of them is there.
            if after.endswith(_INCOMPLETE):
                if end - self._shown <= _HELD:
                    continue
                end -= 3  # these may still begin a character
                after = self._decode(self._ids[self._start : end])
            if len(after) <= len(before):
                continue
            self._start, self._shown = self._shown, end
            if self._grow(after[len(before) :], may_stop):
                return self.stop
        return None

    def flush(self) -> str | None:
        """The sequence is over: what is held back as incomplete is text now."""
        before = self._decode(self._ids[self._start : self._shown])
        after = self._decode(self._ids[self._start :])
        self._shown = len(self._ids)
        return self.stop if len(after) > len(before) and self._grow(after[len(before) :]) else None

    @property
    def safe_text(self) -> str:
        """The text that no stop string can still take back."""
        if self.stop is not None or not self._longest_stop:
            return self.text
        for length in range(min(self._longest_stop - 1, len(self.text)), 0, -1):
            tail = self.text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return self.text[:-length]
        return self.text

    def _grow(self, piece: str, may_stop: bool = True) -> bool:
        searched = max(0, len(self.text) - self._longest_stop + 1)
        self.text += piece
        if not may_stop:
            return False
        found = [(at, stop) for stop in self._stops if (at := self.text.find(stop, searched)) >= 0]
        if not found:
            return False
        at, self.stop = min(found, key=lambda item: (item[0], -len(item[1])))
        self.text = self.text[: at + len(self.stop) if self._include_stop else at]
        return True
