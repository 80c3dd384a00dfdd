"""What a sequence keeps of its tokens, beside the tokens."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_decode.engine.request import TokenCounts

TOKENS = st.lists(st.integers(0, 200), max_size=150)


@settings(deadline=None, database=None)
@given(TOKENS, TOKENS, st.lists(TOKENS, max_size=4))
def test_tokens_are_counted_as_if_from_scratch(prompt: list[int], output: list[int], drafts: list[list[int]]) -> None:
    counts, seen = TokenCounts(prompt), list[int]()

    def check(draft: list[int]) -> None:
        occurred = Counter(seen + draft)
        tokens, times = counts.table(draft)
        assert len(tokens) == len(set(tokens))
        assert dict(zip(tokens, times, strict=True)) == {t: occurred[t] for t in [*prompt, *occurred]}

    for token in output:
        counts.add(token)
        seen.append(token)
        check([])
    for draft in drafts:  # each is undone
        check(draft)
        check([])
    while seen:
        counts.remove(seen.pop())
        check([])
