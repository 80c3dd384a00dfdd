"""The Trigger baseline (Sheng et al. 2020): a few tokens before every prompt that turn generated text away from bias.

The search is HotFlip (Ebrahimi et al. 2018) as in universal adversarial triggers (Wallace et al. 2019): the gradient of the
loss at the trigger's embeddings ranks all replacements of a token to first order, and the best few are tried.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ensemble_decode.evaluation.metric import System

#: The triggers of arXiv 2412.01711, by target.
PUBLISHED = {"gpt2": "MSN Canaveral龍喚士龍喚士 TAMADRAoried", "gpt2-medium": "Rail pridely Scot Finished midrange"}


@dataclass(frozen=True, slots=True)
class Example:
    """A continuation to make likelier (weight > 0) or unlikelier (weight < 0) after trigger and prompt."""

    prompt: str
    continuation: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """How a trigger is searched: its length, sweeps over its tokens, replacements tried per token, examples per step."""

    length: int = 6
    sweeps: int = 5
    candidates: int = 20
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("length", "sweeps", "candidates", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}, allowed is 1 or more")


@dataclass(slots=True)
class SearchState:
    """Where a search stands: steps done, the tokens now, and the loss over all examples, at the start and after sweeps."""

    step: int
    tokens: list[int]
    losses: list[float]


def with_trigger(system: System, trigger: str) -> System:
    """The system with a trigger before every prompt and no space after it."""
    return replace(system, name=f"{system.name} + trigger", prefix=trigger)


class TriggerSearch:
    """A search over a causal language model of transformers.

    The loss is −Σ weight · mean log p(continuation token) over the examples, divided by their number.

    Parameters
    ----------
    model, tokenizer
        The target. The model is put in evaluation mode and its parameters are frozen.
    examples : sequence of Example
        E.g. continuations of either group's prompts: of neutral and positive regard at weight 1, negative at −1.
    settings : SearchSettings, optional
    state_file : Path, optional
        Written after every step; a search that finds it goes on from there.

    Raises
    ------
    ValueError
        No examples, one without tokens, or a state file of another search.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        examples: Sequence[Example],
        settings: SearchSettings | None = None,
        state_file: Path | None = None,
    ) -> None:
        if not examples:
            raise ValueError("examples is empty, allowed is 1 or more")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.settings = settings or SearchSettings()
        self.state_file = state_file
        self.embeddings: torch.Tensor = model.get_input_embeddings().weight
        self._rows = [self._encode(index, example) for index, example in enumerate(examples)]
        self._allowed = self._allowed_tokens()
        self._state: SearchState | None = None

    @property
    def losses(self) -> list[float]:
        """Over all examples, at the start and after each sweep; empty before the first."""
        state = self._state
        return [] if state is None else list(state.losses)

    def run(self) -> str:
        """Search to the end, or go on where a search was stopped; the best trigger as text."""
        settings = self.settings
        state = self._state = self._load() or self._start()
        with tqdm(total=settings.sweeps * settings.length, initial=state.step, desc="trigger", unit="token") as bar:
            while state.step < settings.sweeps * settings.length:
                position = state.step % settings.length
                state.tokens = self._improve(state, position)
                state.step += 1
                if position == settings.length - 1:
                    state.losses.append(self.loss(state.tokens))
                    bar.set_postfix(loss=f"{state.losses[-1]:.4f}")
                self._save(state)
                bar.update()
        return self.tokenizer.decode(state.tokens)

    @torch.no_grad()
    def loss(self, tokens: Sequence[int]) -> float:
        """The loss of a trigger over all examples."""
        size = self.settings.batch_size
        embedded = self.embeddings[list(tokens)]
        total = sum(
            float(self._batch_loss(embedded, self._rows[i : i + size])) * len(self._rows[i : i + size])
            for i in range(0, len(self._rows), size)
        )
        return total / len(self._rows)

    def gradient(self, tokens: Sequence[int], rows: Sequence[tuple[list[int], int, float]]) -> torch.Tensor:
        """Gradient of the loss at the trigger's embeddings, [length, width]."""
        embedded = self.embeddings[list(tokens)].clone().requires_grad_()
        return torch.autograd.grad(self._batch_loss(embedded, rows), embedded)[0]

    def _improve(self, state: SearchState, position: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + state.step)
        chosen = torch.randperm(len(self._rows), generator=generator)[: self.settings.batch_size].tolist()
        rows = [self._rows[i] for i in chosen]
        # First order: replacing token a by b changes the loss by (e_b − e_a)·∇; e_a is the same for all b.
        change = self.embeddings @ self.gradient(state.tokens, rows)[position]
        change[~self._allowed] = torch.inf
        best = state.tokens
        with torch.no_grad():
            least = float(self._batch_loss(self.embeddings[best], rows))
            for token in change.topk(min(self.settings.candidates, int(self._allowed.sum())), largest=False).indices:
                tokens = [*state.tokens[:position], int(token), *state.tokens[position + 1 :]]
                if not self._round_trips(tokens):
                    continue
                value = float(self._batch_loss(self.embeddings[tokens], rows))
                if value < least:
                    best, least = tokens, value
        return best

    def _batch_loss(self, trigger: torch.Tensor, rows: Sequence[tuple[list[int], int, float]]) -> torch.Tensor:
        longest = max(len(ids) for ids, _, _ in rows)
        ids = torch.tensor([row + [0] * (longest - len(row)) for row, _, _ in rows])
        # Padding stands on the right: a causal model's earlier tokens don't see it.
        inputs = torch.cat([trigger.expand(len(rows), -1, -1), self.embeddings[ids]], dim=1)
        logprobs = self.model(inputs_embeds=inputs).logits[:, len(trigger) - 1 : -1].float().log_softmax(-1)
        picked = logprobs.gather(-1, ids[..., None])[..., 0]
        terms = [weight * picked[i, start : len(row)].mean() for i, (row, start, weight) in enumerate(rows)]
        return -torch.stack(terms).mean()

    def _encode(self, index: int, example: Example) -> tuple[list[int], int, float]:
        prompt = self.tokenizer(example.prompt, add_special_tokens=False)["input_ids"]
        continuation = self.tokenizer(example.continuation, add_special_tokens=False)["input_ids"]
        if not continuation:
            raise ValueError(f"example {index} has a continuation of no tokens, allowed is 1 or more")
        return [*prompt, *continuation], len(prompt), example.weight

    def _allowed_tokens(self) -> torch.Tensor:
        """Tokens that are text by themselves: no special ones, no rows beyond the vocabulary."""
        allowed = torch.zeros(len(self.embeddings), dtype=torch.bool)
        allowed[: len(self.tokenizer)] = True
        allowed[list(self.tokenizer.all_special_ids)] = False
        return allowed

    def _round_trips(self, tokens: list[int]) -> bool:
        """Whether the trigger, which is used as text, becomes these tokens again."""
        return self.tokenizer(self.tokenizer.decode(tokens), add_special_tokens=False)["input_ids"] == tokens

    def _start(self) -> SearchState:
        """Wallace et al.: the same common word, repeated."""
        ids = self.tokenizer(" the", add_special_tokens=False)["input_ids"]
        tokens = (ids * self.settings.length)[: self.settings.length]
        return SearchState(0, tokens, [self.loss(tokens)])

    def _load(self) -> SearchState | None:
        if self.state_file is None or not self.state_file.is_file():
            return None
        kept = json.loads(self.state_file.read_text(encoding="utf-8"))
        if kept["search"] != self._key():
            raise ValueError(
                f"state_file {str(self.state_file)!r} is of a search with other settings, examples or model: "
                "remove it or name another"
            )
        return SearchState(kept["step"], kept["tokens"], kept["losses"])

    def _save(self, state: SearchState) -> None:
        if self.state_file is not None:
            self.state_file.parent.mkdir(parents=True, exist_ok=True)
            part = self.state_file.with_suffix(".part")
            part.write_text(json.dumps({"search": self._key(), **asdict(state)}), encoding="utf-8")
            part.replace(self.state_file)

    def _key(self) -> dict[str, Any]:
        settings = asdict(self.settings)
        del settings["sweeps"]  # more sweeps go on from fewer
        examples = hashlib.sha256(json.dumps(self._rows).encode()).hexdigest()
        return {**settings, "examples": examples, "model": self._weights}

    @cached_property
    def _weights(self) -> str:
        digest = hashlib.sha256()
        for parameter in self.model.parameters():
            digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()
