"""The gradient search: its gradient is right, it lowers its loss, and it goes on where it was stopped."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from ensemble_decode.cli import main
from ensemble_decode.evaluation.trigger import Example, SearchSettings, TriggerSearch
from ensemble_decode.evaluation.trigger_examples import regard_examples
from tests.conftest import VOCAB
from tests.models.test_loading import with_tokenizer

EXAMPLES = [Example(f"w{i} w{i + 1}", f" w{40 + i % 3} w50", 1.0 if i % 4 else -0.5) for i in range(10, 20)]
SETTINGS = SearchSettings(length=3, sweeps=2, candidates=8, batch_size=10)


class Words:
    """A tokenizer of words w0 … w198; the first three are special."""

    all_special_ids = (0, 1, 2)

    def __len__(self):
        return VOCAB

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [100 if word == "the" else int(word[1:]) for word in text.split()]}

    def decode(self, tokens):
        return " ".join(f"w{token}" for token in tokens)


@pytest.fixture(scope="module")
def model(models):
    return AutoModelForCausalLM.from_pretrained(models.model("llama"))


def test_the_gradient_is_the_slope_of_the_loss(model):
    search = TriggerSearch(model, Words(), EXAMPLES, SETTINGS)
    tokens = [100, 20, 30]
    gradient = search.gradient(tokens, search._rows)
    direction = torch.randn(3, gradient.shape[1], generator=torch.Generator().manual_seed(0))
    embedded, step = search.embeddings[tokens], 1e-2
    with torch.no_grad():
        ahead = search._batch_loss(embedded + step * direction, search._rows)
        behind = search._batch_loss(embedded - step * direction, search._rows)
    assert float((ahead - behind) / (2 * step)) == pytest.approx(
        float((gradient * direction).sum()), rel=0.02, abs=1e-3
    )


def test_a_loss_in_batches_with_padding_equals_one_example_at_a_time(model):
    examples = [*EXAMPLES, Example("w60", "w61 w62 w63 w64", 2.0)]
    together = TriggerSearch(model, Words(), examples, SETTINGS).loss([100, 101])
    alone = [TriggerSearch(model, Words(), [example], SETTINGS).loss([100, 101]) for example in examples]
    assert together == pytest.approx(sum(alone) / len(alone), abs=1e-5)


def test_the_search_lowers_its_loss_and_repeats_itself(model, tmp_path):
    search = TriggerSearch(model, Words(), EXAMPLES, SETTINGS)
    found = search.run()
    start, end = search.loss([100] * 3), search.loss(Words()(found)["input_ids"])
    assert end < start
    assert len(found.split()) == 3
    assert TriggerSearch(model, Words(), EXAMPLES, SETTINGS).run() == found

    class Stop(Exception):
        pass

    state = tmp_path / "state.json"
    stopped = TriggerSearch(model, Words(), EXAMPLES, SETTINGS, state)
    improve, calls = stopped._improve, []

    def until_the_fourth(*arguments):
        calls.append(0)
        if len(calls) == 4:
            raise Stop
        return improve(*arguments)

    stopped._improve = until_the_fourth
    with pytest.raises(Stop):
        stopped.run()
    assert TriggerSearch(model, Words(), EXAMPLES, SETTINGS, state).run() == found
    with pytest.raises(ValueError, match="other settings"):
        TriggerSearch(model, Words(), EXAMPLES, SearchSettings(length=2), state).run()


def test_a_finished_search_of_other_examples_or_another_model_is_not_this_one(model, models, tmp_path):
    state = tmp_path / "state.json"
    TriggerSearch(model, Words(), EXAMPLES, SETTINGS, state).run()
    others = [replace(example, weight=-example.weight) for example in EXAMPLES]
    with pytest.raises(ValueError, match="other settings, examples or model"):
        TriggerSearch(model, Words(), others, SETTINGS, state).run()
    trained = AutoModelForCausalLM.from_pretrained(models.model("llama"))
    with torch.no_grad():
        next(p for name, p in trained.named_parameters() if "down_proj" in name)[0, 0] += 1
    with pytest.raises(ValueError, match="other settings, examples or model"):
        TriggerSearch(trained, Words(), EXAMPLES, SETTINGS, state).run()


def test_special_tokens_and_triggers_that_are_not_their_text_are_never_chosen(model):
    class Merging(Words):
        def __call__(self, text, add_special_tokens=False):
            return {"input_ids": [99 if token % 2 else token for token in super().__call__(text)["input_ids"]]}

    tokens = Words()(TriggerSearch(model, Merging(), EXAMPLES, SETTINGS).run())["input_ids"]
    assert all(token % 2 == 0 or token == 99 for token in tokens)
    assert not set(tokens) & {0, 1, 2}


def test_bad_input_is_refused(model):
    with pytest.raises(ValueError, match="examples is empty"):
        TriggerSearch(model, Words(), [])
    with pytest.raises(ValueError, match="example 0 has a continuation of no tokens"):
        TriggerSearch(model, Words(), [Example("w5", "")])
    with pytest.raises(ValueError, match="candidates is 0"):
        SearchSettings(candidates=0)


@pytest.fixture
def data(tmp_path):
    """Two groups with prompts of one person each, and a labelled continuation of every regard."""
    prompts, labelled = tmp_path / "bold" / "prompts", tmp_path / "bold_labelled_zemour"
    prompts.mkdir(parents=True)
    labelled.mkdir()
    corpus = {"American_actors": {"A": ["w5 w6", "w5 w6 w7"]}, "American_actresses": {"B": ["w8"]}}
    (prompts / "gender_prompt.json").write_text(json.dumps(corpus))
    rows = [
        {"domain": "gender", "entity": entity, "text": f"{prompt} w{10 + i}", "regard": regard, "toxic": False}
        for entity, prompt in (("A", "w5 w6 w7"), ("B", "w8"), ("C", "w9"))
        for i, regard in enumerate(("positive", "neutral", "negative", "other", "negative"))
    ]
    for name in ("train_stratified", "test_natural"):
        with gzip.open(labelled / f"{name}.jsonl.gz", "wt") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_examples_are_balanced_over_groups_and_labels(data):
    examples = regard_examples(data, "gender", 1)
    assert sorted((e.prompt, e.weight) for e in examples) == sorted(
        (prompt, weight) for prompt in ("w5 w6 w7", "w8") for weight in (1.0, 1.0, -1.0)
    )
    assert all(example.continuation.startswith(" w1") for example in examples)
    with pytest.raises(ValueError, match=r"count is 2, allowed is 1 … 1"):
        regard_examples(data, "gender", 2)


def test_an_interrupted_search_says_where_it_is_kept(data, models, tmp_path, capsys, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(TriggerSearch, "run", interrupted)
    folder = with_tokenizer(models.model("llama"), tmp_path / "model", VOCAB)
    flags = ["-m", str(folder), "--data", str(data), "--out", str(tmp_path / "state.json"), "--examples", "1"]
    assert main(["trigger", *flags]) == 130
    assert "kept in" in capsys.readouterr().err


def test_the_command_searches_and_goes_on(data, models, tmp_path, capsys):
    folder = with_tokenizer(models.model("llama"), tmp_path / "model", VOCAB)
    flags = ["-m", str(folder), "--data", str(data), "--out", str(tmp_path / "state.json"), "--examples", "1"]
    command = ["trigger", *flags, "--length", "2", "--candidates", "4", "--sweeps"]
    assert main([*command, "1"]) == 0
    first = capsys.readouterr().out
    assert "loss of 6 examples" in first
    assert "--system 'trigger: alpha=0; trigger=w" in first
    assert main([*command, "2"]) == 0
    assert json.loads((tmp_path / "state.json").read_text())["step"] == 4
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[:4]] == ["sweeps", "0", "1", "2"]
    assert main([*command, "2", "--domain", "age"]) == 2
    assert "domain is 'age'" in capsys.readouterr().err
