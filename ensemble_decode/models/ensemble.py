"""An ensemble: a target and its expert pairs, as groups of members that share weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch

from ensemble_decode.models.group import Group
from ensemble_decode.models.layout import Layout, PairLayout
from ensemble_decode.models.loading import (
    Quantization,
    check_checkpoint,
    check_quantization,
    resolve_device,
    resolve_dtype,
)
from ensemble_decode.models.lora import CONFIG, is_adapter
from ensemble_decode.models.pairs import ExpertPair

#: What the sampling operator takes.
_MOST_PAIRS = 64


@dataclass(slots=True)
class Pool:
    """A KV pool: which group computes it, and its place among the group's pools."""

    group: int
    index: int


@dataclass(slots=True)
class Ensemble:
    """Loaded groups and the layout that the engine plans with. ``pools[layout.target_pool]`` is the target's."""

    groups: list[Group]
    pools: list[Pool]
    layout: Layout
    tokenizer: Any | None
    eos_token_ids: tuple[int, ...]
    pairs: dict[str, ExpertPair] = field(default_factory=dict)

    @property
    def target(self) -> Group:
        return self.groups[self.pools[self.layout.target_pool].group]

    @property
    def bytes_per_block(self) -> int:
        """KV bytes of one block in all pools together."""
        return sum(group.bytes_per_block for group in self.groups)


def load_ensemble(
    model: str,
    pairs: Mapping[str, ExpertPair | str | PathLike[str]] | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    max_model_len: int | None = None,
    draft: str | PathLike[str] | None = None,
    quantization: Quantization | None = None,
) -> Ensemble:
    """Load a target, its pairs and perhaps what drafts; members on the same weights share one group.

    ``draft`` is a model, or "expert": then small models whose adapters are pairs are there without an adapter as well.

    Raises
    ------
    ValueError
        A folder that can't be loaded or served, an adapter that doesn't fit, or vocabularies that differ.
    """
    place = resolve_device(device)
    kind = resolve_dtype(dtype, place)
    check_quantization(quantization, place)
    named = {name: _as_pair(name, pair) for name, pair in (pairs or {}).items()}
    if len(named) > _MOST_PAIRS:
        raise ValueError(f"pairs: {len(named)} are given, allowed are {_MOST_PAIRS}")
    target = _key(model)
    members: dict[tuple[str, str | None], None] = {(target, None): None}  # (weights, adapter), in order
    sides: dict[str, tuple[tuple[str, str | None], tuple[str, str | None] | None]] = {}
    for name, pair in named.items():
        base = target if pair.base is None else _key(pair.base)
        expert = (target, None) if pair.expert is None else _member("expert", pair.expert, base)
        anti: tuple[str, str | None] | None = None
        if pair.anti_expert is not None:
            anti = _member("anti-expert", pair.anti_expert, base)
        elif pair.uses_prompts:
            anti = (target, None)
        sides[name] = (expert, anti)
        members[expert] = None
        if anti is not None:
            members[anti] = None
    drafter = None if draft is None or draft == "expert" else _member("draft model", fspath(draft), target)
    if drafter is not None:
        members.setdefault(drafter)
    bases = _small_bases(sides, target) if draft == "expert" else {}
    for key in bases.values():
        members.setdefault((key, None))
    weights = list(dict.fromkeys(key for key, _ in members))
    for key in weights:
        check_checkpoint(key)
    groups: list[Group] = []
    pools: list[Pool] = []
    pool_of: dict[tuple[str, str | None], int] = {}
    for number, key in enumerate(weights):
        adapters = [adapter for base, adapter in members if base == key and adapter is not None]
        bare = (key, None) in members
        groups.append(Group(key, kind, adapters, bare, max_model_len, device=place, quantization=quantization))
        for index, adapter in enumerate([*([None] if bare else []), *adapters]):
            pool_of[key, adapter] = len(pools)
            pools.append(Pool(number, index))
    serving = groups
    if drafter is not None and not any(drafter[0] == key for keys in sides.values() for key, _ in filter(None, keys)):
        # A draft model changes nothing of what comes out: neither the vocabulary nor the longest text.
        _common_vocabulary([groups[0], groups[weights.index(drafter[0])]])
        serving = [group for group, key in zip(groups, weights, strict=True) if key != drafter[0] or key == target]
    vocab_size = _common_vocabulary(serving)
    layout = _layout(named, sides, pool_of, pool_of[target, None], vocab_size, _model_len(serving, max_model_len))
    if bases:
        paired = (
            replace(pair, base_pool=pool_of[bases[pair.name], None] if pair.name in bases else None)
            for pair in layout.pairs
        )
        layout = replace(layout, pairs=tuple(paired))
    if drafter is not None:
        group = groups[weights.index(drafter[0])]
        layout = replace(
            layout,
            draft_pool=pool_of[drafter],
            draft_len=min(group.max_positions, layout.max_model_len),
            draft_vocab=min(group.vocab_size, vocab_size),
        )
    main = groups[pools[layout.target_pool].group]
    return Ensemble(groups, pools, layout, main.tokenizer, _end_tokens(main, vocab_size), named)


