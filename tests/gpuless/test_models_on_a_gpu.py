"""Whole models as a GPU would run them: logits against transformers', and no wait for the device on the way."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

pytest.importorskip("triton", reason="needs Triton")
pytest.importorskip("greenlet", reason="needs greenlet")

from ensemble_decode import LLM, ExpertPair, SamplingParams, ops
from ensemble_decode.models.attention import ATTENTION, Forward, running
from ensemble_decode.models.fast import PackedLinear, make_fast
from ensemble_decode.models.loading import resolve_device
from ensemble_decode.ops import library, reference_layers
from tests.conftest import FAMILIES, VOCAB, Models
from tests.models.test_families import plain_logprobs
from tests.ops.cpu import needs_library

from .standin import planned, standing_in

OPERATORS = ("paged_attention", "linear", "lora_", "rms_norm", "decoder_layers")


@needs_library
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_logprobs_equal_transformers(name: str, models: Models) -> None:
    """Loaded, checked and scored through the CUDA implementations; chunks longer and shorter than a tile."""
    text = torch.randint(0, VOCAB, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    with standing_in() as seen:
        score = LLM(models.model(name), dtype="float32", max_num_batched_tokens=17).score([text])[0]
    assert seen["attend"] > 0
    expected = plain_logprobs(models.model(name), text)
    torch.testing.assert_close(torch.tensor(score.logprobs[1:]), expected, rtol=0, atol=1e-4)


@needs_library
def test_a_steered_text_is_the_cpus(models: Models) -> None:
    """A LoRA pair over the target, a prefill and decode steps of mixed rows: the same tokens in float32."""

    def texts() -> list[list[int]]:
        pairs = {"pair": ExpertPair(expert=models.adapter("llama", 1), anti_expert=models.adapter("llama", 2))}
        llm = LLM(models.model("llama"), pairs, dtype="float32", device="cpu", max_num_seqs=4)
        params = [SamplingParams(alpha=alpha, max_tokens=3, seed=7) for alpha in (1.0, 0.0)]
        outputs = llm.generate([[5, 6, 7], [11, 12]], params)
        return [list(output.outputs[0].token_ids) for output in outputs]

    with standing_in() as seen:
        on_stand_in = texts()
    assert seen["down"] > 0
    assert seen["resolve_kernel"] == 3  # a step each
    assert on_stand_in == texts()


@needs_library
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "gpt2", "gpt_neox"])
def test_a_forward_never_waits_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors that hold nothing every read of a value raises, and so does a CPU tensor that meets one of them."""
    for operator in OPERATORS:
        unguarded = library.cuda_implementations[operator].__wrapped__  # type: ignore[attr-defined]  # no device to guard
        monkeypatch.setattr(ops, operator, unguarded, raising=True)
    kind, config = FAMILIES[name]
    layers, tokens, sequences = 2, 6, 4
    heads = config.get("num_attention_heads") or config["n_head"]
    dim, kv_heads = config.get("head_dim") or 48 // heads, config.get("num_key_value_heads") or heads
    with torch.device("meta"), torch.inference_mode():
        model = AutoModelForCausalLM.from_config(
            CONFIG_MAPPING[kind](**config), dtype=torch.bfloat16, attn_implementation=ATTENTION
        )
        decoder = make_fast(model.eval().requires_grad_(False).get_decoder(), "model")
        head = model.get_output_embeddings()
        head = PackedLinear([head.weight], [None], ["lm_head"])
        caches = [ops.new_caches(9, kv_heads, dim, torch.bfloat16, "meta") for _ in range(layers)]
        index = [torch.empty(n, dtype=torch.int32) for n in (sequences + 1, sequences)]
        table = torch.empty(sequences, 20, dtype=torch.int32)
        rows = [torch.empty(tokens, dtype=torch.int64) for _ in range(2)]
        wanted = torch.empty(sequences, dtype=torch.int64)
    forward = Forward(*index, table, [c[0] for c in caches], [c[1] for c in caches])
    # Outside of the device's context, where a tensor made without a device would be the CPU's.
    with planned() as launches, torch.inference_mode(), running(forward):
        logits = ops.linear(decoder(*rows)[wanted], head.packed, head.bias, VOCAB, out_fp32=True)
    assert logits.device.type == "meta"
    assert logits.dtype == torch.float32
    assert logits.shape == (sequences, VOCAB)
    assert sum(launch.name == "attend" for launch in launches) >= layers
    for launch in launches:
        tensors = [x for x in launch.arguments.values() if isinstance(x, torch.Tensor)]
        assert tensors
        assert all(x.device.type == "meta" for x in tensors)
    with pytest.raises((RuntimeError, NotImplementedError)):  # negative control: the reference does wait
        reference_layers.paged_attention(*(torch.empty(6, 1, 16, device="meta"),) * 3, *caches[0], *index, table, 1.0)


@needs_library
def test_every_operator_has_a_cuda_implementation() -> None:
    assert {*OPERATORS, "ensemble_sample", "combine_out"} <= set(library.cuda_implementations)
    for name in library.cuda_implementations:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ensemble_decode::{name}", "CUDA")


def test_the_stand_in_leaves_no_trace() -> None:
    x, weight = torch.randn(2, 8), torch.ones(8)
    before = ops.rms_norm(x, weight, 1e-5)
    with standing_in() as seen:
        ops.rms_norm(x, weight, 1e-5)
    assert seen["norm_rows"] == int(library.available)
    assert torch.equal(ops.rms_norm(x, weight, 1e-5), before)
    assert seen["norm_rows"] == int(library.available)
    assert library.packs(weight) == library.available


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused_in_one_line(models: Models) -> None:
    for device in ("cuda", "cuda:3"):
        with pytest.raises(
            ValueError, match=rf"^device is '{device}', allowed are 'auto', 'cpu' \(torch .* sees no GPU\)$"
        ):
            LLM(models.model("llama"), device=device)
    with pytest.raises(ValueError, match=r"^device is 'tpu', allowed are 'auto', 'cpu'$"):
        resolve_device("tpu")
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
