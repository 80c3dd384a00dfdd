"""What can't be served is refused at load, in one line that names it; what differs by padding only is served."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import CONFIG_MAPPING as CONFIGS
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ensemble_decode import LLM, ExpertPair, SamplingParams
from tests.conftest import VOCAB, Models, make_model


def copy(path: str, to: Path) -> Path:
    shutil.copytree(path, to)
    return to


def refused(path: object, *words: str, **options: object) -> None:
    with pytest.raises(ValueError, match=r"model|adapter|expert|vocabular|dtype|device|max_model_len|pairs") as caught:
        LLM(str(path), dtype=options.pop("dtype", "float32"), **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such folder")


def test_folder_without_config(models: Models, tmp_path: Path) -> None:
    folder = copy(models.model("llama"), tmp_path / "m")
    (folder / "config.json").unlink()
    refused(folder, "config.json is missing")


def test_missing_weights(models: Models, tmp_path: Path) -> None:
    folder = copy(models.model("llama"), tmp_path / "m")
    (folder / "model.safetensors").unlink()
    refused(folder, "no *.safetensors")


def test_truncated_weights(models: Models, tmp_path: Path) -> None:
    folder = copy(models.model("llama"), tmp_path / "m")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refused(folder, "model.safetensors", "truncated")


def test_missing_shard(models: Models, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(models.model("llama")).save_pretrained(tmp_path / "m", max_shard_size="40KB")
    shard = sorted((tmp_path / "m").glob("*.safetensors"))[1]
    shard.unlink()
    refused(tmp_path / "m", shard.name, "missing")


def test_missing_tensor(models: Models, tmp_path: Path) -> None:
    folder = copy(models.model("llama"), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "1 weights are missing", "up_proj")


def test_pickle_is_refused_with_the_way_out(models: Models, tmp_path: Path) -> None:
    folder = copy(models.model("llama"), tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin is a pickle", "save_pretrained")


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("t5", {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 16, "vocab_size": 50}, ["encoder-decoder"]),
        ("mamba", {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 50}, ["attention"]),
        ("bloom", {"hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50}, ["AttentionInterface"]),
    ],
)
def test_other_kinds_of_model(kind: str, changes: dict, words: list[str], tmp_path: Path) -> None:
    CONFIGS[kind](**changes).save_pretrained(tmp_path / "m")
    save_file({"x": torch.zeros(1)}, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    refused(tmp_path / "m", kind, *words)


def test_sliding_window_is_served_up_to_its_length(models: Models) -> None:
    path = models.model("mistral", sliding_window=64)
    refused(path, "slides its attention over 64 tokens")
    refused(path, "allowed is 1 … 64", max_model_len=65)
    text = list(range(3, 60))
    score = LLM(path, dtype="float32", max_model_len=64).score([text])[0]
    whole = LLM(models.model("mistral"), dtype="float32").score([text])[0]
    assert score.logprobs == whole.logprobs


def test_stretched_positions_are_served_up_to_where_they_begin(models: Models) -> None:
    """longrope takes other factors for a long sequence, and transformers takes them for all of a forward."""
    factors = [1.0] * 4
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}
    path = models.model("llama", rope_parameters={**rope, "short_factor": factors, "long_factor": [2.0] * 4})
    refused(path, "longrope", "allowed is 1 … 64")
    refused(path, "max_model_len is 65", max_model_len=65)
    assert LLM(path, dtype="float32", max_model_len=64).score([[5, 6, 7]])[0].logprobs[1] is not None


def test_an_index_without_files_is_damaged(models: Models, tmp_path: Path) -> None:
    folder = copy(models.model("llama"), tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')
    refused(folder, "model.safetensors.index.json is damaged")


def test_tokens_that_end_a_text_are_of_the_vocabulary(models: Models) -> None:
    """A configuration may name others, GPT-2's default for one; min_tokens would ban them in a row that lacks them."""
    llm = LLM(models.model("gpt2", eos_token_id=[2, 50256, -1]), dtype="float32")
    assert llm.ensemble.eos_token_ids == (2,)
    output = llm.generate([[5, 6]], SamplingParams(max_tokens=3, min_tokens=3, seed=1), use_tqdm=False)[0]
    assert len(output.outputs[0].token_ids) == 3


