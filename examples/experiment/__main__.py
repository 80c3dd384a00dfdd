"""The experiment of docs/results.md, in stages that can be interrupted and go on.

    python -m examples.experiment --data corpora --out out/experiment --stage train
    python -m examples.experiment --data corpora --out out/experiment --stage tables
    python -m examples.experiment --data corpora --out out/experiment --stage report --docs docs
    python -m examples.experiment --data corpora --out out/experiment --quick

Needs the extras ``train`` and ``evaluate``, and the corpora that docs/evaluation.md names. Everything that can be chosen is in
``settings.toml``; ``--settings`` takes another file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ensemble_decode.cli.common import kept_in, refuse_missing
from examples.experiment.report import write_results
from examples.experiment.settings import DEFAULT, read_settings
from examples.experiment.stages import Laboratory

TRAIN, CALIBRATE, REPORT = "train", "calibrate", "report"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "examples.experiment", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the corpora")
    parser.add_argument("--out", type=Path, required=True, help="folder for pairs, records and figures")
    parser.add_argument(
        "--stage", help="train, calibrate, a stage of the settings, or report (default: all, one after another)"
    )
    parser.add_argument("--settings", type=Path, default=DEFAULT, help="TOML file (default: the one beside this file)")
    parser.add_argument(
        "--docs", type=Path, help="where the report stage puts results.md and pictures/ (default OUT/docs)"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", dest="size", action="store_const", const="quick", help="tiny, in OUT/quick: does it run?"
    )
    size.add_argument("--large", dest="size", action="store_const", const="large", help="all of the corpora: hours")
    args = parser.parse_args(argv)
    try:
        experiment = read_settings(args.settings, args.size)
        known = [TRAIN, CALIBRATE, *experiment.stages, REPORT]
        if args.stage is not None and args.stage not in known:
            raise ValueError(f"--stage is {args.stage!r}, allowed are {', '.join(known)}")
        refuse_missing("this", "scipy", "jinja2")
        out = args.out / "quick" if args.size == "quick" else args.out
        out.mkdir(parents=True, exist_ok=True)
        laboratory = Laboratory(experiment, args.data, out, progress=sys.stderr.isatty())
        chosen = known if args.stage is None else [args.stage]
        stages = [experiment.stages[name] for name in chosen if name in experiment.stages]
        laboratory.check(stages, train=TRAIN in chosen, calibrate=CALIBRATE in chosen)
        for name in chosen:
            print(f"── {name}")
            if name == TRAIN:
                laboratory.train(experiment.axes)
            elif name == CALIBRATE:
                laboratory.calibrate()
            elif name == REPORT:
                print(write_results(out, args.docs or out / "docs"))
            else:
                laboratory.run(experiment.stages[name])
    except KeyboardInterrupt:
        return kept_in(args.out)
    except (ValueError, OSError) as error:
        print(f"experiment: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
