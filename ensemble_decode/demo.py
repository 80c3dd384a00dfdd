"""``ensemble-decode demo``: one model, one expert pair, several strengths side by side."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ensemble_decode import LLM

PAIR = Path(__file__).parent / "data" / "pairs" / "gender"
PROMPTS = (
    "The nurse said that",
    "The engineer fixed the bug because",
    "The woman worked as a",
    "The man worked as a",
    "The truck driver stopped because",
)
ALPHAS = (0.0, 0.5, 1.0, 2.0)
TEMPERATURE = 0.7
TOP_P = 0.9
# Far more than can carry visible probability: a token outside this list is shown as 0.0 %.
_TOP_TOKENS = 200
_MOST_MOVED = 5
_NARROWEST_COLUMN = 22
_GUTTER = "  "
_COLOURS = {
    "she her hers herself woman women girl girls lady mother": "35",
    "he him his himself man men boy boys father": "36",
}
_COLOUR_OF = {word: code for words, code in _COLOURS.items() for word in words.split()}


@dataclass(frozen=True, slots=True)
class Steered:
    """What one α gave: a text for each prompt, and how fast all of them came."""

    alpha: float
    texts: list[str]
    tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Moved:
    """A possible next token, with its probability under the model and under the ensemble."""

    token: str
    target: float
    ensemble: float

    @property
    def change(self) -> float:
        return self.ensemble - self.target


HELP = "a real model steered by a real expert pair, side by side"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags, for ``ensemble_decode.cli``."""
    parser.description = (
        "Continue a handful of prompts at several strengths α of one expert pair: the next token is sampled from "
        "softmax(z + α(z⁺ − z⁻)). Without options: SmolLM2-135M-Instruct from PyPI and the gender pair of this package."
    )
    parser.add_argument(
        "-m", "--model", help="hub id or folder (default: SmolLM2-135M-Instruct, from the PyPI package)"
    )
    parser.add_argument(
        "-p",
        "--pair",
        metavar="PAIR",
        help="a pair's folder from ensemble-decode train, or EXPERT[,ANTI_EXPERT]: models or LoRA adapter folders (default: the gender pair)",
    )
    parser.add_argument(
        "-a", "--alpha", type=float, nargs="+", default=list(ALPHAS), metavar="α", help="strengths (default 0 0.5 1 2)"
    )
    parser.add_argument("--prompt", action="append", help="text to continue; repeatable (default: five of our own)")
    parser.add_argument("--max-tokens", type=int, default=20, help="new tokens for each text (default 20)")
    parser.add_argument("--seed", type=int, default=8, help="same seed, same text (default 8; prompt i takes seed + i)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default auto)")
    parser.add_argument("--json", action="store_true", help="one JSON object, for a program to read")


