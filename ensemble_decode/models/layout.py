"""What the engine must know of an ensemble to plan its work. Plain data: no tensor, no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PairLayout:
    """Where a pair's logits come from: the pool and the view of each side.

    ``anti_expert_pool`` is None when the pair has no anti-expert: its z⁻ is then the target's own z. ``base_pool`` is the
    bare model under both sides' adapters, where that is not the target and stands for it in drafts.
    """

    name: str
    alpha: float
    expert_pool: int
    anti_expert_pool: int | None
    expert_view: int = 0
    anti_expert_view: int = 0
    base_pool: int | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """Pools, views and pairs of an ensemble.

    A *pool* is a KV cache for one (weights, adapter); a *view* is a token sequence: view 0 is the request's own
    tokens, the others are prompts of a pair's own, followed by the same generated tokens. ``views[i]`` is the prompt
    template of view i ("{prompt}" stands for the request's prompt), and None for view 0. ``draft_pool`` is a draft model's,
    which serves sequences of at most ``draft_len`` tokens below ``draft_vocab``; it may be a member's as well.
    """

    vocab_size: int
    max_model_len: int
    target_pool: int
    num_pools: int
    pairs: tuple[PairLayout, ...]
    views: tuple[str | None, ...] = (None,)
    draft_pool: int | None = None
    draft_len: int = 0
    draft_vocab: int = 0

    @property
    def member_pools(self) -> tuple[int, ...]:
        """Pools that the target or a pair uses: all but that of a draft model which only drafts."""
        used = {self.target_pool}
        for pair in self.pairs:
            used |= {pair.expert_pool, self.target_pool if pair.anti_expert_pool is None else pair.anti_expert_pool}
        return tuple(sorted(used))

    def pools_of(self, pairs: tuple[int, ...], view: int) -> tuple[int, ...]:
        """Pools that must compute the tokens of ``view`` when ``pairs`` (indices) steer, in ascending order."""
        pools = {self.target_pool} if view == 0 else set()
        for index in pairs:
            pair = self.pairs[index]
            if pair.expert_view == view:
                pools.add(pair.expert_pool)
            if pair.anti_expert_pool is not None and pair.anti_expert_view == view:
                pools.add(pair.anti_expert_pool)
        return tuple(sorted(pools))
