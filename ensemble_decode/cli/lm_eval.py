"""``ensemble-decode lm-eval``: the lm-evaluation-harness's own command line, with this package's model in its list."""

from __future__ import annotations

import argparse
import sys

from ensemble_decode.cli.common import CommandError

HELP = "the lm-evaluation-harness, with --model ensemble_decode"
#: No argument is an option here, --help neither: all are the harness's.
PARSER = {"prefix_chars": "\0", "add_help": False}


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("arguments", nargs="*")


def run(args: argparse.Namespace) -> int:
    try:
        import ensemble_decode.integrations.lm_eval  # noqa: F401  (registers the model)
    except ModuleNotFoundError as error:
        raise CommandError(f"{error.name} is missing: pip install 'ensemble_decode[lm-eval]'") from None
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *args.arguments]
    cli_evaluate()
    return 0
