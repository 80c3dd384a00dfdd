"""Times vLLM on the target alone. Run by throughput.py with the interpreter of vLLM's own environment.

    python peers_vllm.py MODEL DTYPE [--compile]

Serves its standard input, so that vLLM takes its turns among the other systems: a line is ``[prompts, new tokens]`` in
JSON, the answer a line ``SECONDS x``. ``READY`` says that the model is loaded. Ends with its input.
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
    llm = LLM(
        model=model,
        dtype=dtype,
        max_model_len=2048,
        enforce_eager="--compile" not in sys.argv,
        enable_prefix_caching=False,
        max_num_seqs=64,
    )
    print("READY", flush=True)
    for line in sys.stdin:
        prompts, new = json.loads(line)
        params = SamplingParams(max_tokens=new, min_tokens=new, ignore_eos=True, temperature=1.0, top_p=0.9, seed=1)
        start = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        if any(len(output.outputs[0].token_ids) != new for output in outputs):
            raise RuntimeError("a request ended early")
        print(f"SECONDS {seconds}", flush=True)


if __name__ == "__main__":
    main()
