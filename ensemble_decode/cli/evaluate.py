"""``ensemble-decode evaluate``: bias and quality of a model, alone and steered."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble_decode.cli.common import (
    INTERRUPTED,
    CommandError,
    add_model,
    identity,
    kept_in,
    load_model,
    parse_alpha,
    refuse_learned,
    refuse_missing,
)
from ensemble_decode.cli.systems import FORM, TARGET, SystemSpec, parse_system, sweep

if TYPE_CHECKING:
    from ensemble_decode.evaluation.classifiers import ClassifierSource
    from ensemble_decode.evaluation.metric import Metric

HELP = "bias and quality of a model, alone and steered, with confidence intervals"
METRICS = (
    "stereoset",
    "stereoset-intersentence",
    "perplexity",
    "perplexity-huggingface",
    "crows_pairs",
    "redditbias",
    "winobias",
    "winogender",
    "local_bias",
    "regard",
    "toxicity",
    "diversity",
    "drift",
)


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.description = "Measure the target alone (α = 0) and with its pairs. What is done is kept in --out."
    add_model(command)
    command.add_argument(
        "--alpha",
        metavar="A,A,…",
        help="strengths of all pairs, 0 (the target alone) always first; @calibration.json: each pair's, as the system 'calibrated' "
        "(default 1; 0 without a pair or with --system)",
    )
    command.add_argument(
        "--system",
        action="append",
        default=[],
        metavar=FORM,
        help="a system of your own, repeatable, e.g. 'one pair: alpha=gender=1', 'min-p: alpha=1; top_p=1; min_p=0.1; "
        "nucleus=target' or 'trigger: alpha=0; trigger=TEXT'; what is not named is as in the paper",
    )
    command.add_argument(
        "--baseline",
        default=TARGET,
        metavar="NAME",
        help="the system that all others are compared with (default target)",
    )
    command.add_argument("--data", required=True, help="folder of the corpora; what is missing there is said")
    command.add_argument(
        "--metrics", default="stereoset,perplexity", help=f"any of {', '.join(METRICS)} (default stereoset,perplexity)"
    )
    command.add_argument("--window", type=int, help="tokens of a perplexity window (default: the protocol's)")
    command.add_argument("--tokens", type=int, help="perplexity over the first so many tokens (default: all)")
    command.add_argument(
        "--classifiers",
        metavar="FOLDER|regard=ID,toxicity=ID",
        help="the folder of `ensemble-decode distill`, or hub ids or folders (default: the paper's hub ids)",
    )
    command.add_argument("--prompts", type=int, help="generated text: BOLD's prompts of each group (default: all)")
    command.add_argument("--samples", type=int, default=5, help="generated text: samples of a prompt (default 5)")
    command.add_argument("--max-tokens", type=int, default=15, help="generated text: new tokens (default 15)")
    command.add_argument("--limit", type=int, help="a quick look: the first so many items of each metric")
    command.add_argument(
        "--out", required=True, help="folder for records, continuations and report.html, .md and .json"
    )
    command.add_argument("--json", action="store_true", help="print report.json instead of a table")


def run(args: argparse.Namespace) -> int:
    from ensemble_decode.corpora.stereoset import SOURCE
    from ensemble_decode.evaluation.comparison import compare_all
    from ensemble_decode.evaluation.page import render
    from ensemble_decode.evaluation.perplexity import Perplexity
    from ensemble_decode.evaluation.report import Report
    from ensemble_decode.evaluation.runner import make_tasks, run_tasks, write
    from ensemble_decode.evaluation.swept import share_forwards

    data, out = Path(args.data).expanduser(), Path(args.out).expanduser()
    metrics = _metrics(args, out)
    specs = _systems(args)
    if args.baseline not in (names := [spec.name for spec in specs]):
        raise CommandError(f"--baseline is {args.baseline!r}, allowed are {', '.join(names)}")
    if args.limit is not None and args.limit < 1:
        raise CommandError(f"--limit is {args.limit}, allowed is 1 or more")
    if not data.is_dir():
        raise FileNotFoundError(
            f"--data is {args.data!r}, which is no folder; docs/evaluation.md lists what goes in it"
        )
    refuse_missing("evaluate", "jinja2", "scipy")
    for metric in metrics:
        if metric.name.startswith("stereoset"):
            refuse_learned(args.pair, SOURCE.name)
        metric.check(data)
    out.mkdir(parents=True, exist_ok=True)
    llm = load_model(args)
    systems = [spec.of(llm) for spec in specs]
    for metric in metrics:
        for system in systems:
            if isinstance(metric, Perplexity):  # its window depends on the model, and on a trigger
                metric.lengths(llm.ensemble.layout.max_model_len, len(system.prefix_ids))
            if (text := getattr(metric, "continuations", None)) is not None:
                text.beams(system)  # too few are said before the first metric
    tasks = make_tasks(systems, metrics, identity(args), data, args.limit)
    tasks = share_forwards(tasks, out / "records")
    about, done = _about(args, metrics), tasks
    failed: Exception | None = None
    try:
        results = run_tasks(tasks, data, out, args.limit, say=lambda line: print(line, file=sys.stderr))
    except (KeyboardInterrupt, ValueError, OSError) as error:
        done = [task for task in tasks if task.path(out / "records").is_file()]
        results = run_tasks(done, data, out, args.limit, say=lambda line: None)
        about["interrupted"] = f"after {len(done)} of {len(tasks)} measurements"
        if isinstance(error, KeyboardInterrupt):
            kept_in(out)
        elif not done:
            raise
        else:
            failed = error
    report = Report(results, about, compare_all(done, out, args.baseline), args.baseline)
    write(out / "report.json", report.to_json())
    write(out / "report.md", report.to_markdown())
    alphas = dict(zip([spec.name for spec in specs], _alphas(args), strict=False))  # the sweep comes first
    write(out / "report.html", render(report, alphas))
    if args.json:
        print(report.to_json(), end="")
    else:
        print(report.to_text())
        print("\n" + ", ".join(str(out / f"report.{kind}") for kind in ("html", "md", "json")))
    if failed is not None:
        raise failed
    return INTERRUPTED if "interrupted" in about else 0


def _metrics(args: argparse.Namespace, out: Path) -> list[Metric]:
    from ensemble_decode.evaluation.bold import Continuations
    from ensemble_decode.evaluation.crows_pairs import CrowsPairs
    from ensemble_decode.evaluation.diversity import Diversity
    from ensemble_decode.evaluation.drift import Drift
    from ensemble_decode.evaluation.local_bias import LocalBias
    from ensemble_decode.evaluation.perplexity import Perplexity
    from ensemble_decode.evaluation.redditbias import RedditBias
    from ensemble_decode.evaluation.regard import Regard
    from ensemble_decode.evaluation.stereoset import StereoSet
    from ensemble_decode.evaluation.toxicity import Toxicity
    from ensemble_decode.evaluation.winobias import WinoBias
    from ensemble_decode.evaluation.winogender import Winogender

    regard, toxicity = _classifiers(args.classifiers)
    try:
        text = Continuations(
            str(out / "continuations"), samples=args.samples, max_tokens=args.max_tokens, prompts=args.prompts
        )
    except ValueError as error:
        raise CommandError(f"--{str(error).replace('_', '-', 1)}") from None
    known: dict[str, Metric] = {
        "stereoset": StereoSet(),
        "stereoset-intersentence": StereoSet("intersentence"),
        "perplexity": Perplexity("paper", window=args.window, tokens=args.tokens),
        "perplexity-huggingface": Perplexity("huggingface", window=args.window, tokens=args.tokens),
        "crows_pairs": CrowsPairs(),
        "redditbias": RedditBias(),
        "winobias": WinoBias(),
        "winogender": Winogender(),
        "local_bias": LocalBias(),
        "regard": Regard(regard, text),
        "toxicity": Toxicity(toxicity, text),
        "diversity": Diversity(text),
        "drift": Drift(regard, text),
    }
    names = dict.fromkeys(name.strip() for name in args.metrics.split(","))
    for name in names:
        if name not in known:
            raise CommandError(f"--metrics names {name!r}, allowed are {', '.join(METRICS)}")
    return [known[name] for name in names]


def _classifiers(text: str | None) -> tuple[ClassifierSource, ClassifierSource]:
    """The classifiers of regard and toxicity."""
    from ensemble_decode.evaluation.classifiers import REGARD_ID, TOXICITY_ID, classifier_source

    sources = {"regard": REGARD_ID, "toxicity": TOXICITY_ID}
    if text is not None and "=" not in text:
        folder = Path(text).expanduser()
        sources = {name: str(folder / name) for name in sources}
        for name, source in sources.items():
            if not Path(source).is_dir():
                raise CommandError(
                    f"--classifiers is {text!r}, which has no folder {name!r}: "
                    f"`ensemble-decode distill --data DATA --out {text}` makes it"
                )
    elif text is not None:
        for part in text.split(","):
            name, equals, source = (piece.strip() for piece in part.partition("="))
            if name not in sources or not equals or not source:
                raise CommandError(f"--classifiers says {part!r}, allowed are a folder or regard=ID,toxicity=ID")
            sources[name] = source
    return classifier_source(sources["regard"]), classifier_source(sources["toxicity"])


def _systems(args: argparse.Namespace) -> list[SystemSpec]:
    """The sweep over α first, the target alone foremost; then those of --system."""
    specs = sweep(_alphas(args)) + _calibrated(args) + [parse_system(text) for text in args.system]
    for index, spec in enumerate(specs):
        if spec.name in [other.name for other in specs[:index]]:
            raise CommandError(f"--system names {spec.name!r} twice, allowed are different names")
    return specs


def _alphas(args: argparse.Namespace) -> list[float]:
    if args.alpha is None:
        return [0.0, 1.0] if args.pair and not args.system else [0.0]
    try:
        numbers = [part for part in args.alpha.split(",") if not part.startswith("@")]
        alphas = list(dict.fromkeys([0.0, *map(float, numbers)]))  # others are compared with the target
    except ValueError:
        raise CommandError(f"--alpha is {args.alpha!r}, allowed are numbers and @FILE with commas between") from None
    if not args.pair and (any(alphas) or "@" in args.alpha):
        raise CommandError(f"--alpha is {args.alpha!r} without a --pair, allowed is 0")
    return alphas


def _calibrated(args: argparse.Namespace) -> list[SystemSpec]:
    """Each pair at the α that ``ensemble-decode calibrate`` found, where ``--alpha`` has its file."""
    from ensemble_decode.evaluation.bold import paper_params

    files = [part for part in (args.alpha or "").split(",") if part.startswith("@")]
    return [SystemSpec("calibrated", paper_params(parse_alpha(file))) for file in files]


def _about(args: argparse.Namespace, metrics: Sequence[Metric]) -> dict[str, Any]:
    """What a report says of the run: what its metrics depend on, as far as it was given."""
    about: dict[str, Any] = {"model": args.model, "pairs": ", ".join(args.pair) or "none", "base": args.base}
    about |= {"dtype": args.dtype, "quantization": args.quantization, "limit": args.limit}
    about |= {f"system {text.partition(':')[0].strip()!r}": text.partition(":")[2].strip() for text in args.system}
    if any(metric.name.startswith("perplexity") for metric in metrics):
        about |= {"tokens": args.tokens, "window": args.window}
    if any(metric.generates for metric in metrics):
        about |= {"prompts": args.prompts, "samples": args.samples, "max_tokens": args.max_tokens}
    for metric in metrics:
        if (classifier := getattr(metric, "classifier", None)) is not None:
            about["toxicity classifier" if metric.name == "toxicity" else "regard classifier"] = classifier.source
    return {key: value for key, value in about.items() if value is not None}
