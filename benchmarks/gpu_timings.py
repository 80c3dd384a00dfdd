"""What ``gpu.py`` runs on a GPU: the sampling operator beside its peers, the engine's decode step, and a planted bug.

Timings of operators are of CUDA graphs that hold several calls: *cold* ones go round buffers of more than twice the L2 cache, *warm*
ones stay on one. What a peer's call can't do inside a graph is timed without one, and marked so.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ensemble_decode import ops
from ensemble_decode.engine.batch import BLOCK_SIZE, Batch, SampleRow, Span, Steering
from ensemble_decode.engine.runner import Runner
from ensemble_decode.models.ensemble import Ensemble

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TOP_P, TEMPERATURE, ALPHA = 0.9, 0.8, 1.0
#: Contenders that must not fail; the others are peers.
OURS = ("chosen", "Triton, two launches", "Triton, one launch", "CUDA C++")
#: (name, whether the pair steers, placement, whether steps are captured)
STEP_MODES = (
    ("sequential groups, graph", True, "sequential", True),
    ("target alone, graph", False, "sequential", True),
    ("streams, graph", True, "lanes", True),
    ("sequential groups, eager", True, "sequential", False),
    ("target alone, eager", False, "sequential", False),
    ("streams, eager", True, "lanes", False),
)
#: Llama shapes that stand for the models where none are named: weights are random, so only times are told.
SHAPES: dict[str, dict[str, Any]] = {
    "target": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "expert": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}


def in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


# ── the sampling operator ───────────────────────────────────────────────────────────────────────────────────────────
def sort_pipeline(target: Tensor, expert: Tensor, anti: Tensor) -> Tensor:
    """What a processor and a sampler do together in most stacks; Gumbel-like noise instead of multinomial's check."""
    logits = (target.float() + ALPHA * (expert[0].float() - anti[0].float())) / TEMPERATURE
    ordered, order = logits.softmax(-1).sort(dim=-1, descending=True)
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= TOP_P, 0.0)
    place = (ordered / torch.empty_like(ordered).exponential_()).argmax(-1, keepdim=True)
    return order.gather(-1, place).squeeze(-1)


_compiled_pipeline = torch.compile(sort_pipeline, dynamic=True)


def parameters(batch: int, device: torch.device) -> dict[str, Any]:
    number = torch.arange(batch, device=device)
    return {
        "alpha": torch.full((batch, 1), ALPHA, device=device),
        "temperature": torch.full((batch,), TEMPERATURE, device=device),
        "top_k": torch.zeros(batch, dtype=torch.int32, device=device),
        "top_p": torch.full((batch,), TOP_P, device=device),
        "min_p": torch.zeros(batch, device=device),
        "seed": number,
        "position": number.clone(),
    }


def contenders(vocab: int, batch: int, device: torch.device) -> dict[str, Callable[[Tensor, Tensor, Tensor], Any]]:
    """Ours in every form that the device has, and the peers that are installed."""
    values = parameters(batch, device)
    capability = None if torch.version.hip else torch.cuda.get_device_capability(device)
    found: dict[str, Callable] = {"chosen": lambda z, e, a: ops.ensemble_sample(z, e, a, **values)}
    if importlib.util.find_spec("triton") is not None:
        kernel = importlib.import_module("ensemble_decode.kernels.ensemble_sample")

        def form(one_launch: bool) -> Callable[[Tensor, Tensor, Tensor], Any]:
            def call(z: Tensor, e: Tensor, a: Tensor) -> Any:
                launches, results = kernel.plan(
                    z,
                    e,
                    a,
                    **values,
                    nucleus_target=False,
                    target_is_combined=False,
                    capability=capability,
                    one_launch=one_launch,
                )
                for launch in launches:
                    launch()
                return results

            return call

        found["Triton, two launches"] = form(False)
        if kernel.one_launch_fits(capability, vocab):
            found["Triton, one launch"] = form(True)
    if hasattr(torch.ops.ensemble_decode, "ensemble_sample_cuda"):
        ordered = tuple(values.values())
        found["CUDA C++"] = lambda z, e, a: torch.ops.ensemble_decode.ensemble_sample_cuda(
            z, e, a, *ordered, False, False
        )
    found["torch, sort"] = sort_pipeline
    found["torch.compile, sort"] = _compiled_pipeline
    found |= installed_peers(values)
    return found


def installed_peers(values: dict[str, Any]) -> dict[str, Callable[[Tensor, Tensor, Tensor], Any]]:
    """FlashInfer's and vLLM's samplers behind the same combination, where they are installed.

    Each is imported by its own call: one that can't be imported fails alone.
    """

    def scores(z: Tensor, e: Tensor, a: Tensor) -> Tensor:
        return (z.float() + ALPHA * (e[0].float() - a[0].float())) / TEMPERATURE

    def flashinfer(z: Tensor, e: Tensor, a: Tensor) -> Tensor:
        from flashinfer.sampling import top_p_sampling_from_probs

        return top_p_sampling_from_probs(scores(z, e, a).softmax(-1), TOP_P)

    def vllm(z: Tensor, e: Tensor, a: Tensor) -> Tensor:
        from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p, random_sample

        return random_sample(apply_top_k_top_p(scores(z, e, a), None, values["top_p"]).softmax(-1), {})

    peers = {"FlashInfer": flashinfer, "vLLM": vllm}
    return {name: call for name, call in peers.items() if importlib.util.find_spec(name.lower()) is not None}


