"""``ensemble-decode trigger``: the gradient search for the Trigger baseline."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from ensemble_decode.cli.common import SMOLLM2, CommandError, kept_in

HELP = "search a trigger, the baseline that evaluate compares pairs with"


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Search a few tokens that, before a prompt, make continuations of negative regard unlikelier and others likelier "
        "(Sheng et al. 2020). The same command goes on where a search was stopped."
    )
    command.add_argument(
        "-m", "--model", default=SMOLLM2, help="hub id or folder (default: SmolLM2-135M-Instruct from PyPI)"
    )
    command.add_argument("--data", type=Path, required=True, help="folder of bold_labelled_zemour and bold/prompts")
    command.add_argument("--domain", default="gender", help="gender, race or religion (default gender)")
    command.add_argument("--examples", type=int, default=32, help="of each group and label (default 32)")
    command.add_argument("--length", type=int, default=6, help="tokens of the trigger (default 6)")
    command.add_argument("--sweeps", type=int, default=5, help="times that each token is replaced (default 5)")
    command.add_argument("--candidates", type=int, default=20, help="replacements tried for a token (default 20)")
    command.add_argument("--seed", type=int, default=0, help="same seed, same trigger (default 0)")
    command.add_argument("--out", type=Path, required=True, help="file that holds the state of the search")


def run(args: argparse.Namespace) -> int:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ensemble_decode.evaluation.report import columns
    from ensemble_decode.evaluation.trigger import SearchSettings, TriggerSearch
    from ensemble_decode.evaluation.trigger_examples import regard_examples
    from ensemble_decode.models.smollm2 import smollm2_path

    settings = SearchSettings(args.length, args.sweeps, args.candidates, seed=args.seed)
    examples = regard_examples(args.data.expanduser(), args.domain, args.examples)
    source = smollm2_path() if args.model == SMOLLM2 else args.model
    try:
        model = AutoModelForCausalLM.from_pretrained(source, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except OSError as error:
        raise CommandError(f"--model is {args.model!r}: {str(error).strip().splitlines()[0]}") from None
    search = TriggerSearch(model, tokenizer, examples, settings, args.out.expanduser())
    try:
        trigger = search.run()
    except KeyboardInterrupt:
        return kept_in(args.out)
    rows = [[str(i), f"{loss:.4f}"] for i, loss in enumerate(search.losses)]
    print(columns([["sweeps", f"loss of {len(examples)} examples"], *rows]))
    print(f"\ntrigger: {trigger!r}")
    print(f"evaluate it with --system {shlex.quote(f'trigger: alpha=0; trigger={trigger}')}")
    return 0
