"""``ensemble-decode explain``: what every pair did to every token of a continuation."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ensemble_decode.cli.common import add_model, load_model, parse_alpha, refuse_missing

HELP = "what every pair did to every token of a continuation"


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Continue a prompt and show why each token was chosen: in the terminal, as a page, JSON or CSV."
    )
    command.add_argument("prompt", help="the text to continue")
    add_model(command)
    command.add_argument("-a", "--alpha", help="a number, name=number,… or @calibration.json (default: the pair's, 1)")
    command.add_argument("--max-tokens", type=int, default=24, help="new tokens (default 24)")
    command.add_argument("-t", "--temperature", type=float, default=1.0, help="0 is greedy (default 1)")
    command.add_argument("--top-p", type=float, default=0.9, help="nucleus (default 0.9, the paper's)")
    command.add_argument("--top-k", type=int, default=0, help="0: off")
    command.add_argument("--min-p", type=float, default=0.0, help="0: off")
    command.add_argument("--nucleus", default="combined", help="combined or target")
    command.add_argument("--repetition-penalty", type=float, default=1.0, help="1: off")
    command.add_argument("--seed", type=int, default=0, help="same seed, same text (default 0)")
    command.add_argument("--top", type=int, default=5, help="tokens listed that moved most, each way (default 5)")
    command.add_argument("--html", metavar="FILE", help="also write a self-contained page")
    command.add_argument("--csv", metavar="FILE", help="also write a table: a row a step and token")
    command.add_argument("--json", action="store_true", help="one JSON object instead of the table")


def run(args: argparse.Namespace) -> int:
    from ensemble_decode import SamplingParams

    for flag, wanted, package in (("--html", args.html, "jinja2"), ("--csv", args.csv, "pandas")):
        if wanted:
            refuse_missing(flag, package, extra="report")
    params = SamplingParams(
        alpha=parse_alpha(args.alpha),
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        nucleus=args.nucleus,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )
    explanation = load_model(args).explain(args.prompt, params, top=args.top)
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(explanation.to_json() if args.json else explanation.to_terminal(color))
    if args.html:
        explanation.save_html(args.html)
        print(f"wrote {args.html}", file=sys.stderr)
    if args.csv:
        Path(args.csv).write_text(explanation.to_pandas().to_csv(index=False), encoding="utf-8")
        print(f"wrote {args.csv}", file=sys.stderr)
    return 0
