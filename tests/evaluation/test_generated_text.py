"""BOLD continuations and the metrics that read them, on a stand-in for the engine that writes known text."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

from ensemble_decode.evaluation.bold import Continuations, mask_entity, paper_params, read_prompts
from ensemble_decode.evaluation.classifiers import classifier_source
from ensemble_decode.evaluation.diversity import Diversity, distinct, repetition
from ensemble_decode.evaluation.metric import System
from ensemble_decode.evaluation.regard import Regard
from ensemble_decode.evaluation.toxicity import Toxicity
from ensemble_decode.evaluation.trigger import with_trigger


@dataclass
class Writer:
    """What the metrics use of an LLM. Sample i of a prompt says "sunny" where i is below 3, else "rainy"."""

    asked: list = field(default_factory=list)
    fail_after: int = 1 << 30
    max_model_len: int = 64

    @property
    def ensemble(self):
        return SimpleNamespace(layout=SimpleNamespace(max_model_len=self.max_model_len))

    def generate(self, prompts, params, use_tqdm=True):
        if len(self.asked) + len(prompts) > self.fail_after:
            raise KeyboardInterrupt
        self.asked += list(zip(prompts, params, strict=True))
        return [
            SimpleNamespace(outputs=[_sample(" sunny sunny" if i < 3 else " rainy day") for i in range(param.n)])
            for param in params
        ]

    def score(self, text, alpha=None):
        return [SimpleNamespace(token_ids=[1, 2], logprobs=[None, -1.0 - (alpha or 0)])]


def _sample(text):
    return SimpleNamespace(text=text, error=None)


@dataclass
class Weather:
    """Positive where it is sunny, negative where it rains on Bob; the entity must not be seen by regard."""

    name: str = "weather"
    labels: tuple = ("negative", "neutral", "positive", "toxic")
    fidelity: dict = field(default_factory=lambda: {"accuracy": 0.75})
    seen: list = field(default_factory=list)

    def load(self):
        return self

    def scores(self, texts):
        self.seen += texts
        rows = np.zeros((len(texts), 4))
        for row, text in zip(rows, texts, strict=True):
            row[2 if "sunny" in text else 0 if "she" in text else 1] = 0.4
            row[3] = 0.3 if "sunny" in text else 0.5 if "she" in text else 0.0
        rows[:, 3] *= self.name == "toxic weather"
        return rows


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data" / "bold" / "prompts"
    folder.mkdir(parents=True)
    corpus = {
        "American_actors": {"Bob_Lee": ["Bob Lee says he is ", " "], "Al_Fox": ["Al Fox says he was "]},
        "American_actresses": {"Eve_Oak": ["Eve Oak says she is ", "Eve Oak says she was "]},
    }
    (folder / "gender_prompt.json").write_text(json.dumps(corpus))
    return tmp_path / "data"


@pytest.fixture
def continuations(tmp_path):
    return Continuations(str(tmp_path / "kept"), domains=("gender",), chunk=2)


def _system(**changes):
    return System("target", Writer(**changes), paper_params())


def test_prompts_are_stripped_and_empty_ones_left_out(data):
    prompts = read_prompts(data, ["gender"])
    assert [prompt.text for prompt in prompts][:2] == ["Bob Lee says he is", "Al Fox says he was"]
    assert [prompt.id for prompt in prompts][2:] == ["gender/American_actresses/0/0", "gender/American_actresses/0/1"]
    with pytest.raises(FileNotFoundError, match="amazon-science/bold"):
        read_prompts(data, ["race"])
    with pytest.raises(ValueError, match="domain is 'age'"):
        read_prompts(data, ["age"])


def test_an_entity_is_masked_whatever_its_case():
    assert mask_entity("Bob Lee met bob lee (sic)", "Bob_Lee") == "XYZ met XYZ (sic)"


def test_each_prompt_is_sampled_as_the_paper_does_with_a_seed_of_its_own(data, continuations):
    system = _system()
    found = continuations.of(system, data)
    assert [len(samples) for _, samples in found] == [5, 5, 5, 5]
    params = [param for _, param in system.llm.asked]
    assert {(p.n, p.max_tokens, p.top_p, p.temperature) for p in params} == {(5, 15, 0.9, 1.0)}
    assert len({p.seed for p in params}) == 4


def test_an_interrupted_run_goes_on_where_it_stopped(data, continuations):
    stopped = _system(fail_after=2)
    with pytest.raises(KeyboardInterrupt):
        continuations.of(stopped, data)
    path = continuations.path(stopped)
    path.write_bytes(path.read_bytes()[:-5])  # killed in the middle of a line
    resumed = _system()
    found = continuations.of(resumed, data)
    assert len(resumed.llm.asked) == 3
    assert continuations.of(_system(fail_after=0), data) == found  # all is there: nothing is generated
    other = System("target", Writer(), paper_params(alpha=1.0))
    assert len({path, continuations.path(other), continuations.path(_system(max_model_len=32))}) == 3


def test_continuations_are_of_one_text_of_a_prompt(data, continuations):
    """Other data with the same ids, in the same folder; and lines from before a prompt's text was told apart."""
    found = continuations.of(_system(), data)
    file = data / "bold" / "prompts" / "gender_prompt.json"
    file.write_text(file.read_text().replace("Al Fox says he was", "Al Fox writes that he was"))
    system = _system()
    continuations.of(system, data)
    assert [prompt for prompt, _ in system.llm.asked] == ["Al Fox writes that he was"]
    file.write_text(file.read_text().replace("writes that", "says"))
    assert continuations.of(_system(fail_after=0), data) == found  # both are kept
    path = continuations.path(system)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({"id": line["id"], "samples": line["samples"]}) + "\n" for line in lines))
    continuations.of(system, data)
    assert len(system.llm.asked) == 5


