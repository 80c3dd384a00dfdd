"""The sampling operators in plain PyTorch: the definition of correct (docs: the sampling contract).

Every back end is held to these functions token for token. They are written to be read, not to be fast.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# ── the noise ───────────────────────────────────────────────────────────────────────────────────────────────────────
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a·b for unsigned 32-bit values held in int64 (whose product could overflow)."""
    low_part, high_part = a * (b & 0xFFFF), a * (b >> 16)
    middle = (low_part >> 16) + (high_part & 0xFFFF)
    return (high_part >> 16) + (middle >> 16), ((middle & 0xFFFF) << 16) | (low_part & 0xFFFF)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al. 2011), unsigned 32-bit words held in int64 tensors of one shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _mulhilo(_M0, c0)
        hi1, lo1 = _mulhilo(_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def gumbel_noise(seed: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """g = −log(−log1p(−u)), float32 [B, V]: a function of (seed, position, token id) and nothing else.

    Parameters
    ----------
    seed, position : int64 [B]
    """
    token = torch.arange(vocab_size, device=seed.device)
    shape = (seed.shape[0], vocab_size)
    zero = torch.zeros(shape, dtype=torch.int64, device=seed.device)
    counter = ((token >> 2).expand(shape), (position & _LOW).unsqueeze(1).expand(shape), zero, zero)
    key = ((seed & _LOW).unsqueeze(1).expand(shape), ((seed >> 32) & _LOW).unsqueeze(1).expand(shape))
    words = torch.stack(philox4x32(counter, key), -1)
    word = words.gather(-1, (token & 3).expand(shape).unsqueeze(-1)).squeeze(-1)
    u = (word.float() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-u))


# ── the score ───────────────────────────────────────────────────────────────────────────────────────────────────────
def combine(target: Tensor, expert: Tensor | None, anti_expert: Tensor | None, alpha: Tensor | None) -> Tensor:
    """z + Σ_p α_p (z⁺_p − z⁻_p) in float32, [B, V].

    A difference that is not finite counts as 0; a pair with α = 0 is not read; −inf in z stays −inf.

    Parameters
    ----------
    target : [B, V]
    expert, anti_expert : [P, B, V] or None
        ``anti_expert=None`` says that ``expert`` holds the difference already.
    alpha : float32 [B, P]
    """
    score = target.float().clone()
    if expert is None or alpha is None:
        return score
    for pair in range(expert.shape[0]):
        difference = expert[pair].float() if anti_expert is None else expert[pair].float() - anti_expert[pair].float()
        weight = alpha[:, pair].float().unsqueeze(1)
        on = difference.isfinite() & (weight != 0)
        score = score + torch.where(on, weight * torch.where(on, difference, 0.0), 0.0)
    return torch.where(target.float() == -math.inf, -math.inf, score)


# ── the filters ─────────────────────────────────────────────────────────────────────────────────────────────────────
def kept(score: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Which tokens of one row of scores [V] pass top-k, then top-p, then min-p: bool [V].

    Each filter keeps a prefix of the tokens sorted by score, and all tokens tied at its boundary.
    """
    keep = score > -math.inf
    if 0 < top_k < score.shape[0]:
        keep &= score >= score.topk(top_k).values[-1]
    if top_p < 1:
        weight = torch.where(keep, (score - score.max()).exp(), 0.0).double()
        ordered, order = score.sort(descending=True)
        before = weight[order].cumsum(0) - weight[order]  # mass sorted before each token
        first_of_tie = torch.searchsorted(-ordered.contiguous(), -score.contiguous())
        above = before[first_of_tie]  # mass strictly above each token
        keep &= above < top_p * weight.sum()
    if min_p > 0:
        keep &= score >= score.max() + math.log(min_p)
    return keep


# ── the operator ────────────────────────────────────────────────────────────────────────────────────────────────────
def ensemble_sample(
    target: Tensor,
    expert: Tensor | None,
    anti_expert: Tensor | None,
    *,
    alpha: Tensor | None,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    nucleus: str = "combined",
    target_is_combined: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One token a row from softmax((z + Σ α(z⁺ − z⁻)) / T) inside the kept set: (token, logprob, target_logprob)."""
    batch, vocab_size = target.shape
    greedy = temperature == 0
    heat = torch.where(greedy, 1.0, temperature.float()).unsqueeze(1)
    z = target.float()
    combined = combine(target, expert, anti_expert, alpha)
    score, target_score = combined / heat, z / heat
    noise = gumbel_noise(seed, position, vocab_size)
    token = torch.full((batch,), -1, dtype=torch.int64, device=target.device)
    logprob = torch.full((batch,), math.nan, device=target.device)
    target_logprob = logprob.clone()
    for row in range(batch):
        # A score can also overflow, with a huge α: such a row has no distribution either.
        if not (z[row] < math.inf).all() or not -math.inf < score[row].max() < math.inf:
            continue
        keep = kept(
            target_score[row] if nucleus == "target" else score[row],
            int(top_k[row]),
            float(top_p[row]),
            float(min_p[row]),
        )
        keys = score[row] if greedy[row] else score[row] + noise[row]
        # Noise of −inf (u rounds to 1) must not make a kept token equal to one that is not.
        chosen = torch.where(
            keep, keys.clamp(min=torch.finfo(torch.float32).min), -math.inf
        ).argmax()  # first of equals
        token[row] = chosen
        logprob[row] = score[row].log_softmax(0)[chosen]
        if not target_is_combined:
            target_logprob[row] = target_score[row].log_softmax(0)[chosen]
    return token, logprob, target_logprob


def ensemble_logprob(
    target: Tensor,
    expert: Tensor | None,
    anti_expert: Tensor | None,
    token: Tensor,
    *,
    alpha: Tensor | None,
    temperature: Tensor,
) -> tuple[Tensor, Tensor]:
    """(logprob, target_logprob) of given tokens [B] under softmax(s) and softmax(z / T), float32 [B].

    NaN where the token is outside 0 … V − 1.
    """
    heat = torch.where(temperature == 0, 1.0, temperature.float()).unsqueeze(1)
    outside = (token < 0) | (token >= target.shape[1])
    index = torch.where(outside, 0, token).unsqueeze(1)
    logprob = (combine(target, expert, anti_expert, alpha) / heat).log_softmax(-1).gather(1, index).squeeze(1)
    target_logprob = (target.float() / heat).log_softmax(-1).gather(1, index).squeeze(1)
    return torch.where(outside, math.nan, logprob), torch.where(outside, math.nan, target_logprob)
