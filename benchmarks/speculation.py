"""Speculation switched on against off: where it pays, and that it costs next to nothing where it doesn't.

    python benchmarks/speculation.py --experts "lora pair" --draft expert ngram --json spec.json
    python benchmarks/speculation.py --experts "full experts" --draft expert --batch 1 8 --json spec.json    # adds to it
    python benchmarks/speculation.py --json spec.json                        # prints the table, runs nothing

One engine serves both: its speculator is taken out for the turns without. Turns alternate, no prompt is used twice, and the
prefix cache is off. "prose" is sampled (top-p 0.9) after texts that don't repeat themselves; "repetitive" is greedy after a
list that does. Seconds are those of whole requests, prompts of ``--prompt-tokens`` included; Ctrl-C keeps what is done.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from large_target import TEXT
from peers import seconds
from throughput import ALPHA, IDLE, PAIR, busy_elsewhere, full_experts, processor
from tqdm import tqdm

from ensemble_decode import LLM, ExpertPair, SamplingParams, Speculation
from ensemble_decode.models.smollm2 import smollm2_path

EXPERTS = ("lora pair", "full experts")
TEXTS = ("prose", "repetitive")


def load(experts: str, draft: str, dtype: str, tokens: int) -> LLM:
    small = str(smollm2_path())
    options: dict[str, Any] = {"dtype": dtype, "max_model_len": 1024, "kv_cache_bytes": 1 << 30}
    options |= {"enable_prefix_caching": False, "speculation": Speculation(draft, tokens)}
    if experts == "lora pair":
        return LLM(small, {"gender": ExpertPair(PAIR / "expert", PAIR / "anti_expert")}, **options)
    with tempfile.TemporaryDirectory() as folder:
        expert, anti = full_experts(small, Path(folder))
        return LLM(small, {"gender": ExpertPair(expert, anti)}, **options)


def prompts(llm: LLM, text: str, batch: int, length: int, turn: int) -> list[list[int]]:
    """``batch`` prompts that no other turn has: each begins with a number of its own."""
    found = []
    for row in range(batch):
        number = turn * 1000 + row
        body = "".join(TEXT) if text == "prose" else f"{TEXT[row % 4]}\n" * 8
        assert llm.tokenizer is not None
        found.append(llm.tokenizer(f"{number}. {body * (1 + length // 80)}").input_ids[:length])
    return found


def measure(llm: LLM, case: dict[str, Any], turns: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Add the rounds that are missing."""
    speculator = llm.engine.speculator
    params: dict[str, Any] = {"prose": {"top_p": 0.9}, "repetitive": {"temperature": 0.0}}[case["text"]]
    alpha = 0.0 if case["system"] == "target" else ALPHA
    for number in range(len(turns), args.rounds):
        turn: dict[str, Any] = {}
        modes = ("off", "on") if number % 2 else ("on", "off")
        for mode in modes:
            ids = prompts(llm, case["text"], case["batch"], args.prompt_tokens, 2 * number + (mode == "on"))
            asked = SamplingParams(alpha=alpha, max_tokens=args.new_tokens, ignore_eos=True, seed=number, **params)
            llm.engine.speculator = speculator if mode == "on" else None
            before, busy = dict(llm.stats), busy_elsewhere()
            turn[mode] = seconds(lambda ids=ids, asked=asked: llm.generate(ids, asked, use_tqdm=False))  # type: ignore[misc]
            turn[f"{mode}_busy"] = (busy_elsewhere() - busy) / turn[mode]
            if mode == "on":
                turn |= {
                    key: llm.stats[key] - before.get(key, 0.0)
                    for key in ("drafted", "accepted", "new_tokens", "target_forwards")
                }
        turns.append(turn)
    llm.engine.speculator = speculator


def table(data: dict[str, Any]) -> str:
    settings = data["settings"]
    lines = [
        f"{data['processor']}, {settings['dtype']}, prompt {settings['prompt_tokens']}, {settings['new_tokens']} new tokens.",
        "",
        "| draft | system | text | batch | tokens/s off | on | on against off | drafted, of new | accepted | tokens a forward |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    busy = 0.0
    for case in data["cases"]:
        turns = case["turns"]
        if not turns:
            continue
        off, on = (
            case["batch"] * settings["new_tokens"] / statistics.median(turn[mode] for turn in turns)
            for mode in ("off", "on")
        )
        ratio = statistics.median(turn["off"] / turn["on"] for turn in turns)
        drafted, accepted, new, forwards = (
            sum(turn[key] for turn in turns) for key in ("drafted", "accepted", "new_tokens", "target_forwards")
        )
        share = f"{accepted / drafted:.0%}" if drafted else "–"
        busy = max(busy, *(turn[f"{mode}_busy"] for turn in turns for mode in ("off", "on")))
        lines.append(
            f"| {case['draft']} | {case['system']} | {case['text']} | {case['batch']} | {off:.0f} | {on:.0f} | {ratio:.2f} | "
            f"{drafted / new:.0%} | {share} | {new / forwards:.2f} |"
        )
    if busy > IDLE:
        lines += ["", f"**Not idle**: other processes took up to {busy:.2f} cores; don't publish this."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", nargs="*", default=[], choices=EXPERTS)
    parser.add_argument("--draft", nargs="+", default=["expert", "ngram"], metavar="expert|ngram|MODEL")
    parser.add_argument("--text", nargs="+", default=TEXTS, choices=TEXTS)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=4, help="most tokens drafted")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-target", action="store_true", help="leave the unsteered target out")
    parser.add_argument("--json", required=True, help="results; an existing file is continued")
    args = parser.parse_args()
    file = Path(args.json)
    settings = {key: getattr(args, key) for key in ("dtype", "prompt_tokens", "new_tokens", "tokens")}
    data: dict[str, Any] = {"settings": settings, "processor": processor(), "cases": []}
    if file.exists():
        data = json.loads(file.read_text())
        if args.experts and data["settings"] != settings:
            parser.error(f"--json {file} was measured with {data['settings']}, now {settings}: take another file")
    try:
        for experts in args.experts:
            for draft in args.draft:
                llm = load(experts, draft, args.dtype, args.tokens)
                systems = [experts] if args.no_target else ["target", experts]
                work = [(s, text, batch) for batch in args.batch for s in systems for text in args.text]
                for system, text, batch in tqdm(work, f"{experts}, {draft}", disable=not sys.stderr.isatty()):
                    key = {"experts": experts, "draft": draft, "system": system, "text": text, "batch": batch}
                    case = next((c for c in data["cases"] if c.items() >= key.items()), None)
                    if case is None:
                        case = {**key, "turns": []}
                        data["cases"].append(case)
                    measure(llm, key, case["turns"], args)
                    file.write_text(json.dumps(data, indent=1))
    except KeyboardInterrupt:
        print(f"\nstopped; what was done is in {file}, and the same command goes on from there", file=sys.stderr)
    print(table(data))


if __name__ == "__main__":
    main()
