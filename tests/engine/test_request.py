"""What a sequence keeps of its tokens, beside the tokens."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from ensemble_decode.engine.request import TokenCounts


@pytest.mark.parametrize("seed", range(20))
def test_tokens_are_counted_as_if_from_scratch(seed: int) -> None:
    some = random.Random(seed)
    prompt = some.choices(range(200), k=some.randrange(100))
    counts, output = TokenCounts(prompt), list[int]()

    def check(draft: list[int]) -> None:
        occurred = Counter(output + draft)
        tokens, times = counts.table(draft)
        assert len(tokens) == len(set(tokens))
        assert dict(zip(tokens, times, strict=True)) == {t: occurred[t] for t in [*prompt, *occurred]}

    for _ in range(400):
        if output and some.random() < 0.2:
            counts.remove(output.pop())
        else:
            output.append(some.randrange(200))
            counts.add(output[-1])
        check([])
        check(some.choices(range(200), k=some.randrange(6)))
        check([])
