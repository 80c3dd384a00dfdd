"""A large target steered by small experts: what steering costs there, and what drafting by the expert gives back.

    python benchmarks/large_target.py --noise 0 0.05 --json large.json      # Ctrl-C keeps what is done; the same
    python benchmarks/large_target.py --noise 0.1 --json large.json         # file again: goes on, adds to it
    python benchmarks/large_target.py --json large.json --markdown --plot large.svg    # from the file, runs nothing

The target is SmolLM2-135M with ``--factor`` times its blocks (benchmarks/deepen.py), bf16; it stands in for a real large
model, and only its speed means anything. Batch 1, sampled with top-p 0.9. Systems take turns, medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepen import deepened_path
from peers import load, seconds, transformers_alone, transformers_assisted, transformers_cached_pair
from throughput import ALPHA, IDLE, PAIR, busy_elsewhere, full_experts, processor
from tqdm import tqdm

from ensemble_decode import LLM, ExpertPair, SamplingParams, Speculation
from ensemble_decode.models.smollm2 import smollm2_path

TEXT = (
    "The town library opens at nine. Mara works there, and on most mornings she walks along the river to get to it. ",
    "A good soup begins with onions, cooked slowly in butter until they are soft, and with a stock that took an hour. ",
    "The train to the coast leaves twice a day. In summer it is full of families, in winter it carries mostly letters. ",
    "To plant a tree, dig a hole twice as wide as its roots, loosen the soil around it, and water it well afterwards. ",
)
DRAFTED = ("target, expert drafts", "lora pair, expert drafts", "full experts, expert drafts")
#: (system, what it is compared with, quantity, bound): cost is the time of a step, rate tokens/s.
GOALS = (
    ("lora pair", "target", "cost", 1.3),
    ("full experts", "target", "cost", 1.3),
    ("lora pair, expert drafts", "target", "rate", 1.8),
    ("full experts, expert drafts", "target", "rate", 1.8),
)
Run = Callable[[list[int], int], dict[str, float]]


def ours(llm: LLM, alpha: float, speculates: bool) -> Run:
    speculator = llm.engine.speculator

    def run(prompt: list[int], new: int) -> dict[str, float]:
        params = SamplingParams(alpha=alpha, top_p=0.9, seed=1, max_tokens=new, ignore_eos=True)
        llm.engine.speculator = speculator if speculates else None
        output = llm.generate(prompt, params, use_tqdm=False)[0]
        if len(output.outputs[0].token_ids) != new:
            raise RuntimeError(f"a request ended early: {output.outputs[0].error}")
        names = ("drafted_tokens", "accepted_tokens", "target_forwards", "new_tokens") if speculates else ()
        return {name: getattr(output.metrics, name) for name in names}

    return run


def peer(generate: Callable[[list[list[int]], int], None]) -> Run:
    def run(prompt: list[int], new: int) -> dict[str, float]:
        generate([prompt], new)
        return {}

    return run


def build(target: str, args: argparse.Namespace, folder: Path) -> dict[str, Run]:
    """The systems by name, loaded."""
    small = str(smollm2_path())
    expert, anti = full_experts(small, folder)
    pairs = {
        "lora pair": ExpertPair(PAIR / "expert", PAIR / "anti_expert", base=small),
        "full experts": ExpertPair(expert, anti),
    }
    systems: dict[str, Run] = {}
    options: dict[str, Any] = {"dtype": "bfloat16", "max_model_len": 1024, "max_num_seqs": 4, "kv_cache_bytes": 1 << 30}
    options["enable_prefix_caching"] = False
    options["speculation"] = Speculation("expert", args.draft_tokens)
    for name in args.experts:
        llm = LLM(target, {"gender": pairs[name]}, **options)  # one engine: without its speculator and with it
        systems.setdefault("target", ours(llm, 0.0, False))
        systems[name] = ours(llm, ALPHA, False)
        systems.setdefault("target, expert drafts", ours(llm, 0.0, True))
        systems[f"{name}, expert drafts"] = ours(llm, ALPHA, True)
    if args.peers:
        plain, sides = load(target, "bfloat16"), [load(side, "bfloat16") for side in (expert, anti)]
        systems["transformers"] = peer(transformers_alone(plain))
        systems["transformers, assisted"] = peer(transformers_assisted(plain, load(small, "bfloat16")))
        systems["transformers, cached pair"] = peer(transformers_cached_pair(plain, sides[0], sides[1], ALPHA))
    return systems


def prompts(count: int, length: int) -> list[list[int]]:
    """Text, in another order for each round: acceptance on noise would say nothing."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    texts = ("".join((TEXT[i % 4 :] + TEXT[: i % 4]) * (length // 60 + 1)) for i in range(count))
    return [tokenizer(text)["input_ids"][:length] for text in texts]


