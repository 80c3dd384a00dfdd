"""From scores to tokens and log-probabilities: the rows of a batch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ensemble_decode import ops
from ensemble_decode.engine.batch import Edits, SampleRow, ScoreRow, Span, StepOutput, TokenLogprobs
from ensemble_decode.engine.combination import Combination, Hidden
from ensemble_decode.engine.device import Upload

#: Rows of full logits kept at a time while scoring: V = 50,000 in float32 is 0.2 MB a row.
SCORE_ROWS = 128


@dataclass(slots=True)
class _Part:
    """Rows that one call of the operator sampled: their indices in the batch, and their tokens [R], perhaps not yet computed.

    ``wanted`` are the places in it whose log-probabilities somebody asked for, ``scores`` theirs over T, [W, V], combined
    and the target's: one tensor where nothing steers, None where nobody asked.
    """

    indices: list[int]
    token: torch.Tensor
    wanted: list[int]
    scores: tuple[torch.Tensor, torch.Tensor] | None


class Sampler:
    """Samples and scores the rows of a batch."""

    def __init__(self, combination: Combination, upload: Upload = torch.tensor) -> None:
        self.combination = combination
        self._upload = upload
        self.ensemble = combination.ensemble

    def sample(self, rows: list[SampleRow], spans: list[Span], hidden: Hidden) -> StepOutput:
        output = StepOutput([-1] * len(rows), [None] * len(rows))
        plain: list[int] = []  # the combination is all that anyone asks for
        whole: list[int] = []  # z is needed by itself
        drafts: dict[tuple[int, ...], list[int]] = {}  # by the pools whose logits they come from
        for index, row in enumerate(rows):
            if row.mixture:
                drafts.setdefault(tuple(pool for pool, _ in row.mixture), []).append(index)
                continue
            needs_target = row.steering and (row.nucleus == "target" or row.logprobs >= 0)
            (whole if needs_target or not self.combination.combines_hidden(row.steering) else plain).append(index)
        parts: list[_Part] = []
        for indices, combine in ((plain, True), (whole, False), *((part, True) for part in drafts.values())):
            # Two samplers for the two nuclei: one call each, since "nucleus" is not a parameter of a row.
            for nucleus, alike in itertools.groupby(
                sorted(indices, key=lambda i: rows[i].nucleus), lambda i: rows[i].nucleus
            ):
                parts.append(self._sample_part(rows, list(alike), nucleus, combine, spans, hidden))
        if not parts:
            return output
        # Read together: a GPU would stand still from one part's read to the next one's launches.
        tokens = (parts[0].token if len(parts) == 1 else torch.cat([part.token for part in parts])).tolist()
        for index, token in zip((i for part in parts for i in part.indices), tokens, strict=True):
            output.tokens[index] = token
        for part in parts:
            if part.scores is None:
                continue
            asked = [part.indices[place] for place in part.wanted]
            of, best = [output.tokens[i] for i in asked], [rows[i].logprobs for i in asked]
            for index, entry in zip(asked, _logprobs(*part.scores, of, best, self._upload), strict=True):
                output.logprobs[index] = entry
        return output

    def _sample_part(
        self,
        rows: list[SampleRow],
        indices: list[int],
        nucleus: Literal["combined", "target"],
        combine: bool,
        spans: list[Span],
        hidden: Hidden,
    ) -> _Part:
        part = [rows[i] for i in indices]
        at, steering, offsets = (
            [row.span for row in part],
            [row.steering for row in part],
            [spans[row.span].outputs - 1 if row.output < 0 else row.output for row in part],
        )
        expert = anti = alpha = None
        if part[0].mixture:
            z = self.combination.mixture_logits(hidden, [row.mixture for row in part], at, offsets)
        elif combine:
            z = self.ensemble.target.logits(self.combination.combined_hidden(hidden, at, steering, offsets))[
                :, : self.ensemble.layout.vocab_size
            ]
        else:
            z, expert, anti, alpha = self.combination.scores(hidden, at, steering, offsets)
        target = z
        combined = combine and any(steering)
        if any(row.edits is not None for row in part):
            z = z.clone() if expert is None else ops.combine(z, expert, anti, alpha)
            apply_edits(z, [row.edits for row in part], self._upload)
            if expert is not None and nucleus == "target":
                # The kept set is the target's, the scores are the edited combination: hand over their difference.
                # A banned token's difference is not finite and would count as 0, so z itself is banned.
                expert, anti, alpha = (z - target).unsqueeze(0), None, torch.ones(len(part), 1, device=z.device)
                z = target.masked_fill(z == float("-inf"), float("-inf"))
            elif expert is not None:
                expert = anti = alpha = None
                combined = True
        temperature = self._upload([row.temperature for row in part], dtype=torch.float32)
        sampled = ops.ensemble_sample(
            z,
            expert,
            anti,
            alpha=alpha,
            temperature=temperature,
            top_k=self._upload([row.top_k for row in part], dtype=torch.int32),
            top_p=self._upload([row.top_p for row in part], dtype=torch.float32),
            min_p=self._upload([row.min_p for row in part], dtype=torch.float32),
            seed=self._upload([row.seed for row in part], dtype=torch.int64),
            position=self._upload([row.position for row in part], dtype=torch.int64),
            nucleus=nucleus,
            target_is_combined=combined,
        )
        wanted = [place for place, row in enumerate(part) if row.logprobs >= 0]
        if not wanted:
            return _Part(indices, sampled.token, [], None)
        scores = z if expert is None else ops.combine(z, expert, anti, alpha)
        heated = self._heated(scores, part, wanted)
        alone = heated if scores is target else self._heated(target, part, wanted)
        return _Part(indices, sampled.token, wanted, (heated, alone))

    def _heated(self, scores: torch.Tensor, part: list[SampleRow], wanted: list[int]) -> torch.Tensor:
        """The ``wanted`` rows of ``scores``, divided by their temperatures; no copy where that is ``scores`` itself."""
        if len(wanted) < len(part):
            scores = scores[self._upload(wanted, dtype=torch.int64)]
        heat = [part[place].temperature or 1.0 for place in wanted]
        return scores if set(heat) == {1.0} else scores / self._upload(heat, dtype=torch.float32).unsqueeze(1)

    # ── scoring ─────────────────────────────────────────────────────────────────────────────────────────────────────
    def score(self, row: ScoreRow, span: Span, spans: list[Span], hidden: Hidden) -> list[TokenLogprobs]:
        """Log-probabilities of ``row.tokens``, a slab of rows at a time, so that memory stays bounded."""
        out: list[TokenLogprobs] = []
        for start in range(0, len(row.tokens), SCORE_ROWS):
            tokens = row.tokens[start : start + SCORE_ROWS]
            offsets = list(range(start, start + len(tokens)))
            z, expert, anti, alpha = self.combination.scores(
                hidden, [row.span] * len(tokens), [row.steering] * len(tokens), offsets
            )
            combined = z if expert is None else ops.combine(z, expert, anti, alpha)
            out += _logprobs(combined, z, tokens, [row.logprobs] * len(tokens), self._upload)
        return out


def apply_edits(scores: torch.Tensor, edits: list[Edits | None], upload: Upload) -> None:
    """Change combined scores [B, V] in place: logit bias, bans, then penalties (vLLM's order and formulas).

    All rows at once, each entry by itself: a row's bits don't depend on the others.
    """
    flat, width = scores.view(-1), scores.shape[1]
    rows = [(index * width, edit) for index, edit in enumerate(edits) if edit is not None]
    biased = [begin + token for begin, edit in rows for token in edit.bias]
    if biased:
        bias = [value for _, edit in rows for value in edit.bias.values()]
        flat[upload(biased, dtype=torch.int64)] += upload(bias, dtype=torch.float32)
    banned = [begin + token for begin, edit in rows for token in edit.banned]
    if banned:
        flat[upload(banned, dtype=torch.int64)] = float("-inf")
    counted = [(begin, edit, edit.counts) for begin, edit in rows if edit.counts is not None and edit.counts.size]
    if counted:
        at, count = upload(
            np.concatenate([c + np.array([[begin], [0]]) for begin, _, c in counted], 1), dtype=torch.int64
        )
        penalties = np.array(
            [(e.repetition_penalty, e.presence_penalty, e.frequency_penalty) for _, e, _ in counted], np.float32
        )
        sizes = [counts.shape[1] for *_, counts in counted]
        repetition, presence, frequency = upload(np.repeat(penalties.T, sizes, axis=1), dtype=torch.float32)
        values = flat.index_select(0, at)
        values = torch.where(values > 0, values / repetition, values * repetition)
        # Presence and frequency are those of the output.
        values = torch.where(count > 0, values - (frequency * count + presence), values)
        flat.index_copy_(0, at, values)


def best_tokens(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` highest of each row of ``scores`` [R, V] and their ids, best first; of equal ones the lowest ids.

    ``topk`` alone lists any of several that are equal, and in any order: another answer in another batch.
    """
    if k == 0:
        return scores.topk(0, dim=-1)
    values, ids = scores.topk(min(k + 1, scores.shape[1]), dim=-1)
    passed_over = values[:, k:] == values[:, k - 1 : k]  # the next one is as good as the last of them
    values, ids = values[:, :k], ids[:, :k]
    for row in passed_over.any(1).nonzero().flatten().tolist():
        here = values[row] == values[row, -1]
        ids[row, here] = (scores[row] == values[row, -1]).nonzero().flatten()[: int(here.sum())]
    ids = ids.sort(dim=1).values
    values, order = scores.gather(1, ids).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, order)


