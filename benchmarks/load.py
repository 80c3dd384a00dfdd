"""Requests that arrive at a rate: throughput, time to first token and inter-token latency at p50 and p99 against load.

    python benchmarks/load.py --mode plain --json load.json       # Ctrl-C keeps what is done; modes and rates are added
    python benchmarks/load.py --mode steered --json load.json
    python benchmarks/load.py --json load.json --markdown --plot load.svg       # from the file, runs nothing

Arrivals are Poisson, the same for every mode: prompts of 16 to 256 tokens, 8 to 96 new ones, and, steered, α of 0, 0.5, 1
or 2 by request. Latency is measured from the moment a request was due, so a queue counts. Requests that are due within
``--seconds`` are served to their end; throughput is their new tokens over the time until the last one's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from throughput import IDLE, PAIR, busy_elsewhere, processor
from tqdm import tqdm

from ensemble_decode import LLM, AsyncLLM, ExpertPair, SamplingParams
from ensemble_decode.models.smollm2 import smollm2_path

MODES = ("plain", "steered", "speculative")


def arrivals(rate: float, seconds: float, steered: bool, seed: int) -> list[tuple[float, list[int], SamplingParams]]:
    """(when, prompt, parameters) of a Poisson process of ``rate`` requests a second."""
    chance = random.Random(seed)
    found: list[tuple[float, list[int], SamplingParams]] = []
    now = chance.expovariate(rate)
    while now < seconds:
        prompt = [chance.randrange(1, 49000) for _ in range(round(16 * 16 ** chance.random()))]
        new, alpha = round(8 * 12 ** chance.random()), chance.choice([0.0, 0.5, 1.0, 2.0])
        params = SamplingParams(
            alpha=alpha if steered else 0.0, top_p=0.9, seed=len(found), max_tokens=new, ignore_eos=True
        )
        found.append((now, prompt, params))
        now += chance.expovariate(rate)
    return found


async def offer(llm: AsyncLLM, work: list[tuple[float, list[int], SamplingParams]], label: str) -> dict[str, Any]:
    """Serve ``work`` at its times, and report latencies in seconds."""
    first: list[float] = []
    between: list[float] = []
    failed = tokens = 0
    start = time.perf_counter()
    with tqdm(total=len(work), desc=label, disable=not sys.stderr.isatty()) as bar:

        async def client(due: float, prompt: list[int], params: SamplingParams) -> None:
            nonlocal failed, tokens
            await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
            last, seen = start + due, 0
            async for output in llm.generate(prompt, params):
                now, count = time.perf_counter(), len(output.outputs[0].token_ids)
                if count > seen:
                    # Tokens that came together (drafted ones do) share the time that they took.
                    (between if seen else first).extend(
                        [(now - last) / (count - seen if seen else 1)] * (count - seen if seen else 1)
                    )
                    last, seen = now, count
                failed += output.outputs[0].finish_reason == "error"
            tokens += seen
            bar.update()

        await asyncio.gather(*(client(*item) for item in work))
    seconds = time.perf_counter() - start
    found: dict[str, Any] = {
        "requests": len(work),
        "failed": failed,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
    }
    for name, values in (("first", first), ("between", between)):
        for share in (50, 99):
            found[f"{name}_p{share}_ms"] = float(np.percentile(values, share)) * 1e3 if values else None
    return found


def load(mode: str, dtype: str) -> LLM:
    options: dict[str, Any] = {"dtype": dtype, "max_model_len": 1024, "kv_cache_bytes": 1 << 30}
    if mode == "speculative":
        from ensemble_decode.engine.speculation import Speculation

        options["speculation"] = Speculation(draft="ngram")
    return LLM(str(smollm2_path()), {"gender": ExpertPair(PAIR / "expert", PAIR / "anti_expert")}, **options)


def markdown(data: dict[str, Any]) -> str:
    lines = [f"{data['processor']}, {data['settings']['dtype']}, {data['settings']['seconds']:g} s of arrivals.", ""]
    lines += [
        "| mode | requests/s offered | tokens/s | first token p50, ms | p99 | between tokens p50, ms | p99 | failed |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    keys = ("tokens_per_s", "first_p50_ms", "first_p99_ms", "between_p50_ms", "between_p99_ms")
    for mode, rates in data["modes"].items():
        for rate, entry in sorted(rates.items(), key=lambda item: float(item[0])):
            cells = ["–" if entry[key] is None else f"{entry[key]:.0f}" for key in keys]
            lines.append(f"| {mode} | {rate} | " + " | ".join(cells) + f" | {entry['failed']} of {entry['requests']} |")
    busy = max((entry["busy_elsewhere"] for rates in data["modes"].values() for entry in rates.values()), default=0.0)
    if busy > IDLE:
        lines += ["", f"**Not idle**: other processes took up to {busy:.2f} cores; don't publish this."]
    return "\n".join(lines)


def plot(data: dict[str, Any], file: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    for colour, (mode, rates) in enumerate(data["modes"].items()):
        points = sorted((float(rate), entry) for rate, entry in rates.items() if entry["first_p50_ms"] is not None)
        x = [rate for rate, _ in points]
        axes[0].plot(x, [entry["tokens_per_s"] for _, entry in points], "o-", color=f"C{colour}", label=mode)
        for axis, name in ((axes[1], "first"), (axes[2], "between")):
            for share, style in ((50, "o-"), (99, "o--")):
                y = [entry[f"{name}_p{share}_ms"] for _, entry in points]
                axis.plot(x, y, style, color=f"C{colour}", label=f"{mode}, p{share}")
            axis.set_yscale("log")
    for axis, title in zip(axes, ("tokens/s", "time to first token, ms", "between tokens, ms"), strict=True):
        axis.set(xlabel="requests/s offered", ylabel=title)
        axis.legend(fontsize=7)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", nargs="*", default=[], choices=MODES)
    parser.add_argument("--rate", type=float, nargs="+", default=[0.5, 1, 2, 4], help="requests a second")
    parser.add_argument("--seconds", type=float, default=40, help="of arrivals at each rate (default 40)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--json", required=True, help="results; an existing file is continued")
    parser.add_argument("--markdown", action="store_true", help="print the table")
    parser.add_argument("--plot", help="picture, .svg or .png")
    args = parser.parse_args()
    file = Path(args.json)
    settings = {"dtype": args.dtype, "seconds": args.seconds}
    data: dict[str, Any] = {"settings": settings, "processor": processor(), "modes": {}}
    if file.exists():
        data = json.loads(file.read_text())
        if args.mode and data["settings"] != settings:
            parser.error(f"--json {file} was measured with {data['settings']}, now {settings}: take another file")
    try:
        for mode in args.mode:
            rates = data["modes"].setdefault(mode, {})
            missing = [rate for rate in args.rate if f"{rate:g}" not in rates]
            if not missing:
                continue
            llm = AsyncLLM(load(mode, args.dtype), max_waiting=1 << 20)
            try:
                for rate in missing:
                    work = arrivals(rate, args.seconds, mode != "plain", seed=round(rate * 1000))
                    busy, start = busy_elsewhere(), time.perf_counter()
                    entry = asyncio.run(offer(llm, work, f"{mode}, {rate:g} a second"))
                    entry["busy_elsewhere"] = (busy_elsewhere() - busy) / (time.perf_counter() - start)
                    entry["rss_mb"] = psutil.Process().memory_info().rss / 1e6
                    rates[f"{rate:g}"] = entry
                    file.write_text(json.dumps(data, indent=1))
            finally:
                llm.shutdown()
    except KeyboardInterrupt:
        print(
            f"\nstopped; the rates that were done are in {file}, the same command goes on from there", file=sys.stderr
        )
    if args.plot:
        plot(data, args.plot)
    if args.markdown or args.mode:
        print(markdown(data))


if __name__ == "__main__":
    main()