def measure(noise: float, data: dict[str, Any], args: argparse.Namespace, save: Callable[[], None]) -> None:
    """Add one noise's rounds to ``data``; a round that is cut off leaves the turns that it finished."""
    target = str(deepened_path(args.factor, noise))
    rounds = data["noise"].setdefault(f"{noise:g}", {})
    with tempfile.TemporaryDirectory() as folder:
        systems = build(target, args, Path(folder))
    texts = prompts(args.rounds, args.prompt_tokens)
    with tqdm(total=args.rounds * len(systems), desc=f"noise {noise:g}", disable=not sys.stderr.isatty()) as bar:
        for number, prompt in enumerate(texts):
            for name, run in systems.items():
                bar.set_postfix_str(name)
                turns = rounds.setdefault(name, [])
                if number < len(turns):
                    bar.update()
                    continue
                if number == 0:
                    run(prompt[:16], 2)  # warm-up
                turn: dict[str, float] = {}
                busy = busy_elsewhere()
                turn["first_s"] = seconds(lambda run=run, prompt=prompt: run(prompt, 1))  # type: ignore[misc]
                found: dict[str, float] = {}
                turn["total_s"] = seconds(
                    lambda run=run, prompt=prompt, found=found: found.update(run(prompt, args.new_tokens))
                )  # type: ignore[misc]
                turn.update(found)
                turn["busy_elsewhere"] = (busy_elsewhere() - busy) / (turn["first_s"] + turn["total_s"])
                turns.append(turn)
                save()
                bar.update()


def summary(turns: list[dict[str, float]], new: int) -> dict[str, float | None]:
    """Medians of a system's turns; the step is time without the first token's, over tokens."""
    drafted, accepted, forwards, tokens = (
        sum(turn.get(key, 0) for turn in turns)
        for key in ("drafted_tokens", "accepted_tokens", "target_forwards", "new_tokens")
    )
    step = statistics.median((turn["total_s"] - turn["first_s"]) / (new - 1) for turn in turns)
    return {
        "step_ms": step * 1e3,
        "tokens_per_s": 1 / step,
        "first_ms": statistics.median(turn["first_s"] for turn in turns) * 1e3,
        "acceptance": accepted / drafted if drafted else None,
        "tokens_per_forward": tokens / forwards if forwards else None,
    }


