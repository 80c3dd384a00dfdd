"""What a decode step at batch 8 costs outside forwards and sampling, and where it goes.

python benchmarks/overhead.py --batch 8
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import pstats
from pathlib import Path

from ensemble_decode import LLM, ExpertPair, SamplingParams
from ensemble_decode.benchmarking import prompts
from ensemble_decode.models.smollm2 import smollm2_path

PAIR = Path(__file__).parent.parent / "ensemble_decode" / "data" / "pairs" / "gender"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json")
    args = parser.parse_args()
    llm = LLM(
        str(smollm2_path()),
        {"gender": ExpertPair(PAIR / "expert", PAIR / "anti_expert")},
        dtype=args.dtype,
        max_model_len=2048,
    )
    engine, results = llm.engine, {}
    print(f"{'':14}{'step ms':>9}{'forward':>9}{'sample':>9}{'rest':>9}{'rest, share':>13}")
    for label, alpha in (("target alone", 0.0), ("steered", 1.0)):
        for stream in (False, True):
            params = SamplingParams(alpha=alpha, top_p=0.9, seed=1, max_tokens=args.steps + 2, ignore_eos=True)
            for prompt in prompts(args.batch, 128, 49000):
                engine.add_request(prompt, params)
            while any(not r.sequences[0].output for r in engine.requests.values()):
                engine.step()
            before = engine.timings
            for _ in range(args.steps):
                engine.step(stream=stream)
            spent = {k: (v - before[k]) / args.steps * 1e3 for k, v in engine.timings.items()}
            rest = spent["total"] - spent["forward"] - spent["sample"]
            name = f"{label}{', streaming' if stream else ''}"
            print(
                f"{name:24}{spent['total']:>7.2f}{spent['forward']:>9.2f}{spent['sample']:>9.2f}{rest:>9.2f}{rest / spent['total']:>11.1%}"
            )
            results[name] = {**spent, "rest": rest, "share": rest / spent["total"]}
            for request_id in list(engine.requests):
                engine.abort(request_id)
    params = SamplingParams(alpha=1.0, top_p=0.9, seed=1, max_tokens=args.steps + 2, ignore_eos=True)
    for prompt in prompts(args.batch, 128, 49000):
        engine.add_request(prompt, params)
    for _ in range(5):
        engine.step()
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(50):
        engine.step(stream=False)
    profile.disable()
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(22)
    print("\nsteered, 50 steps, by own time:\n" + "\n".join(text.getvalue().splitlines()[6:]))
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
