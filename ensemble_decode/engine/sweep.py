"""Log-probabilities of texts at many α for one forward of the members.

z + Σ α(z⁺ − z⁻) is linear in α: what the members say at a token is computed once, and every α costs one softmax more.
:meth:`LLM.score` at one α is the definition.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ensemble_decode.engine.batch import Span
from ensemble_decode.engine.block_manager import BlockManager
from ensemble_decode.engine.params import SamplingParams

if TYPE_CHECKING:
    from ensemble_decode.engine.engine import Prompt
    from ensemble_decode.engine.llm import LLM

Alpha = float | Mapping[str, float] | None

#: Rows whose scores are combined at a time: few enough for a row's slab to stay in the cache over all α.
_ROWS = 8


def score_sweep(
    llm: LLM, texts: Sequence[Prompt], alphas: Sequence[Alpha], *, use_tqdm: bool = False
) -> list[NDArray[np.float64]]:
    """Log-probabilities of every text's tokens after the first, under the ensemble at each α.

    Parameters
    ----------
    texts : sequence of str or list of int
        As in :meth:`LLM.score`.
    alphas : sequence of float or dict
        As in :class:`SamplingParams`; equal or not, in any order.

    Returns
    -------
    list of float64 array [len(alphas), tokens − 1]
        Natural logarithms. A text's values depend neither on the other texts nor on the other α.

    Raises
    ------
    ValueError
        A text or an α that can't be served, or pairs of prompts, whose sides see other tokens.
    """
    layout = llm.ensemble.layout
    params = [SamplingParams(alpha=dict(a) if isinstance(a, Mapping) else a) for a in alphas]
    for index, param in enumerate(params):
        try:
            param.check(layout)
        except ValueError as error:
            raise ValueError(f"alphas {index}: {error}") from None
    weights = [param.alphas(layout) for param in params]
    pairs = tuple(sorted({pair for weight in weights for pair in weight}))
    everything = SamplingParams(alpha={layout.pairs[pair].name: 1.0 for pair in pairs})
    tokens = [llm.engine.make_request(text, everything, score_only=True).prompt_token_ids for text in texts]
    matrix = torch.tensor([[weight.get(pair, 0.0) for pair in pairs] for weight in weights])
    pools = layout.pools_of(pairs, 0)
    found = [np.empty((len(alphas), len(listed) - 1)) for listed in tokens]
    blocks = llm.engine.blocks
    tables: dict[int, list[int]] = {}
    try:
        lengths = [len(listed) - 1 for listed in tokens]  # nothing is asked of the last one
        with tqdm(total=sum(map(bool, lengths)), desc="score", unit="text", disable=not use_tqdm) as bar:
            for step in pack(lengths, llm.engine.scheduler.max_num_batched_tokens, blocks.num_free):
                spans, targets = [], []
                for text, start, end in step:
                    if text not in tables:
                        tables[text] = [blocks.allocate() for _ in range(blocks.blocks_for(lengths[text]))]
                    spans.append(Span(tokens[text][start:end], start, tables[text], pools, end - start))
                    targets.append(tokens[text][start + 1 : end + 1])
                values = llm.runner.sweep(spans, targets, pairs, matrix)
                for (text, start, end), value in zip(step, values, strict=True):
                    found[text][:, start:end] = value
                    if end == lengths[text]:
                        blocks.release(tables.pop(text))
                        bar.update()
    finally:
        for table in tables.values():
            blocks.release(table)
    return found


def pack(lengths: Sequence[int], most: int, free: int) -> Iterator[list[tuple[int, int, int]]]:
    """Steps of pieces (text, start, end): at most ``most`` tokens, of texts that ``free`` blocks hold together.

    The pieces of a longer text are in steps that follow one another.
    """
    step: list[tuple[int, int, int]] = []
    held = 0
    for text, length in enumerate(lengths):
        need, start = BlockManager.blocks_for(length), 0
        if step and held + need > free:
            yield step
            step, held = [], 0
        held += need
        while start < length:
            room = most - sum(end - begin for _, begin, end in step)
            if not room:
                yield step
                step, held = [], need
                continue
            step.append((text, start, min(start + room, length)))
            start += room
    if step:
        yield step


def logprobs_at(z: Tensor, differences: Tensor, alphas: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(z + Σ α d) at one token a row, for every α.

    Parameters
    ----------
    z : float32 [T, V]
    differences : float32 [P, T, V]
    alphas : float32 [K, P], on the CPU
    tokens : int64 [T]

    Returns
    -------
    float32 [K, T]
    """
    found = torch.empty(len(alphas), len(z), device=z.device)
    for first in range(0, len(z), _ROWS):
        rows = slice(first, first + _ROWS)
        combined = torch.empty_like(z[rows])
        column = tokens[rows, None]
        for place, weights in enumerate(alphas.tolist()):
            combined.copy_(z[rows])
            for pair, alpha in enumerate(weights):
                if alpha:  # 0 · d is left out: so a value doesn't depend on which pairs other α use
                    combined.add_(differences[pair, rows], alpha=alpha)
            found[place, rows] = combined.gather(1, column)[:, 0] - combined.logsumexp(1)
    return found
