"""``ensemble-decode train``: an expert pair from RedditBias, StereoSet or two files of text."""

from __future__ import annotations

import argparse
import json
import sys

from ensemble_decode.cli.common import SMOLLM2, CommandError, kept_in, refuse_missing

HELP = "an expert pair from RedditBias, StereoSet or two files of text"

_DESCRIPTION = """\
Train an expert and an anti-expert from the same weights with the same settings, so that only their texts differ. OUT
becomes a pair: expert/, anti_expert/, pair.json, README.md (the model card) and curve.png.
Killed or interrupted, the same command goes on from its last checkpoint and ends with the weights of an unbroken run.
"""
_EPILOG = """\
data, from a folder that you name (nothing is downloaded); several sources are read one after another:
  --redditbias DIR --axis gender        the expert reads counterfactuals, the anti-expert the biased originals
  --stereoset DIR --axis religion       anti-stereotypes and stereotypes (don't evaluate such a pair on StereoSet)
  --expert A --anti-expert B            a text a line, or .jsonl with {"text": ...}; if both have as many lines,
                                        line i of one is the counterpart of line i of the other

examples:
  ensemble-decode train out/gender --redditbias data --axis gender
  ensemble-decode train out/race --redditbias data --swap both --axis race --expert mine.txt --anti-expert other.txt
  ensemble-decode train out/full --redditbias data --axis gender --rank 0 --lr 2e-5
  ensemble-decode train out/polite --expert polite.txt --anti-expert rude.txt -m my/model
  ensemble-decode generate "The nurse said that" --pair gender=out/gender
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.description, command.epilog = _DESCRIPTION, _EPILOG
    command.add_argument("out", help="the pair's folder: new, or one whose training was interrupted")
    command.add_argument("-m", "--model", default=SMOLLM2, help="hub id or folder (default: SmolLM2-135M-Instruct)")
    data = command.add_argument_group("data")
    data.add_argument("--redditbias", metavar="DIR", help="folder of RedditBias, or one that has it as redditbias")
    data.add_argument("--stereoset", metavar="DIR", help="folder of StereoSet, or one that has it as stereoset")
    data.add_argument(
        "--axis", help="RedditBias: gender, race, religion, orientation; StereoSet: gender, profession, race, religion"
    )
    data.add_argument(
        "--swap",
        default="targets",
        help="RedditBias counterfactuals swap targets (groups), attr (what is said of them) or both (default targets)",
    )
    data.add_argument("--expert", metavar="FILE", help="what the expert reads")
    data.add_argument("--anti-expert", metavar="FILE", help="what the anti-expert reads")
    data.add_argument("--licence", default="not stated", help="licence of these files, for the model card")
    how = command.add_argument_group("training")
    how.add_argument("--rank", type=int, default=8, help="LoRA rank; 0 trains all weights (default 8)")
    how.add_argument("--steps", type=int, default=200, help="at most (default 200)")
    how.add_argument("--batch", type=int, default=8, help="texts a step (default 8)")
    how.add_argument("--lr", type=float, default=5e-4, help="peak learning rate (default 5e-4; 2e-5 suits --rank 0)")
    how.add_argument("--max-length", type=int, default=64, help="tokens of a text (default 64)")
    how.add_argument(
        "--evaluate-every", type=int, default=10, help="steps between validation and checkpoint (default 10)"
    )
    how.add_argument("--patience", type=int, default=3, help="stop after so many validations without gain (default 3)")
    how.add_argument("--validation", type=float, default=0.1, help="share of texts that validate (default 0.1)")
    how.add_argument("--seed", type=int, default=0, help="split, initial adapters and order of texts (default 0)")
    how.add_argument("--alpha", type=float, default=1.0, help="alpha that pair.json suggests (default 1)")
    how.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    corpora = [name for name in ("redditbias", "stereoset") if getattr(args, name)]
    if not (corpora or args.expert) or bool(args.expert) != bool(args.anti_expert):
        raise CommandError("a source is needed: --redditbias or --stereoset DIR, or --expert FILE --anti-expert FILE")
    if (args.axis is None) == bool(corpora):
        raise CommandError(f"--axis is {args.axis!r}, it is needed with --redditbias and --stereoset, and only there")
    refuse_missing("train", "accelerate", "matplotlib", *(["peft"] if args.rank else []), extra="train")
    from ensemble_decode.evaluation.report import columns
    from ensemble_decode.experts import texts, training

    parts = []
    if args.redditbias:
        parts.append(texts.from_redditbias(args.redditbias, args.axis, args.swap))
    if args.stereoset:
        parts.append(texts.from_stereoset(args.stereoset, args.axis))
    if args.expert:
        parts.append(texts.from_files(args.expert, args.anti_expert, args.licence))
    data = texts.joined(parts)
    settings = training.TrainingSettings(
        rank=args.rank,
        steps=args.steps,
        batch_size=args.batch,
        learning_rate=args.lr,
        max_length=args.max_length,
        evaluate_every=args.evaluate_every,
        patience=args.patience,
        validation=args.validation,
        seed=args.seed,
        alpha=args.alpha,
    )
    model, name = args.model, None
    if model == SMOLLM2:
        from ensemble_decode.models.smollm2 import HUB_ID, smollm2_path

        model, name = str(smollm2_path()), HUB_ID
    progress = not args.quiet and sys.stderr.isatty()
    try:
        out = training.train_pair(
            model,
            data,
            args.out,
            settings,
            base_name=name,
            say=lambda line: print(line, file=sys.stderr),
            progress=progress,
        )
    except KeyboardInterrupt:
        return kept_in(args.out)
    results = json.loads((out / "pair.json").read_text(encoding="utf-8"))["results"]
    header = ["side", "texts", "validate", "steps", "best step", "validation NLL before", "after"]
    rows = [
        [
            side,
            *(str(r[key]) for key in ("train_texts", "validation_texts", "steps", "best_step")),
            *(f"{r[key]:.3f}" for key in ("nll_before", "nll_after")),
        ]
        for side, r in results.items()
    ]
    print(columns([header, *rows]))
    print(f"\n{out} is a pair: --pair {data.axis or 'name'}={out}")
    return 0
