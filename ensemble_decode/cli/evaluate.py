"""``ensemble-decode evaluate``: bias and quality of a model, alone and steered."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble_decode.cli.common import CommandError, add_model, load_model

if TYPE_CHECKING:
    from ensemble_decode.evaluation.metric import Metric

HELP = "bias and quality of a model, alone and steered, with confidence intervals"
METRICS = ("stereoset", "perplexity", "perplexity-huggingface", "crows_pairs", "redditbias")


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.description = "Measure the target alone (α = 0) and with its pairs. What is done is kept in --out."
    add_model(command)
    command.add_argument("--alpha", metavar="A,A,…", help="strengths of all pairs (default 0,1; without a pair 0)")
    command.add_argument("--data", required=True, help="folder of the corpora; what is missing there is said")
    command.add_argument(
        "--metrics", default="stereoset,perplexity", help=f"any of {', '.join(METRICS)} (default stereoset,perplexity)"
    )
    command.add_argument("--window", type=int, help="tokens of a perplexity window (default: the protocol's)")
    command.add_argument("--tokens", type=int, help="perplexity over the first so many tokens (default: all)")
    command.add_argument("--limit", type=int, help="a quick look: the first so many items of each metric")
    command.add_argument("--out", required=True, help="folder for records, report.json and report.md")
    command.add_argument("--json", action="store_true", help="print report.json instead of a table")


def run(args: argparse.Namespace) -> int:
    from ensemble_decode import SamplingParams
    from ensemble_decode.evaluation.metric import System
    from ensemble_decode.evaluation.report import to_json, to_markdown, to_text
    from ensemble_decode.evaluation.runner import make_tasks, run_tasks, write

    metrics = _metrics(args)
    alphas = _alphas(args)
    if args.limit is not None and args.limit < 1:
        raise CommandError(f"--limit is {args.limit}, allowed is 1 or more")
    data, out = Path(args.data).expanduser(), Path(args.out).expanduser()
    if not data.is_dir():
        raise FileNotFoundError(
            f"--data is {args.data!r}, which is no folder; docs/evaluation.md lists what goes in it"
        )
    llm = load_model(args)
    systems = [System("target" if a == 0 else f"α {a:g}", llm, SamplingParams(alpha=a)) for a in alphas]
    model = _model(args)
    tasks = make_tasks(systems, metrics, model, data, args.limit)
    try:
        results = run_tasks(tasks, data, out, args.limit, say=lambda line: print(line, file=sys.stderr))
    except KeyboardInterrupt:
        print(f"interrupted: what is done is kept in {out}, the same command goes on from there", file=sys.stderr)
        return 130
    about: dict[str, Any] = {"model": args.model, "pairs": ", ".join(args.pair) or "none", "dtype": args.dtype}
    about |= {"limit": args.limit, "tokens": args.tokens}
    write(out / "report.json", to_json(results, about))
    write(out / "report.md", to_markdown(results, about))
    if args.json:
        print(to_json(results, about), end="")
        return 0
    if args.limit is not None:
        print(f"a quick look: the first {args.limit} items of each metric\n")
    print(to_text(results))
    print(f"\n{out / 'report.md'}, {out / 'report.json'}")
    return 0


def _metrics(args: argparse.Namespace) -> list[Metric]:
    from ensemble_decode.evaluation.crows_pairs import CrowsPairs
    from ensemble_decode.evaluation.perplexity import Perplexity
    from ensemble_decode.evaluation.redditbias import RedditBias
    from ensemble_decode.evaluation.stereoset import StereoSet

    known: dict[str, Metric] = {
        "stereoset": StereoSet(),
        "perplexity": Perplexity("paper", window=args.window, tokens=args.tokens),
        "perplexity-huggingface": Perplexity("huggingface", window=args.window, tokens=args.tokens),
        "crows_pairs": CrowsPairs(),
        "redditbias": RedditBias(),
    }
    names = dict.fromkeys(name.strip() for name in args.metrics.split(","))
    for name in names:
        if name not in known:
            raise CommandError(f"--metrics names {name!r}, allowed are {', '.join(METRICS)}")
    return [known[name] for name in names]


def _alphas(args: argparse.Namespace) -> list[float]:
    if args.alpha is None:
        return [0.0, 1.0] if args.pair else [0.0]
    try:
        alphas = list(dict.fromkeys(float(part) for part in args.alpha.split(",")))
    except ValueError:
        raise CommandError(f"--alpha is {args.alpha!r}, allowed are numbers with commas between") from None
    if not args.pair and any(alphas):
        raise CommandError(f"--alpha is {args.alpha!r} without a --pair, allowed is 0")
    return alphas


def _model(args: argparse.Namespace) -> dict[str, Any]:
    """What identifies the weights that are measured."""
    from ensemble_decode.cli.common import SMOLLM2
    from ensemble_decode.demo import PAIR
    from ensemble_decode.evaluation.runner import fingerprint
    from ensemble_decode.models.smollm2 import smollm2_path

    pairs = {}
    for text in args.pair:
        name, _, paths = text.partition("=")
        sides = [str(PAIR / "expert"), str(PAIR / "anti_expert")] if paths == "demo" else paths.split(",")
        pairs[name] = [fingerprint(side) for side in sides]
    target = smollm2_path() if args.model == SMOLLM2 else args.model
    base = None if args.base is None else fingerprint(args.base)
    return {"target": fingerprint(target), "pairs": pairs, "base": base, "dtype": args.dtype}