def markdown(data: dict[str, Any]) -> str:
    """The tables of docs/large-target.md."""
    settings, lines = data["settings"], []
    busy = [
        turn["busy_elsewhere"] for systems in data["noise"].values() for turns in systems.values() for turn in turns
    ]
    for noise, systems in sorted(data["noise"].items(), key=lambda item: float(item[0])):
        found = {name: summary(turns, settings["new_tokens"]) for name, turns in systems.items() if turns}
        least = min((len(systems[name]) for name in found), default=0)
        lines += [f"**Noise {noise}** ({least} rounds)", ""]
        lines += ["| system | tokens/s | step, ms | first token, ms | × target | acceptance | tokens a forward |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for name, entry in found.items():
            ratio = entry["tokens_per_s"] / found["target"]["tokens_per_s"] if "target" in found else None  # type: ignore[operator]
            cells = [
                (entry["tokens_per_s"], ".1f"),
                (entry["step_ms"], ".1f"),
                (entry["first_ms"], ".0f"),
                (ratio, ".2f"),
            ]
            cells += [(entry["acceptance"], ".0%"), (entry["tokens_per_forward"], ".2f")]
            lines.append(f"| {name} | " + " | ".join("–" if v is None else format(v, f) for v, f in cells) + " |")
        lines += ["", "| goal | bound | found | |", "|---|---|---|---|"]
        for name, other, what, bound in GOALS:
            if name in found and other in found:
                key = "step_ms" if what == "cost" else "tokens_per_s"
                value = found[name][key] / found[other][key]  # type: ignore[operator]
                reached = value <= bound if what == "cost" else value >= bound
                text = f"{name}: {'time of a token' if what == 'cost' else 'tokens/s'} against the {other}"
                sign = "≤" if what == "cost" else "≥"
                lines.append(f"| {text} | {sign} {bound} | {value:.2f} | {'reached' if reached else 'missed'} |")
        lines.append("")
    head = f"{settings['factor']}× the blocks, bf16, batch 1, prompt {settings['prompt_tokens']}, {settings['new_tokens']} new tokens, {data['processor']}."
    if max(busy, default=0) > IDLE:
        head += f" **Not idle**: other processes took up to {max(busy):.2f} cores; don't publish this."
    return "\n".join([head + " A depth-expanded stand-in for a large model: speed only.", "", *lines])


def plot(data: dict[str, Any], file: str) -> None:
    """Speed against acceptance, a point for each noise; the target alone is 1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 4), constrained_layout=True)
    new = data["settings"]["new_tokens"]
    for name in DRAFTED:
        points = []
        for noise, systems in data["noise"].items():
            if systems.get(name) and systems.get("target"):
                entry, plain = summary(systems[name], new), summary(systems["target"], new)
                if entry["acceptance"] is not None:
                    speed = entry["tokens_per_s"] / plain["tokens_per_s"]  # type: ignore[operator]
                    points.append((entry["acceptance"], speed, noise))
        if points:
            points.sort()
            axes.plot([p[0] for p in points], [p[1] for p in points], "o-", label=name)
            for x, y, noise in points:
                axes.annotate(noise, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
    if not axes.lines:
        raise ValueError(f"plot: nothing was drafted in this file, {', '.join(DRAFTED)} are needed")
    axes.axhline(1, color="grey", lw=1)
    axes.set(xlabel="accepted share of drafted tokens", ylabel="tokens/s, × the plain target")
    axes.set_title("Depth-expanded stand-in for a large target; labels: noise in the added blocks", fontsize=9)
    axes.legend()
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factor", type=int, default=8)
    parser.add_argument("--noise", type=float, nargs="*", default=[], help="noises to measure, one after the other")
    parser.add_argument("--experts", nargs="+", default=["lora pair"], choices=["lora pair", "full experts"])
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="leave transformers out")
    parser.add_argument("--draft-tokens", type=int, default=6)
    parser.add_argument("--prompt-tokens", type=int, default=96)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", required=True, help="results; an existing file is continued")
    parser.add_argument("--markdown", action="store_true", help="print the tables")
    parser.add_argument("--plot", help="picture of speed against acceptance, .svg or .png")
    args = parser.parse_args()
    file = Path(args.json)
    settings = {key: getattr(args, key) for key in ("factor", "prompt_tokens", "new_tokens", "draft_tokens")}
    data: dict[str, Any] = {"settings": settings, "processor": processor(), "noise": {}}
    if file.exists():
        data = json.loads(file.read_text())
        if args.noise and data["settings"] != settings:
            parser.error(f"--json {file} was measured with {data['settings']}, now {settings}: take another file")

    def save() -> None:
        file.write_text(json.dumps(data, indent=1))

    try:
        for noise in args.noise:
            measure(noise, data, args, save)
    except KeyboardInterrupt:
        print(f"\nstopped; what was done is in {file}, and the same command goes on from there", file=sys.stderr)
    if args.plot:
        plot(data, args.plot)
    if args.markdown or args.noise:
        print(markdown(data))


if __name__ == "__main__":
    main()
