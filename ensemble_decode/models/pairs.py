"""Expert pairs: what steers the target, as the user names it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path

#: The largest float32: what α becomes on its way to the sampler.
FLOAT32_MAX = (2 - 2**-23) * 2.0**127


@dataclass(frozen=True, slots=True)
class ExpertPair:
    """An expert and an anti-expert whose difference of logits, times α, is added to the target's.

    Parameters
    ----------
    expert, anti_expert : str or path, optional
        Each a full model (hub id or folder) or a LoRA adapter folder in PEFT's format. Without an anti-expert the
        target's own logits take its place, z + α(z⁺ − z); without an expert (None) likewise, z + α(z − z⁻).
    base : str or path, optional
        The model under LoRA adapters. Default: the target.
    alpha : float
        Weight of the pair in requests that do not set their own.
    expert_prompt, anti_expert_prompt : str, optional
        Prompts of the sides' own, set by :meth:`from_prompts`.

    Notes
    -----
    The formula is DExperts' (Liu et al. 2021) and arXiv 2412.01711's; with prompts instead of models it is
    classifier-free guidance (arXiv 2306.17806) and context-aware decoding (arXiv 2305.14739).
    """

    expert: str | None
    anti_expert: str | None = None
    base: str | None = None
    alpha: float = 1.0
    expert_prompt: str | None = None
    anti_expert_prompt: str | None = None

    def __init__(
        self,
        expert: str | PathLike[str] | None,
        anti_expert: str | PathLike[str] | None = None,
        base: str | PathLike[str] | None = None,
        alpha: float = 1.0,
        *,
        expert_prompt: str | None = None,
        anti_expert_prompt: str | None = None,
    ) -> None:
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not -FLOAT32_MAX <= alpha <= FLOAT32_MAX:
            raise ValueError(f"ExpertPair: alpha is {alpha!r}, a finite number (of float32) is allowed")
        sides = {"expert": expert, "anti_expert": anti_expert, "base": base}
        for name, value in sides.items():
            if value is not None and not isinstance(value, str | PathLike):
                raise ValueError(f"ExpertPair: {name} is {value!r}, a model id, a folder or None is allowed")
        for name, prompt in (("expert_prompt", expert_prompt), ("anti_expert_prompt", anti_expert_prompt)):
            if prompt is not None and not isinstance(prompt, str):
                raise ValueError(f"ExpertPair: {name} is {prompt!r}, a string or None is allowed")
        if expert is None and expert_prompt is None and anti_expert is None and anti_expert_prompt is None:
            raise ValueError("ExpertPair: expert is None, a model, an adapter folder or prompts are needed")
        put = object.__setattr__
        put(self, "expert", None if expert is None else fspath(expert))
        put(self, "anti_expert", None if anti_expert is None else fspath(anti_expert))
        put(self, "base", None if base is None else fspath(base))
        put(self, "alpha", float(alpha))
        put(self, "expert_prompt", expert_prompt)
        put(self, "anti_expert_prompt", anti_expert_prompt)

    @classmethod
    def from_folder(cls, folder: str | PathLike[str], base: str | PathLike[str] | None = None) -> ExpertPair:
        """A pair as ``ensemble-decode train`` writes it: ``expert/``, ``anti_expert/`` and ``pair.json`` with its α.

        Parameters
        ----------
        base : str or path, optional
            The model under LoRA adapters. Default: the target.

        Raises
        ------
        ValueError
            If the folder is no such pair, for example because its training has not finished.
        """
        path = Path(folder)
        try:
            alpha = json.loads((path / "pair.json").read_text(encoding="utf-8"))["alpha"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(
                f"{str(path)!r} is no pair: a pair.json with alpha is needed (is training done?)"
            ) from None
        for side in ("expert", "anti_expert"):
            if not (path / side).is_dir():
                raise ValueError(f"{str(path)!r} is no pair: the folder {side} is missing")
        return cls(path / "expert", path / "anti_expert", base, alpha)

    @classmethod
    def from_paths(cls, paths: Sequence[str], base: str | PathLike[str] | None = None) -> ExpertPair:
        """A pair as command lines name it: the folder of a trained one, or one or two sides (models or adapters)."""
        if len(paths) == 1 and Path(paths[0], "pair.json").is_file():
            return cls.from_folder(paths[0], base)
        return cls(paths[0], paths[1] if len(paths) == 2 else None, base)

    @classmethod
    def from_prompts(cls, expert: str | None = None, anti_expert: str | None = None, alpha: float = 1.0) -> ExpertPair:
        """A pair made of prompts over the target's own weights.

        Parameters
        ----------
        expert, anti_expert : str, optional
            Prompt that this side sees in place of the request's; ``"{prompt}"`` stands for the request's prompt.
            None: the request's own prompt. An empty ``anti_expert`` is no prompt at all: the beginning-of-text token, or the
            prompt's last token where the tokenizer has none. A request can bring its own with ``{"prompt": …, "pair_prompts":
            {pair: {"expert": …, "anti_expert": …}}}``.
        alpha : float
            Guidance: Hugging Face's ``guidance_scale`` minus one.

        Examples
        --------
        >>> ExpertPair.from_prompts(anti_expert="A sexist joke: {prompt}").anti_expert_prompt
        'A sexist joke: {prompt}'
        """
        if expert is None and anti_expert is None:
            raise ValueError(
                "ExpertPair.from_prompts: expert and anti_expert are both None, at least one prompt is needed"
            )
        return cls(None, None, None, alpha, expert_prompt=expert or None, anti_expert_prompt=anti_expert)

    @property
    def uses_prompts(self) -> bool:
        return self.expert_prompt is not None or self.anti_expert_prompt is not None
