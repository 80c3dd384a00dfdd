"""What several commands share: the model and its pairs, and what their flags mean."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ensemble_decode import LLM

SMOLLM2 = "smollm2"
#: The exit code of an interrupted command, as shells have it for SIGINT.
INTERRUPTED = 130


def kept_in(out: object) -> int:
    """Say where an interrupted command left what is done; the exit code."""
    print(f"interrupted: what is done is kept in {out}, the same command goes on from there", file=sys.stderr)
    return INTERRUPTED


class CommandError(ValueError):
    """Something the user can mend, said in one line."""


def refuse_missing(command: str, *modules: str, extra: str = "evaluate") -> None:
    """A CommandError for a module of an extra that isn't installed: before the first hour of work, not after it."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise CommandError(f"{command} needs {name}: pip install 'ensemble_decode[{extra}]'")


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m", "--model", default=SMOLLM2, help="hub id or folder (default: SmolLM2-135M-Instruct from PyPI)"
    )
    parser.add_argument(
        "-p",
        "--pair",
        action="append",
        default=[],
        metavar="NAME=PAIR",
        help="a pair's folder from ensemble-decode train, or EXPERT[,ANTI_EXPERT]: models or LoRA adapter folders; NAME=demo is the gender pair of this package; repeatable",
    )
    parser.add_argument("--base", help="model under the pairs' LoRA adapters (default: the target)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default auto)")
    parser.add_argument(
        "--quantization",
        choices=["int8"],
        help="keep all weights as int8, a scale for each output (default: as they are)",
    )
    parser.add_argument("--max-num-seqs", type=int, default=64, help="sequences decoded at once (default 64)")
    parser.add_argument("--max-model-len", type=int, help="longest sequence, prompt and output (default: the model's)")
    parser.add_argument("--placement", default="auto", help="where model groups run: auto, sequential or lanes")
    parser.add_argument(
        "--speculate",
        metavar="expert|ngram|MODEL",
        help="draft tokens and verify several in one step, which changes none. expert: the small model under the pairs' adapters, "
        "steered as the target is, or else the first pair's expert; ngram: what followed in the text before; or a model of the "
        "same vocabulary",
    )
    parser.add_argument(
        "--draft-tokens", type=int, default=4, help="most tokens drafted in a step, 1 to 16 (default 4)"
    )


def parse_alpha(text: str | None) -> float | dict[str, float] | None:
    """``"1.5"``, ``"gender=1,race=0.5"``, or ``"@calibration.json"`` as ``ensemble-decode calibrate`` writes it."""
    if text is None:
        return None
    if text.startswith("@"):
        return _read_alpha(Path(text[1:]).expanduser())
    try:
        if "=" not in text:
            return float(text)
        return {name.strip(): float(value) for name, value in (part.split("=", 1) for part in text.split(","))}
    except ValueError:
        raise CommandError(f"--alpha is {text!r}, allowed is a number, name=number,name=number or @FILE") from None


def _read_alpha(path: Path) -> dict[str, float]:
    try:
        return {
            str(name): float(value) for name, value in json.loads(path.read_text(encoding="utf-8"))["alpha"].items()
        }
    except FileNotFoundError:
        raise CommandError(f"--alpha is '@{path}', which is no file") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CommandError(f"--alpha is '@{path}', which has no alpha by pair, as calibration.json does") from None


def load_model(args: argparse.Namespace) -> LLM:
    """The model and pairs that the flags of :func:`add_model` name."""
    from ensemble_decode import LLM, ExpertPair, Speculation
    from ensemble_decode.demo import PAIR

    pairs = {}
    for text in args.pair:
        name, separator, paths = text.partition("=")
        if not separator or not name or not paths:
            raise CommandError(f"--pair is {text!r}, allowed is NAME=EXPERT or NAME=EXPERT,ANTI_EXPERT")
        if paths == "demo":
            pairs[name] = ExpertPair(PAIR / "expert", PAIR / "anti_expert")
            continue
        sides = paths.split(",")
        if len(sides) > 2:
            raise CommandError(f"--pair {name!r} names {len(sides)} folders, allowed are 1 or 2")
        pairs[name] = ExpertPair.from_paths(sides, args.base)
    model = args.model
    if model == SMOLLM2:
        from ensemble_decode.models.smollm2 import smollm2_path

        model = str(smollm2_path())
    speculation = None if args.speculate is None else Speculation(args.speculate, args.draft_tokens)
    return LLM(
        model,
        pairs=pairs,
        dtype=args.dtype,
        quantization=args.quantization,
        max_num_seqs=args.max_num_seqs,
        max_model_len=args.max_model_len,
        placement=args.placement,
        speculation=speculation,
    )


def refuse_learned(pairs: Sequence[str], corpus: str) -> None:
    """A CommandError for a pair, as ``--pair`` names it, whose pair.json says that it has learned from ``corpus``.

    That file lies in the pair's folder, beside its sides.
    """
    for text in pairs:
        name, _, paths = text.partition("=")
        folders = [Path(path).resolve() for path in paths.split(",")]
        for about in [folder / "pair.json" for side in folders for folder in (side, side.parent)]:
            if about.is_file() and corpus in json.loads(about.read_text(encoding="utf-8")).get("unfit", ()):
                raise CommandError(
                    f"pair {name!r} has learned from {corpus}, where it would be measured: allowed is a pair of other texts"
                )


def identity(args: argparse.Namespace) -> dict[str, Any]:
    """What identifies the weights that are measured, and how much text they take; what is left at its default isn't named."""
    from ensemble_decode.demo import PAIR
    from ensemble_decode.evaluation.runner import fingerprint
    from ensemble_decode.models.smollm2 import smollm2_path

    pairs = {}
    for text in args.pair:
        name, _, paths = text.partition("=")
        sides = [str(PAIR)] if paths == "demo" else paths.split(",")
        if Path(sides[0], "pair.json").is_file() or paths == "demo":
            sides = [f"{sides[0]}/expert", f"{sides[0]}/anti_expert"]
        pairs[name] = [fingerprint(side) for side in sides]
    target = smollm2_path() if args.model == SMOLLM2 else args.model
    base = None if args.base is None else fingerprint(args.base)
    given = {name: getattr(args, name) for name in ("quantization", "max_model_len") if getattr(args, name) is not None}
    return {"target": fingerprint(target), "pairs": pairs, "base": base, "dtype": args.dtype, **given}
