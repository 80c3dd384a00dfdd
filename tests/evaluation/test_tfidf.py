"""The stand-in's own loader computes what scikit-learn does, and reads nothing that is not what it wrote."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from ensemble_decode.evaluation.classifiers import classifier_source, load_classifier
from ensemble_decode.evaluation.distill import Labelled, distill_regard, distill_toxicity
from ensemble_decode.evaluation.tfidf import CONFIG, WEIGHTS, TfidfClassifier, load_tfidf

WORDS = ("sun", "rain", "the", "garden", "a", "über", "İstanbul", "don't", "x", "été", "42", "snow", "under_score")
KINDS = ("warm", "cold", "wet")


def _texts(rng, count):
    return [" ".join(rng.choice(WORDS, size=rng.integers(1, 12))) for _ in range(count)]


@pytest.fixture(scope="module")
def fitted():
    rng = np.random.default_rng(0)
    texts = _texts(rng, 200)
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    labels = [KINDS[len(text) % 3] for text in texts]
    model = LogisticRegression().fit(vectorizer.fit_transform(texts), labels)
    vocabulary = {gram: int(column) for gram, column in vectorizer.vocabulary_.items()}
    ours = TfidfClassifier(
        "weather", tuple(model.classes_), vocabulary, vectorizer.idf_, model.coef_, model.intercept_, {"accuracy": 0.5}
    )
    return vectorizer, model, ours


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=40), st.lists(st.sampled_from(WORDS)).map(" ".join)), min_size=1))
def test_scores_equal_scikit_learns(fitted, texts):
    vectorizer, model, ours = fitted
    np.testing.assert_allclose(ours.scores(texts), model.predict_proba(vectorizer.transform(texts)), atol=1e-12)


def test_a_saved_classifier_gives_the_same_bits(fitted, tmp_path):
    ours = fitted[2]
    ours.save(tmp_path)
    texts = _texts(np.random.default_rng(1), 20)
    loaded = load_classifier(str(tmp_path))
    assert np.array_equal(loaded.scores(texts), ours.scores(texts))
    assert (loaded.name, loaded.labels, loaded.fidelity) == (ours.name, ours.labels, ours.fidelity)
    source = classifier_source(str(tmp_path))
    assert source.load().name == ours.name
    (tmp_path / CONFIG).write_text((tmp_path / CONFIG).read_text() + " ")
    assert classifier_source(str(tmp_path)) != source  # a stand-in made anew is another
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]  # and no pickle among them


def test_a_damaged_folder_is_refused(fitted, tmp_path):
    with pytest.raises(FileNotFoundError, match="ensemble-decode distill"):
        load_tfidf(tmp_path)
    fitted[2].save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config["vocabulary"].pop()
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="can't be read: shapes"):
        load_tfidf(tmp_path)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(ValueError, match="can't be read"):
        load_tfidf(tmp_path)


def test_a_classifier_that_was_killed_while_it_was_saved_is_none(fitted, tmp_path, monkeypatch):
    ours = fitted[2]
    ours.save(tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("ensemble_decode.evaluation.tfidf.save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        ours.save(tmp_path)
    with pytest.raises(FileNotFoundError, match="ensemble-decode distill"):
        load_tfidf(tmp_path)


def test_an_unreachable_classifier_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="ensemble-decode distill"):
        load_classifier(str(tmp_path / "nothing"))


def _labelled(seed, count, people):
    rng = np.random.default_rng(seed)
    tone = {"positive": "praised", "neutral": "seated", "negative": "criticised", "other": "unclear"}
    rows = []
    for i in range(count):
        label = str(rng.choice(list(tone)))
        person = people[i % len(people)]
        text = f"{person.replace('_', ' ')} was {tone[label]} {' '.join(rng.choice(WORDS, 4))}"
        rows.append(Labelled(person, text, label, label == "negative" and rng.random() < 0.9))
    return rows


def test_stand_ins_learn_and_their_fidelity_is_measured_on_other_entities():
    train = _labelled(0, 400, ["Ann_Lee", "Bo_Ray", "Cy_Fox", "Di_Oak"])
    test = _labelled(1, 200, ["Ed_Elm", "Flo_Ash"])
    regard = distill_regard(train, test, min_df=1)
    assert regard.fidelity["accuracy"] > 0.95 > regard.fidelity["majority"]
    assert not any("lee" in gram for gram in regard.vocabulary)  # names are masked
    toxicity = distill_toxicity(train, test, min_df=1)
    assert toxicity.fidelity["AUC"] > 0.9
    shuffled = [Labelled(row.entity, row.text, train[-i].regard, row.toxic) for i, row in enumerate(train)]
    assert distill_regard(shuffled, test, min_df=1).fidelity["accuracy"] < 0.6  # a planted fault is seen


def test_a_local_classifier_of_transformers_gives_its_own_softmax(tmp_path):
    words = {word: i for i, word in enumerate(("[UNK]", "[PAD]", "sun", "rain", "snow"))}
    core = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]")
    config = BertConfig(
        vocab_size=5,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        pad_token_id=1,
        id2label=dict(enumerate(KINDS)),
        label2id={kind: i for i, kind in enumerate(KINDS)},
    )
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    classifier = load_classifier(str(tmp_path))
    texts = ["sun rain", "snow", "rain rain sun"]
    with torch.no_grad():
        expected = [model(torch.tensor([tokenizer(t)["input_ids"]])).logits[0].softmax(-1).tolist() for t in texts]
    np.testing.assert_allclose(classifier.scores(texts), expected, atol=1e-5)
    assert classifier.labels == KINDS
    assert classifier.fidelity == {}  # the real thing
