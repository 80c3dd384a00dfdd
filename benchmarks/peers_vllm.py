"""Times vLLM on the target alone. Run by throughput.py with the interpreter of vLLM's own environment.

    python peers_vllm.py MODEL DTYPE PROMPT_TOKENS NEW_TOKENS ROUNDS BATCH [BATCH …]

Prints one line of JSON: {batch: [[seconds of one token, seconds of all], …]}.
"""

import json
import os
import sys
import time

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    from vllm import LLM, SamplingParams

    model, dtype = sys.argv[1:3]
    prompt_tokens, new_tokens, rounds, *batches = map(int, sys.argv[3:])
    llm = LLM(
        model=model, dtype=dtype, max_model_len=2048, enforce_eager=True, enable_prefix_caching=False, max_num_seqs=64
    )

    def run(batch: int, new: int, salt: int) -> float:
        prompts = [
            {
                "prompt_token_ids": [
                    (7919 * (row * prompt_tokens + i) + 13 + salt) % 49000 + 1 for i in range(prompt_tokens)
                ]
            }
            for row in range(batch)
        ]
        params = SamplingParams(max_tokens=new, min_tokens=new, ignore_eos=True, temperature=1.0, top_p=0.9, seed=1)
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == new for output in outputs)
        return time.perf_counter() - start

    run(1, 4, 0)
    found = {batch: [[run(batch, 1, r), run(batch, new_tokens, r + 100)] for r in range(rounds)] for batch in batches}
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