def _logprobs(
    combined: torch.Tensor,
    target: torch.Tensor,
    tokens: list[int],
    best: list[int],
    upload: Upload,
) -> list[TokenLogprobs]:
    """Log-probabilities of ``tokens`` and of the best of each row, under the ensemble and under the target alone."""
    ensemble = combined.log_softmax(-1)
    alone = ensemble if combined is target else target.log_softmax(-1)
    token = upload(tokens, dtype=torch.int64).clamp_min(0).unsqueeze(1)
    own = ensemble.gather(1, token)
    # A sum of floats, exact up to 2^24, takes a sixth of the time of one of booleans.
    ranks = (torch.gt(ensemble, own, out=torch.empty_like(ensemble)).sum(1).long() + 1).tolist()
    own_target = alone.gather(1, token).squeeze(1).tolist()
    own_list = own.squeeze(1).tolist()
    k = min(max(best), ensemble.shape[1])
    values, ids = best_tokens(ensemble, k)
    values_list, ids_list, target_list = values.tolist(), ids.tolist(), alone.gather(1, ids).tolist()
    return [
        TokenLogprobs(
            tokens[i],
            own_list[i],
            own_target[i],
            ranks[i],
            [(ids_list[i][j], values_list[i][j], target_list[i][j], j + 1) for j in range(min(best[i], k))],
        )
        for i in range(len(tokens))
    ]