def test_a_failed_sample_is_a_value_error_that_names_its_prompt(data, continuations, monkeypatch):
    monkeypatch.setattr(f"{__name__}._sample", lambda text: SimpleNamespace(text="", error="no memory"))
    with pytest.raises(ValueError, match="BOLD prompt 'gender/American_actors/0/0' of 'target' failed: no memory"):
        continuations.of(_system(), data)


def test_a_limit_takes_the_first_prompts_of_each_group(data, continuations):
    found = continuations.of(_system(), data, limit=1)
    assert [prompt.group for prompt, _ in found] == ["American_actors", "American_actresses"]


def test_the_settings_of_a_metric_are_json(data, continuations):
    metric = Regard(classifier_source("hub/id"), continuations)
    assert json.loads(json.dumps(asdict(metric)))["classifier"]["source"] == "hub/id"


def test_regard_by_hand(data, continuations):
    classifier = Weather()
    metric = Regard(classifier, continuations, resamples=20)
    records = metric.run(_system(), data)
    assert all(text.startswith("XYZ says") for text in classifier.seen)
    assert not any("sunny" in json.dumps(record) for record in records)  # no text in records
    figures = metric.summarise(records)
    # 3/5 positive in both; of the rest 2/5 neutral for the one and 2/5 negative for the other: (0 + .4 + .4) / 3
    assert figures["gap/gender"].value == pytest.approx(0.8 / 3)
    assert figures["negative/American_actresses"].value == pytest.approx(0.4)
    assert figures["stand-in accuracy"].value == 0.75


def test_toxicity_by_hand(data, continuations):
    classifier = Weather("toxic weather")
    metric = Toxicity(classifier, continuations, resamples=20)
    figures = metric.summarise(metric.run(_system(), data))
    assert any("Bob Lee" in text for text in classifier.seen)  # unmasked
    assert figures["toxic/American_actresses"].value == pytest.approx(0.4)  # 0.5 counts
    assert figures["gap/gender"].value == pytest.approx(0.4)


def test_a_classifier_without_the_labels_is_refused(data, continuations):
    for metric in (Regard, Toxicity):
        with pytest.raises(ValueError, match="has the labels"):
            metric(Weather(labels=("a", "b", "c", "d")), continuations).run(_system(), data)


def test_a_classifier_s_folder_is_known_by_what_is_in_it(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"one")
    first = classifier_source(str(tmp_path))
    assert classifier_source(str(tmp_path)) == first
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert classifier_source(str(tmp_path)) != first
    assert classifier_source("a/hub-id").digest == ""


def test_distinct_and_repetition_by_hand():
    assert distinct(["a b a", "a c"], 1) == pytest.approx(3 / 5)
    assert distinct(["a b a", "a c"], 2) == pytest.approx(3 / 5)
    assert distinct(["", " "], 1) is None
    assert repetition("a b a b") == pytest.approx(1 / 3)
    assert repetition("a") is None


def test_diversity_by_hand(data, continuations):
    figures = Diversity(continuations, resamples=20)
    found = figures.summarise(figures.run(_system(), data))
    assert found["distinct-1"].value == pytest.approx(3 / 10)
    assert found["repetition-2"].value == 0


def test_a_trigger_stands_before_the_prompt_with_no_space_and_out_of_the_classifiers_sight(data, continuations):
    system = with_trigger(_system(), "zig zag")
    classifier = Weather()
    Regard(classifier, continuations).run(system, data)
    assert system.llm.asked[0][0] == "zig zagBob Lee says he is"
    assert not any("zig" in text for text in classifier.seen)
    assert continuations.path(system) != continuations.path(_system())
