"""``ensemble-decode calibrate``: the α of each axis."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ensemble_decode.cli.common import (
    CommandError,
    add_model,
    identity,
    kept_in,
    load_model,
    refuse_learned,
    refuse_missing,
)

HELP = (
    "the alpha of each axis: the highest ICAT (stereotype score towards 50, sense kept) within a budget of perplexity"
)


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Find α of every --pair: the highest mean ICAT of the axes (SS towards 50, but not at the price of sentences without a "
        "meaning) on one half of StereoSet's target terms, the perplexity of all pairs together within --budget on WikiText-2's "
        "validation text; then measure on the other half, also how far SS of each axis is from 50. A pair's axis is that of its "
        "pair.json, or its name. What is done is kept in --out."
    )
    add_model(command)
    command.add_argument("--data", required=True, help="folder of the corpora: stereoset and wikitext-2/valid.txt")
    command.add_argument(
        "--budget", type=float, default=0.10, help="perplexity that may be added, as a share (default 0.1)"
    )
    command.add_argument("--max-alpha", type=float, default=5.0, help="largest alpha that is tried (default 5)")
    command.add_argument("--step", type=float, default=0.25, help="of the grid of alpha (default 0.25)")
    command.add_argument("--tokens", type=int, default=8000, help="tokens of the validation text (default 8000)")
    command.add_argument("--window", type=int, default=992, help="tokens of a perplexity window (default 992)")
    command.add_argument(
        "--examples", type=int, help="StereoSet examples of each domain and half, at most (default: all)"
    )
    command.add_argument("--seed", type=int, default=0, help="of the halves (default 0)")
    command.add_argument("--out", required=True, help="folder for records and calibration.json")
    command.add_argument("--save", action="store_true", help="also write each alpha into its pair's pair.json")
    command.add_argument("--json", action="store_true", help="print calibration.json instead of tables")


def run(args: argparse.Namespace) -> int:
    from ensemble_decode.corpora.stereoset import SOURCE
    from ensemble_decode.evaluation.runner import write
    from ensemble_decode.experts.calibration import CalibrationSettings, Calibrator

    settings = CalibrationSettings(
        args.budget, args.max_alpha, args.step, args.tokens, args.window, args.seed, args.examples
    )
    if not args.pair:
        raise CommandError("no --pair: calibrate needs at least one")
    folders = dict(_split(text) for text in args.pair)
    axes = {name: _axis(name, folder) for name, folder in folders.items()}
    for name, folder in folders.items():
        if args.save and not (folder / "pair.json").is_file():
            raise CommandError(f"--save: pair {name!r} has no pair.json to write alpha into")
    refuse_learned(args.pair, SOURCE.name)
    refuse_missing("calibrate", "scipy")
    data, out = Path(args.data).expanduser(), Path(args.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    llm = load_model(args)
    calibrator = Calibrator(
        llm, axes, data, out, settings, identity(args), say=lambda line: print(line, file=sys.stderr)
    )
    try:
        found = calibrator.run()
    except KeyboardInterrupt:
        return kept_in(out)
    path = out / "calibration.json"
    write(path, found.to_json())
    if args.save:
        for name, folder in folders.items():
            about = json.loads((folder / "pair.json").read_text(encoding="utf-8"))
            about["alpha"] = round(found.alpha[name], 4)
            write(folder / "pair.json", json.dumps(about, indent=2, ensure_ascii=False) + "\n")
    print(found.to_json() if args.json else f"{found.to_text()}\n\n{path}: --alpha @{path}", end="\n" * (not args.json))
    return 0


def _split(text: str) -> tuple[str, Path]:
    name, _, paths = text.partition("=")
    return name, Path(paths)


def _axis(name: str, folder: Path) -> str:
    if (folder / "pair.json").is_file():
        return json.loads((folder / "pair.json").read_text(encoding="utf-8")).get("axis") or name
    return name