def run(args: argparse.Namespace) -> int:
    """Run the demo with parsed flags.

    Raises
    ------
    ValueError
        A flag out of range, a model or pair that can't be loaded: one line.
    """
    for alpha in args.alpha:
        if not math.isfinite(alpha):
            raise ValueError(f"--alpha is {alpha}, finite numbers are allowed")
    if args.max_tokens < 1:
        raise ValueError(f"--max-tokens is {args.max_tokens}, allowed is 1 or more")
    sides = args.pair.split(",") if args.pair else [str(PAIR / "expert"), str(PAIR / "anti_expert")]
    if len(sides) > 2 or not all(sides):
        raise ValueError(f"--pair is {args.pair!r}, allowed is a pair's folder, EXPERT or EXPERT,ANTI_EXPERT")
    prompts = args.prompt or list(PROMPTS)

    start = time.perf_counter()
    llm = load(args.model, sides, args.dtype, max_num_seqs=max(8, len(prompts)))
    loaded = time.perf_counter() - start
    steered = [continue_all(llm, prompts, alpha, args.max_tokens, args.seed) for alpha in args.alpha]
    strongest = max(args.alpha, key=abs)
    moved = {prompt: most_moved(llm, prompt, strongest) for prompt in prompts}
    if args.json:
        print(
            json.dumps(
                {
                    "prompts": prompts,
                    "seed": args.seed,
                    "load_s": loaded,
                    "steered": [{**asdict(one), "tokens_per_s": one.tokens_per_s} for one in steered],
                    "moved": {
                        "alpha": strongest,
                        "prompts": {prompt: [asdict(token) for token in tokens] for prompt, tokens in moved.items()},
                    },
                },
                indent=1,
                ensure_ascii=False,
            )
        )
        return 0
    page = Page(shutil.get_terminal_size((100, 24)).columns, sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    for line in introduction(page, args.model, args.pair is None):
        print(line)
    for i, prompt in enumerate(prompts):
        print()
        for line in page.side_by_side(prompt, [(f"α = {s.alpha:g}", s.texts[i]) for s in steered]):
            print(line)
    print()
    for line in (*moved_table(page, moved, strongest), "", *speed_table(page, steered, loaded), "", *farewell(page)):
        print(line)
    return 0


def load(model: str | None, sides: Sequence[str], dtype: str, max_num_seqs: int) -> LLM:
    """The target with one pair, named "demo"."""
    from ensemble_decode import LLM, ExpertPair

    if model is None:
        from ensemble_decode.models.smollm2 import smollm2_path

        model = str(smollm2_path())
    return LLM(
        model, pairs={"demo": ExpertPair.from_paths(sides)}, dtype=dtype, max_num_seqs=max_num_seqs, max_model_len=1024
    )


def continue_all(llm: LLM, prompts: list[str], alpha: float, max_tokens: int, seed: int) -> Steered:
    """All prompts in one batch at one α. A first token at that α, untimed, keeps start-up costs out of the speed."""
    from ensemble_decode import SamplingParams

    llm.generate(prompts[0], SamplingParams(alpha=alpha, max_tokens=1, seed=seed), use_tqdm=False)
    params = [
        SamplingParams(alpha=alpha, temperature=TEMPERATURE, top_p=TOP_P, max_tokens=max_tokens, seed=seed + i)
        for i in range(len(prompts))
    ]
    start = time.perf_counter()
    outputs = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    seconds = time.perf_counter() - start
    for output in outputs:
        if output.error is not None:
            raise ValueError(output.error)
    return Steered(alpha, [output.text for output in outputs], sum(len(o.token_ids) for o in outputs), seconds)


def most_moved(llm: LLM, prompt: str, alpha: float, count: int = _MOST_MOVED) -> list[Moved]:
    """The next tokens whose probability the pair changes most, the largest change first."""
    from ensemble_decode import SamplingParams

    params = [SamplingParams(alpha=a, max_tokens=1, logprobs=_TOP_TOKENS, seed=0) for a in (0.0, alpha)]
    plain, steered = (output.outputs[0].logprobs for output in llm.generate([prompt, prompt], params, use_tqdm=False))
    assert plain is not None
    assert steered is not None
    tokens = {}
    for token, item in plain[0].items():
        tokens[token] = Moved(item.decoded_token or "", math.exp(item.logprob), 0.0)
    for token, item in steered[0].items():
        tokens[token] = Moved(item.decoded_token or "", math.exp(item.target_logprob), math.exp(item.logprob))
    return sorted(tokens.values(), key=lambda moved: -abs(moved.change))[:count]


# ---- the page --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Page:
    """A terminal: its width, and whether it shows colours."""

    width: int
    colour: bool

    def style(self, text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self.colour else text

    def strong(self, text: str) -> str:
        return self.style(text, "1")

    def faint(self, text: str) -> str:
        return self.style(text, "2")

    def gendered(self, text: str) -> str:
        """Gendered words in colour, the rest as it is."""

        def paint(match: re.Match[str]) -> str:
            code = _COLOUR_OF.get(match[0].lower())
            return self.style(match[0], code) if code else match[0]

        return re.sub(r"\w+", paint, text)

    def wrap(self, text: str) -> list[str]:
        return textwrap.wrap(text, min(self.width, 100))

    def side_by_side(self, title: str, entries: list[tuple[str, str]]) -> list[str]:
        """Texts in columns under their headings, or one below the other where the terminal is too narrow for that."""
        column = (self.width - len(_GUTTER) * len(entries)) // max(1, len(entries))
        lines = [self.strong(f"{title} …")]
        if column < _NARROWEST_COLUMN:
            indent = max(len(heading) for heading, _ in entries) + 4
            for heading, text in entries:
                first, *rest = textwrap.wrap(_one_line(text), max(20, self.width - indent)) or [""]
                lines.append(f"  {self.faint(heading.ljust(indent - 2))}{self.gendered(first)}")
                lines.extend(" " * indent + self.gendered(line) for line in rest)
            return lines
        lines.append(_GUTTER + _GUTTER.join(self.faint(heading.ljust(column)) for heading, _ in entries).rstrip())
        wrapped = [textwrap.wrap(_one_line(text), column, break_on_hyphens=False) for _, text in entries]
        for row in zip_longest(*wrapped, fillvalue=""):
            cells = (self.gendered(cell) + " " * (column - len(cell)) for cell in row)
            lines.append((_GUTTER + _GUTTER.join(cells)).rstrip())
        return lines


def introduction(page: Page, model: str | None, package_pair: bool) -> list[str]:
    lines = [page.strong(f"{model or 'SmolLM2-135M-Instruct'}, steered while it writes"), ""]
    text = (
        "Every next token is drawn from softmax(z + α(z⁺ − z⁻)): z are the model's own logits, z⁺ those of an expert "
        "and z⁻ those of an anti-expert. α = 0 is the model as it is. The same random numbers are used at every α, so "
        f"texts part only where the pair parts them. (Temperature {TEMPERATURE}, top-p {TOP_P}.)"
    )
    if package_pair:
        text += (
            " This pair is two small LoRA adapters over the same model: the expert learned sentences that turn gender "
            "stereotypes around, the anti-expert the same sentences with the stereotype."
        )
    return lines + page.wrap(text)


def moved_table(page: Page, moved: dict[str, list[Moved]], alpha: float) -> list[str]:
    """For each prompt the tokens that gained or lost most, with their probability before and after."""
    title = f"What the pair changed: probability of the next token, α = 0 → α = {alpha:g}"
    lines = [page.strong(title)]
    for prompt, tokens in moved.items():
        cells = [f"{m.token.strip() or repr(m.token)} {m.target:.1%} → {m.ensemble:.1%}" for m in tokens]
        body = textwrap.wrap("   ".join(c.replace(" ", "\u00a0") for c in cells), max(30, page.width - 4))
        lines.append(f"  {prompt} …")
        lines.extend("    " + page.gendered(line.replace("\u00a0", " ")) for line in body)
    return lines


def speed_table(page: Page, steered: list[Steered], loaded: float) -> list[str]:
    batch = len(steered[0].texts)
    lines = [page.strong(f"Speed: {batch} texts in one batch (loading took {loaded:.1f} s)")]
    alone = next((one.tokens_per_s for one in steered if one.alpha == 0), None)
    for one in steered:
        ratio = f"   {one.tokens_per_s / alone:4.0%} of the model alone" if alone and one.alpha else ""
        lines.append(f"  α = {one.alpha:<4g}{one.tokens_per_s:7.0f} tokens/s{ratio}")
    return lines


def farewell(page: Page) -> list[str]:
    return [page.faint('Yours:  ensemble-decode demo --prompt "My neighbour is a" --alpha 0 1 3   (more: --help)')]


def _one_line(text: str) -> str:
    return " ".join(text.split())
