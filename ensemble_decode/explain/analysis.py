"""From the scores of every member at every position to an :class:`Explanation`.

A pair's contribution to a token is its share of the change of the token's log-odds between the target's distribution and
the ensemble's. Along the path p_t ∝ exp((z + t Σ_p α_p d_p) / T), with d = z⁺ − z⁻ and t from 0 to 1,

    d logit p_t(v) / dt = Σ_p (α_p / T) (d_p[v] − E_{p_t}[d_p | not v]),

and the integral of a pair's own term is its contribution (Aumann and Shapley's attribution: it does not depend on the order of
pairs, and the contributions sum to the change). Penalties, bias and bans come after the pairs in the engine, so their
contribution, "edits", is the change from the combined scores to the edited ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ensemble_decode.engine.batch import Span
from ensemble_decode.engine.params import SamplingParams
from ensemble_decode.engine.request import Request
from ensemble_decode.engine.sampling import apply_edits
from ensemble_decode.explain.explanation import Explanation, Step, TokenEffect
from ensemble_decode.ops import reference

if TYPE_CHECKING:
    from ensemble_decode.engine.engine import Prompt
    from ensemble_decode.engine.llm import LLM

#: Positions whose full scores are held at once: V = 50,000 in float32 is 0.2 MB a position and member.
_CHUNK = 32
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(12)
EDITS = "edits"


def explain(llm: LLM, prompt: Prompt, params: SamplingParams, top: int = 5) -> Explanation:
    """See :meth:`LLM.explain`."""
    if params.n != 1:
        raise ValueError(f"n is {params.n}, allowed is 1: explain one sample at a time (another seed gives another)")
    if isinstance(top, bool) or not isinstance(top, int) or top < 0:
        raise ValueError(f"top is {top!r}, allowed is 0 or more")
    params = replace(params, logprobs=None, prompt_logprobs=None)
    output = llm.generate([prompt], params, use_tqdm=False)[0]
    sample = output.outputs[0]
    if sample.error is not None:
        raise ValueError(f"explain: the request failed: {sample.error}")
    request = llm.engine.make_request(prompt, replace(params, seed=output.seed))
    layout = llm.ensemble.layout
    names = [layout.pairs[pair.pair].name for pair in sorted(request.pairs, key=lambda p: p.pair)]
    alphas = {name: pair.alpha for name, pair in zip(names, sorted(request.pairs, key=lambda p: p.pair), strict=True)}
    pieces = _pieces(llm, output.prompt_token_ids, sample.token_ids)
    steps: list[Step] = []
    moved: dict[str, list[float]] = {name: [] for name in names}
    for z, differences in _scores(llm, request, sample.token_ids):
        for row in range(z.shape[0]):
            number = len(steps)
            edited = reference.combine(
                z[row : row + 1],
                differences[:, row : row + 1] if names else None,
                None,
                torch.tensor([list(alphas.values())]),
            )[0]
            combined = edited.clone()
            edit = request.sequences[0].edits(llm.ensemble.eos_token_ids, [])
            apply_edits(edited.unsqueeze(0), [edit], torch.tensor)
            steps.append(
                _step(
                    llm, params, z[row], differences[:, row], alphas, combined, edited, edit is not None,
                    sample.token_ids[number], pieces[number], top, moved,
                )
            )  # fmt: skip
            request.sequences[0].append(sample.token_ids[number])
    return Explanation(
        output.prompt if output.prompt is not None else _decode(llm, output.prompt_token_ids),
        sample.text,
        str(sample.finish_reason),
        output.seed,
        params.temperature,
        alphas,
        steps,
        moved,
    )


def _scores(llm: LLM, request: Request, generated: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """z [T, V] and z⁺ − z⁻ [P, T, V] at the position of every generated token, some positions at a time.

    The blocks are our own for the while: nothing else runs in the engine between two calls of ``LLM``.
    """
    engine, runner = llm.engine, llm.runner
    views = request.sequences[0].views
    starts = [len(view.tokens) - 1 for view in views]
    tokens = [view.tokens + generated[:-1] for view in views]
    size = engine.scheduler.max_num_batched_tokens
    with engine.blocks.borrow([len(listed) for listed in tokens]) as tables:
        for view, listed, table, end in zip(views, tokens, tables, starts, strict=True):
            for start in range(0, end, size):
                runner.parts([Span(listed[start : min(start + size, end)], start, table, view.pools)], ())
        steering = request.sequences[0].steering(0)
        steering = tuple(sorted(steering, key=lambda item: item.pair))
        for first in range(0, len(generated), _CHUNK):
            count = min(_CHUNK, len(generated) - first)
            spans = [
                Span(listed[start + first : start + first + count], start + first, table, view.pools, count)
                for view, listed, table, start in zip(views, tokens, tables, starts, strict=True)
            ]
            z, differences = runner.parts(spans, steering)
            yield z.cpu(), differences.cpu()


def _step(
    llm: LLM, params: SamplingParams, z: Tensor, differences: Tensor, alphas: dict[str, float], combined: Tensor,
    edited: Tensor, has_edits: bool, token: int, piece: str, top: int, moved: dict[str, list[float]],
) -> Step:  # fmt: skip
    heat = params.temperature or 1.0
    target = (z.double() / heat).log_softmax(0)
    ensemble = (edited.double() / heat).log_softmax(0)
    p, q = ensemble.exp(), target.exp()
    filters = params.top_k, params.top_p, params.min_p
    kept = reference.kept((z if params.nucleus == "target" else edited) / heat, *filters) & (edited > -torch.inf)
    target_kept = reference.kept(z / heat, *filters)
    change = p - q
    raised = [int(i) for i in change.topk(min(top, len(change))).indices if change[i] > 1e-9]
    lowered = [int(i) for i in (-change).topk(min(top, len(change))).indices if change[i] < -1e-9]
    ids = torch.tensor([token, *raised, *lowered])
    shares = _contributions(z.double() / heat, differences.double() / heat, list(alphas.values()), ids)
    before, after = _logit((combined.double() / heat).log_softmax(0), ids), _logit(ensemble, ids)
    start = _logit(target, ids)

    def effect(place: int, text: str) -> TokenEffect:
        index = int(ids[place])
        given = {name: float(shares[i, place]) for i, name in enumerate(alphas)}
        if has_edits:
            given[EDITS] = float(after[place] - before[place])
        return TokenEffect(
            index,
            text,
            float(q[index]),
            float(p[index]),
            int((target > target[index]).sum()) + 1,
            int((ensemble > ensemble[index]).sum()) + 1,
            float(after[place] - start[place]),
            given,
            bool(kept[index]),
            bool(target_kept[index]),
        )

    effects = [effect(0, piece)] + [effect(i, _decode(llm, [int(ids[i])])) for i in range(1, len(ids))]
    for i, name in enumerate(alphas):
        moved[name] += [float(value) for value in shares[i]]
    both = p > 0
    return Step(
        effects[0],
        effects[1 : 1 + len(raised)],
        effects[1 + len(raised) :],
        float((p.sqrt() - q.sqrt()).norm() / 2**0.5),
        max(0.0, float((p[both] * (ensemble[both] - target[both])).sum())),
        int(kept.sum()),
        int(target_kept.sum()),
    )


def _contributions(z: Tensor, differences: Tensor, alphas: list[float], ids: Tensor) -> Tensor:
    """Change of the log-odds of tokens ``ids`` that each pair is the cause of, float64 [P, len(ids)]."""
    shares = torch.zeros(len(alphas), len(ids), dtype=torch.float64)
    if not alphas:
        return shares
    weighted = differences * torch.tensor(alphas, dtype=torch.float64).unsqueeze(1)
    whole, own = weighted.sum(0), weighted[:, ids]
    for node, weight in zip(_NODES, _WEIGHTS, strict=True):
        p = (z + (node + 1) / 2 * whole).softmax(0)
        others = (weighted @ p).unsqueeze(1) - own * p[ids]
        shares += weight / 2 * (own - others / (1 - p[ids]).clamp_min(1e-12))
    return shares


def _logit(logprobs: Tensor, ids: Tensor) -> Tensor:
    """Log-odds of ``ids``, bounded where a probability is 0 or 1 in double precision, so that they stay numbers."""
    p = logprobs[ids].exp()
    return logprobs[ids].clamp_min(-50.0) - torch.log1p(-p).clamp_min(-50.0)


def _decode(llm: LLM, tokens: list[int]) -> str:
    return " ".join(f"#{t}" for t in tokens) if llm.tokenizer is None else llm.tokenizer.decode(tokens)


def _pieces(llm: LLM, prompt: list[int], generated: list[int]) -> list[str]:
    """The text that each token adds; a character of several tokens belongs to the last of them."""
    if llm.tokenizer is None:
        return [f" #{token}" for token in generated]
    found = []
    shown = llm.tokenizer.decode(prompt)
    for count in range(1, len(generated) + 1):
        text = llm.tokenizer.decode(prompt + generated[:count])
        unfinished = text.endswith("\N{REPLACEMENT CHARACTER}") and count < len(generated)
        found.append("" if unfinished else text[len(shown) :])
        shown = shown if unfinished else text
    return found