def sample_times(vocab: int, batch: int, dtype: str, device: torch.device) -> Iterator[dict[str, Any]]:
    """Microseconds a call, cold and warm, of every contender on rows that look like a language model's.

    The result so far comes out after each contender. One that fails is told and stops nobody else, unless it broke the
    device's context, in which everything after it would fail: then the device's error is raised.
    """
    generator = torch.Generator(device).manual_seed(0)

    def logits() -> Tensor:
        rank = torch.rand(batch, vocab, device=device, generator=generator).argsort(-1)
        noise = torch.randn(batch, vocab, device=device, generator=generator)
        return (-1.1 * torch.log(rank + 2.0) + 0.7 * noise).to(DTYPES[dtype])

    one = 3 * batch * vocab * DTYPES[dtype].itemsize
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    count = max(2, math.ceil(2.5 * cache / one))
    first = (logits(), logits().unsqueeze(0), logits().unsqueeze(0))
    sets = [first, *(tuple(x.clone() for x in first) for _ in range(count - 1))]
    times: dict[str, dict[str, Any]] = {}
    for name, call in contenders(vocab, batch, device).items():
        try:
            cold, graph = median_call(call, sets)
            warm, _ = median_call(call, [sets[0]] * 8)
            times[name] = {"cold": cold, "warm": warm, "graph": graph}
        except Exception as error:
            times[name] = {"failed": in_one_line(error)}
        yield {"bytes": one, "times": times}
        torch.cuda.synchronize(device)


def median_call(call: Callable, sets: list[Any]) -> tuple[float, bool]:
    """Microseconds a call over ``sets``, median of several rounds; and whether they ran as one graph."""
    rounds = 20 if len(sets) <= 64 else 7

    def every() -> None:
        for arguments in sets:
            call(*arguments)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # the inputs are made there
    with torch.cuda.stream(side):
        for _ in range(3):
            every()
    torch.cuda.synchronize()
    run, captured = every, False
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            every()
        run, captured = graph.replay, True
    except Exception:  # what it may not do in a capture differs by peer
        torch.cuda.synchronize()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(sets))
    return statistics.median(times), captured


# ── the engine's step ───────────────────────────────────────────────────────────────────────────────────────────────
def random_models(root: Path, device: torch.device) -> tuple[str, str, str]:
    """Folders of a target and two experts with random weights in :data:`SHAPES`; those that are there already are kept."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    folders = []
    for number, (name, shape) in enumerate((("target", "target"), ("expert", "expert"), ("anti", "expert"))):
        folder, unfinished = root / name, root / f"{name}-unfinished"
        if not folder.exists():
            torch.manual_seed(number)
            config = LlamaConfig(vocab_size=49152, max_position_embeddings=8192, **SHAPES[shape])
            with device:  # a CPU takes a minute for two billion random numbers
                model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            model.save_pretrained(unfinished)
            unfinished.rename(folder)
        folders.append(str(folder))
    return folders[0], folders[1], folders[2]


def decode_batch(ensemble: Ensemble, batch: int, context: int, steered: bool) -> Batch:
    """A step in which ``batch`` sequences of ``context`` tokens go on by one."""
    layout = ensemble.layout
    pairs = tuple(range(len(layout.pairs))) if steered else ()
    blocks = -(-(context + 1) // BLOCK_SIZE)
    spans = [
        Span([7 + row], context, list(range(row * blocks, (row + 1) * blocks)), layout.pools_of(pairs, 0), 1)
        for row in range(batch)
    ]
    rows = [
        SampleRow(
            row,
            tuple(Steering(pair, ALPHA, row, row) for pair in pairs),
            TEMPERATURE,
            0,
            TOP_P,
            0.0,
            "combined",
            row,
            context + 1,
        )
        for row in range(batch)
    ]
    return Batch(spans, rows)


def step_time(ensemble: Ensemble, mode: str, batch: int, context: int, rounds: int = 50) -> dict[str, Any]:
    """Milliseconds of a decode step on the host's clock, token read-back included: median and 90th percentile."""
    _, steered, placement, graphs = next(entry for entry in STEP_MODES if entry[0] == mode)
    blocks = batch * -(-(context + 1) // BLOCK_SIZE)
    runner = Runner(ensemble, blocks, placement, graphs=graphs)  # type: ignore[arg-type]
    work = decode_batch(ensemble, batch, context, steered)
    times = []
    try:
        for _ in range(5):
            runner.execute(work)
        for _ in range(rounds):
            start = time.perf_counter()
            runner.execute(work)
            times.append((time.perf_counter() - start) * 1e3)
        captured = runner.graphs.replays if runner.graphs is not None else 0
    finally:
        runner.close()
    times.sort()
    return {"median": statistics.median(times), "p90": times[int(0.9 * rounds)], "replays": captured}


# ── a control for memcheck ──────────────────────────────────────────────────────────────────────────────────────────
class Overlong:
    """Memory of 1000 logits that claims to hold 1024: what lies between belongs to no other allocation."""

    def __init__(self, device: str) -> None:
        self.memory = torch.zeros(1000, device=device)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (1, 1024), "typestr": "<f4", "data": (self.memory.data_ptr(), False), "version": 3}


def read_past_the_end(device: str = "cuda") -> None:
    """The sampling operator reads logits past the end of their memory."""
    ops.ensemble_sample(torch.as_tensor(Overlong(device), device=device), temperature=1.0, seed=0, position=0)
    torch.cuda.synchronize()
