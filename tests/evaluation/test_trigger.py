"""The gradient search: its gradient is right, it lowers its loss, and it goes on where it was stopped."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from ensemble_decode.evaluation.trigger import Example, SearchSettings, TriggerSearch
from tests.conftest import VOCAB

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
