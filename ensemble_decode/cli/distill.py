"""``ensemble-decode distill``: stand-ins for the regard and toxicity classifiers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ensemble_decode.cli.common import INTERRUPTED

HELP = "train stand-ins for the regard and toxicity classifiers, where the real ones can't be downloaded"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="folder that holds bold_labelled_zemour")
    parser.add_argument("--out", type=Path, required=True, help="where the folders regard and toxicity go")


def run(args: argparse.Namespace) -> int:
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise ValueError("distill needs scikit-learn: pip install 'ensemble_decode[evaluate]'") from None
    from ensemble_decode.evaluation.distill import distill_regard, distill_toxicity, read_labelled
    from ensemble_decode.evaluation.report import columns

    train, test = read_labelled(args.data)
    print(f"{len(train)} texts to learn from, {len(test)} about other entities to measure with", file=sys.stderr)
    rows = [["classifier", "n-grams", "measured against the real one's labels", "folder"]]
    try:
        for name, distill in (("regard", distill_regard), ("toxicity", distill_toxicity)):
            classifier = distill(train, test)
            classifier.save(args.out / name)
            measured = ", ".join(f"{key} {value:.3f}" for key, value in classifier.fidelity.items())
            rows.append([name, str(len(classifier.vocabulary)), measured, str(args.out / name)])
    except KeyboardInterrupt:
        done = ", ".join(row[0] for row in rows[1:]) or "nothing"
        print(f"interrupted: {done} is done; the same command makes both anew, a minute each", file=sys.stderr)
        return INTERRUPTED
    print(columns(rows))
    return 0
