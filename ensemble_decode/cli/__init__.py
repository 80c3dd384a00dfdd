"""The command line: ``ensemble-decode COMMAND``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from ensemble_decode.cli.common import INTERRUPTED

#: Each command and its module, which has HELP, add_arguments(parser) and run(args), perhaps PARSER, the
#: parser's own settings, and is cheap to import.
COMMANDS = {
    "demo": "ensemble_decode.demo",
    "generate": "ensemble_decode.cli.generate",
    "explain": "ensemble_decode.cli.explain",
    "lm-eval": "ensemble_decode.cli.lm_eval",
    "bench": "ensemble_decode.cli.bench",
    "train": "ensemble_decode.cli.train",
    "calibrate": "ensemble_decode.cli.calibrate",
    "evaluate": "ensemble_decode.cli.evaluate",
    "distill": "ensemble_decode.cli.distill",
    "trigger": "ensemble_decode.cli.trigger",
}

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
  ensemble-decode explain "The nurse said that" --pair gender=demo --html why.html
      what every pair did to every token, in the terminal and as a page
  ensemble-decode generate --speculate ngram -f prompts.txt
      the same text, sooner where it repeats itself
  ensemble-decode bench --pair gender=demo --batch 1 8 32
      tokens a second on this machine, plain and steered
  ensemble-decode train out/gender --redditbias data --axis gender
      an expert pair from RedditBias; --pair gender=out/gender takes it as it is
  ensemble-decode evaluate --pair gender=demo --alpha 0,1,2 --data corpora --out out/evaluation
      StereoSet and perplexity against α, with confidence intervals
  ensemble-decode calibrate --pair gender=out/gender --pair race=out/race --data corpora --out out/calibration
      the alpha of each axis: stereotype scores towards 50, sense kept (the highest ICAT), within a budget of perplexity
  ensemble-decode distill --data data --out classifiers
      stand-ins for the regard and toxicity classifiers, with their measured fidelity
  ensemble-decode trigger --data data --out trigger.json
      the tokens of the Trigger baseline, searched by gradients
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return 141
    except (ValueError, OSError) as error:
        print(f"ensemble-decode: {_message(error)}", file=sys.stderr)
        return 2


def _message(error: ValueError | OSError) -> str:
    """An error of the system as the thing and what is wrong with it; others are written that way."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{str(error.filename)!r}: {error.strerror}"
    return str(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ensemble-decode",
        description="Steer a language model while it decodes: the next token is sampled from softmax(z + Σ α(z⁺ − z⁻)), "
        "where z⁺ and z⁻ are the logits of small expert and anti-expert models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar=" | ".join(COMMANDS))
    for name, path in COMMANDS.items():
        module = importlib.import_module(path)
        command = commands.add_parser(name, help=module.HELP, **getattr(module, "PARSER", {}))
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