def _key(path: str) -> str:
    """One name for one set of weights, however its folder was written."""
    return str(Path(path).resolve()) if Path(path).is_dir() else str(path)


def _member(role: str, path: str, base: str) -> tuple[str, str | None]:
    if is_adapter(path):
        return base, _key(path)
    if Path(path).is_dir() and not (Path(path) / "config.json").exists():
        raise ValueError(f"{role} {path!r}: neither config.json (a model) nor {CONFIG} (a LoRA adapter) is in it")
    return _key(path), None


def _small_bases(
    sides: dict[str, tuple[tuple[str, str | None], tuple[str, str | None] | None]], target: str
) -> dict[str, str]:
    """The weights that both sides of a pair run on, by the pair's name, where these are not the target's."""
    return {
        name: expert[0]
        for name, (expert, anti) in sides.items()
        if anti is not None and expert[0] == anti[0] != target and expert != anti
    }


def _as_pair(name: str, pair: ExpertPair | str | PathLike[str]) -> ExpertPair:
    if isinstance(pair, str | PathLike) and Path(pair).is_dir():
        return ExpertPair.from_folder(pair)
    if not isinstance(pair, ExpertPair):
        raise ValueError(f"pairs: {name!r} is {pair!r}, an ExpertPair is allowed, or the folder of a trained pair")
    return pair


def _layout(
    pairs: dict[str, ExpertPair],
    sides: dict[str, tuple[tuple[str, str | None], tuple[str, str | None] | None]],
    pool_of: dict[tuple[str, str | None], int],
    target_pool: int,
    vocab_size: int,
    max_model_len: int,
) -> Layout:
    views: list[str | None] = [None]

    def view_of(prompt: str | None) -> int:
        if prompt is None:
            return 0
        # Every prompt side has a view of its own: a request may replace one and not the other.
        views.append(prompt)
        return len(views) - 1

    layouts = []
    for name, pair in pairs.items():
        expert, anti = sides[name]
        layouts.append(
            PairLayout(
                name,
                pair.alpha,
                pool_of[expert],
                None if anti is None else pool_of[anti],
                view_of(pair.expert_prompt),
                view_of(pair.anti_expert_prompt),
            )
        )
    return Layout(vocab_size, max_model_len, target_pool, len(pool_of), tuple(layouts), tuple(views))


def _model_len(groups: list[Group], asked: int | None) -> int:
    shortest = min(groups, key=lambda group: group.max_positions)
    if asked is None:
        return shortest.max_positions
    if isinstance(asked, bool) or not isinstance(asked, int) or not 1 <= asked <= shortest.max_positions:
        raise ValueError(
            f"max_model_len is {asked!r}, allowed is 1 … {shortest.max_positions} (positions of {shortest.path!r})"
        )
    return asked


def _common_vocabulary(groups: list[Group]) -> int:
    """The size that all logits are sliced to. Vocabularies may differ by padding only."""
    target = groups[0]
    words = _vocabulary(target)
    for group in groups[1:]:
        other = _vocabulary(group)
        names = f"target {target.path!r} has {target.vocab_size} logits, expert {group.path!r} has {group.vocab_size}"
        if words is not None and other is not None and words != other:
            different = sum(words.get(word) != index for word, index in other.items()) + sum(
                w not in other for w in words
            )
            raise ValueError(
                f"vocabularies differ in {different} tokens ({names}): experts need the target's own vocabulary"
            )
        if (words is None or other is None) and target.vocab_size != group.vocab_size:
            known = words if words is not None else other
            if known is None or min(target.vocab_size, group.vocab_size) <= max(known.values()):
                raise ValueError(
                    f"vocabularies differ: {names}; sizes may differ by padding only, which needs a tokenizer to tell"
                )
    size = min(group.vocab_size for group in groups)
    if words is not None and size <= max(words.values()):
        small = min(groups, key=lambda group: group.vocab_size)
        raise ValueError(
            f"{small.path!r} has {size} logits, fewer than the tokenizer of {target.path!r} has tokens ({max(words.values()) + 1})"
        )
    return size


def _vocabulary(group: Group) -> dict[str, int] | None:
    return None if group.tokenizer is None else group.tokenizer.get_vocab()


def _end_tokens(group: Group, vocab_size: int) -> tuple[int, ...]:
    """Tokens that end a text. Configurations name some that a model doesn't have: GPT-2's default is 50256, whatever its size."""
    eos: list[int] = []
    for source in (group.generation_config, group.config, group.tokenizer):
        value = getattr(source, "eos_token_id", None)
        eos += value if isinstance(value, list) else [] if value is None else [value]
    return tuple(token for token in dict.fromkeys(eos) if 0 <= token < vocab_size)
