"""``ensemble-decode bench``: tokens a second on this machine."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from ensemble_decode.cli.common import CommandError, add_model, load_model, parse_alpha

HELP = "tokens a second on this machine"


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.description = "Time decoding, plain and (with --pair) steered."
    add_model(command)
    command.add_argument("--alpha", default="1", help="α of the steered runs: a number, or name=number,… (default 1)")
    command.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="batch sizes (default 1 8 32)")
    command.add_argument("--prompt-tokens", type=int, default=128, help="prompt length (default 128)")
    command.add_argument("--new-tokens", type=int, default=64, help="tokens to generate (default 64)")
    command.add_argument("--rounds", type=int, default=3, help="timed rounds; medians are printed (default 3)")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ensemble_decode import SamplingParams
    from ensemble_decode.benchmarking import compare

    for name, value, least in (
        ("--batch", min(args.batch), 1),
        ("--prompt-tokens", args.prompt_tokens, 1),
        ("--new-tokens", args.new_tokens, 2),
        ("--rounds", args.rounds, 1),
    ):
        if value < least:
            raise CommandError(f"{name} is {value}, allowed is {least} or more")
    if max(args.batch) > args.max_num_seqs:
        raise CommandError(
            f"--batch is {max(args.batch)}, allowed is --max-num-seqs ({args.max_num_seqs}) or less: the rest would wait"
        )
    llm = load_model(args)
    settings: list[tuple[str, Any]] = [("target alone", 0.0)]
    if args.pair:
        settings.append(("steered", parse_alpha(args.alpha)))
    results = []
    speculator = llm.engine.speculator
    modes = [None] if speculator is None else [None, speculator]  # without and with, in turns
    with tqdm(total=len(settings) * len(args.batch), disable=args.json or not sys.stderr.isatty()) as bar:
        for batch in args.batch:
            for label, alpha in settings:
                params = SamplingParams(alpha=alpha, top_p=0.9, seed=1)
                found = compare(llm, modes, batch, args.prompt_tokens, args.new_tokens, params, args.rounds)
                for mode, entry in zip(modes, found, strict=True):
                    results.append({"setting": label, "speculates": mode is not None, **entry.as_dict()})
                bar.update()
    if args.json:
        print(json.dumps(results, indent=1))
        return 0
    print(f"{'':14}{'batch':>6}{'tok/s':>9}{'decode tok/s':>14}{'step, ms':>10}{'first token, ms':>17}{'overhead':>10}")
    for result in results:
        print(
            f"{result['setting']:14}{result['batch']:>6}{result['tokens_per_s']:>9.0f}{result['decode_tokens_per_s']:>14.0f}"
            f"{result['step_s'] * 1e3:>10.1f}{result['first_token_s'] * 1e3:>17.0f}{result['overhead']:>10.1%}"
            + _speculation(result)
        )
    return 0


def _speculation(result: dict[str, Any]) -> str:
    """What a speculating run did; its "step" is the time of one token a sequence."""
    if not result["speculates"]:
        return ""
    if not result["drafted"]:
        return "  speculating: nothing drafted"
    return (
        f"  speculating: {result['accepted'] / result['drafted']:.0%} of {result['drafted']} accepted, "
        f"{result['tokens_per_forward']:.2f} tokens a forward, {result['saved_s']:.2f} s saved"
    )