@pytest.mark.parametrize("pattern", ["q_proj", "layers.0.self_attn.q_proj", r"^model\.layers\.\d+\.self_attn\.q_proj"])
def test_an_adapter_s_alpha_by_module_is_peft_s(models: Models, tmp_path: Path, pattern: str) -> None:
    folder = copy(models.adapter("llama", 1), tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["alpha_pattern"] = {pattern: 64, "q_proj": 1}  # the first that fits counts
    (folder / "adapter_config.json").write_text(json.dumps(config))
    target = AutoModelForCausalLM.from_pretrained(models.model("llama"))
    wanted = PeftModel.from_pretrained(target, folder)(torch.tensor([[5, 6, 7]])).logits.log_softmax(-1)[0]
    pair = ExpertPair(folder)  # z + 1 (z⁺ − z) is z⁺
    found = LLM(models.model("llama"), {"a": pair}, dtype="float32").next_logprobs([[5, 6, 7]])[0]
    torch.testing.assert_close(found, wanted[-1], atol=1e-4, rtol=0)


def test_a_damaged_adapter_is_named(models: Models, tmp_path: Path) -> None:
    folder = copy(models.adapter("llama", 1), tmp_path / "a")
    (folder / "adapter_config.json").write_text("{")
    refused(models.model("llama"), "adapter_config.json is damaged", pairs={"a": ExpertPair(folder)})
    again = copy(models.adapter("llama", 1), tmp_path / "b")
    weights = load_file(again / "adapter_model.safetensors")
    weights.pop(next(name for name in weights if "lora_B" in name))
    save_file(weights, again / "adapter_model.safetensors", {"format": "pt"})
    refused(models.model("llama"), "lacks lora_B of", pairs={"a": ExpertPair(again)})


def test_what_the_sampler_could_not_take_is_refused(models: Models) -> None:
    for alpha in (1e300, 10**400, float("nan")):
        with pytest.raises(ValueError, match=r"alpha is .* allowed"):
            ExpertPair("x", alpha=alpha)
    pair = ExpertPair(models.adapter("llama", 1))
    refused(models.model("llama"), "65 are given, allowed are 64", pairs={f"{i}": pair for i in range(65)})


def test_hybrid_layers_are_refused(models: Models, tmp_path: Path) -> None:
    folder = copy(models.model("qwen3"), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["layer_types"] = ["full_attention", "linear_attention"]
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "linear_attention")


def test_a_model_whose_fast_path_is_wrong_is_refused(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check at load can fail: break the rotary embedding of the fused layer and it does."""
    from ensemble_decode import ops

    whole = ops.decoder_layers
    monkeypatch.setattr(ops, "decoder_layers", lambda hidden, cos, sin, *rest: whole(hidden, cos, -sin, *rest))
    refused(models.model("llama"), "differ from transformers'")


@pytest.mark.parametrize("value", ["int8", 3, None])
def test_bad_dtype(value: object, models: Models) -> None:
    refused(models.model("llama"), "dtype", "'auto'", dtype=value)


def test_bad_device(models: Models) -> None:
    refused(models.model("llama"), "device", device="tpu")


def test_max_model_len_beyond_the_positions(models: Models) -> None:
    refused(models.model("llama"), "max_model_len is 1000", "256", max_model_len=1000)


# ── adapters ────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_adapter_faults(models: Models, tmp_path: Path) -> None:
    target, good = models.model("llama"), models.adapter("llama", 1)

    def pair(folder: Path | str) -> dict:
        return {"pairs": {"a": ExpertPair(str(folder), good)}}

    empty = tmp_path / "empty"
    empty.mkdir()
    refused(target, "neither config.json", **pair(empty))
    no_weights = copy(good, tmp_path / "no weights")
    (no_weights / "adapter_model.safetensors").unlink()
    refused(target, "adapter_model.safetensors is missing", **pair(no_weights))
    cut = copy(good, tmp_path / "cut")
    (cut / "adapter_model.safetensors").write_bytes(b"\x40")
    refused(target, "truncated", **pair(cut))
    dora = copy(good, tmp_path / "dora")
    config = json.loads((dora / "adapter_config.json").read_text())
    (dora / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    refused(target, "use_dora", **pair(dora))
    refused(models.model("gpt2"), "do not fit the base model", **pair(good))
    refused(models.model("llama", hidden_size=96), "the base model's is", **pair(good))


# ── vocabularies ────────────────────────────────────────────────────────────────────────────────────────────────────
def with_tokenizer(path: str, to: Path, words: int, first: str = "w") -> Path:
    folder = copy(path, to)
    tokenizer = Tokenizer(WordLevel({f"{first}{i}": i for i in range(words)}, unk_token=f"{first}0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=f"{first}2").save_pretrained(folder)
    return folder


def test_padded_vocabularies_are_sliced(models: Models, tmp_path: Path) -> None:
    """An expert with more rows in its head than the target steers it all the same, and no padding is ever sampled."""
    target = with_tokenizer(models.model("llama"), tmp_path / "t", 190)
    wide = with_tokenizer(models.model("llama", 1, vocab_size=256), tmp_path / "e", 190)
    llm = LLM(str(target), {"a": ExpertPair(str(wide))}, dtype="float32")
    assert llm.ensemble.layout.vocab_size == VOCAB
    params = SamplingParams(max_tokens=30, alpha=2.0, ignore_eos=True, seed=1)
    output = llm.generate(["w5 w6 w7"], params, use_tqdm=False)[0].outputs[0]
    assert len(output.token_ids) == 30
    assert max(output.token_ids) < VOCAB


def test_different_vocabularies_name_both(models: Models, tmp_path: Path) -> None:
    target = with_tokenizer(models.model("llama"), tmp_path / "t", 190)
    other = with_tokenizer(models.model("llama", 1), tmp_path / "e", 190, first="v")
    refused(target, "vocabularies differ", str(target), str(other), pairs={"a": ExpertPair(str(other))})
    sizes = models.model("llama", 2, vocab_size=256)
    refused(models.model("llama"), "vocabularies differ", "199", "256", pairs={"a": ExpertPair(sizes)})


# ── pairs ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"expert": None}, "expert is None"),
        ({"expert": 3}, "expert is 3"),
        ({"expert": "x", "alpha": "1"}, "alpha is '1'"),
        ({"expert": "x", "alpha": float("nan")}, "alpha is nan"),
        ({"expert": "x", "alpha": True}, "alpha is True"),
    ],
)
def test_bad_pairs(arguments: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        ExpertPair(**arguments)


def test_pairs_must_be_pairs(models: Models) -> None:
    with pytest.raises(ValueError, match="an ExpertPair is allowed"):
        LLM(models.model("llama"), {"a": "out/expert"}, dtype="float32")  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="at least one prompt"):
        ExpertPair.from_prompts()


def test_members_on_one_set_of_weights_share_a_group(models: Models) -> None:
    target, plus, minus = models.model("llama"), models.adapter("llama", 1), models.adapter("llama", 2)
    llm = LLM(target, {"a": ExpertPair(plus, minus), "b": ExpertPair(minus, target)}, dtype="float32")
    assert len(llm.ensemble.groups) == 1
    assert llm.ensemble.layout.num_pools == 3  # target, plus, minus: each computed once


# ── what a model may do at run time ─────────────────────────────────────────────────────────────────────────────────
def test_nan_fails_its_own_request_only(tmp_path: Path) -> None:
    """A token whose embedding is NaN poisons the requests that hold it, and nothing beside them."""
    model = make_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[77] = float("nan")
    model.save_pretrained(tmp_path / "m")
    good = make_model("llama")
    good.save_pretrained(tmp_path / "g")
    import ensemble_decode.models.group as group

    tokens = torch.arange(1, 1 + group._CHECK_TOKENS) * 7919 % (VOCAB - 1)
    assert 77 not in tokens  # or the check at load would refuse the model
    params = SamplingParams(max_tokens=6, temperature=0.0, logit_bias={77: -100.0})
    llm = LLM(str(tmp_path / "m"), dtype="float32")
    prompts = [[5, 6, 7], [5, 77, 7], [9, 10]]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [o.outputs[0].finish_reason for o in outputs] == ["length", "error", "length"]
    assert "NaN" in (outputs[1].outputs[0].error or "")
    clean = LLM(str(tmp_path / "g"), dtype="float32").generate([prompts[0], prompts[2]], params, use_tqdm=False)
    assert [outputs[i].outputs[0].token_ids for i in (0, 2)] == [o.outputs[0].token_ids for o in clean]
    again = llm.generate([prompts[0]], params, use_tqdm=False)[0]
    assert again.outputs[0].token_ids == outputs[0].outputs[0].token_ids


def test_a_nan_expert_leaves_the_target_alone(models: Models, tmp_path: Path) -> None:
    """The contract: a difference that is not finite counts as 0."""
    model = make_model("llama", 1)
    with torch.no_grad():
        model.get_input_embeddings().weight[77] = float("nan")
    model.save_pretrained(tmp_path / "e")
    params = SamplingParams(max_tokens=6, temperature=0.0)
    llm = LLM(models.model("llama"), {"a": ExpertPair(str(tmp_path / "e"))}, dtype="float32")
    steered = llm.generate([[5, 77, 7]], params, use_tqdm=False)[0]
    alone = llm.generate([[5, 77, 7]], SamplingParams(max_tokens=6, temperature=0.0, alpha=0.0), use_tqdm=False)[0]
    assert steered.outputs[0].token_ids == alone.outputs[0].token_ids
