"""Readers, on invented lines in the corpora's own formats."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from ensemble_decode.corpora import SentencePair, redditbias, stereoset


def write(path: Path, text: str, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))


@pytest.mark.parametrize("prefix", ["", "redditbias/"])
def test_first_half_is_biased_and_second_half_is_its_counterfactual(tmp_path, prefix):
    text = "<bos> cats like tea\ncats like rain\nsame\n<bos> dogs like tea\ndogs like rain\nsame\n"
    write(tmp_path / prefix / "text_files/gender/gender_bias_manual_swapped_targets_train.txt", text)
    assert redditbias.read_training_pairs(tmp_path, "gender") == [
        SentencePair("dogs like tea", "cats like tea"),
        SentencePair("dogs like rain", "cats like rain"),
    ]


def test_religion_is_two_bias_types_and_cp1252_is_read(tmp_path):
    for bias in ("religion1", "religion2"):
        path = tmp_path / f"text_files/{bias}/{bias}_bias_manual_swapped_attr_train.txt"
        write(path, f"café {bias}\ntea {bias}\n", "cp1252")
    pairs = redditbias.read_training_pairs(tmp_path, "religion", "attr")
    assert [p.anti_expert for p in pairs] == ["café religion1", "café religion2"]
    assert redditbias.read_training_pairs(tmp_path, "religion2", "attr") == pairs[1:]


def test_odd_number_of_lines_is_an_error(tmp_path):
    write(tmp_path / "text_files/race/race_bias_manual_swapped_targets_train.txt", "a\nb\nc\n")
    with pytest.raises(ValueError, match="has 3 lines"):
        redditbias.read_training_pairs(tmp_path, "race")


def test_pairs_of_the_test_set(tmp_path):
    for group in ("female", "male"):
        path = tmp_path / f"data/gender/reddit_comments_gender_{group}_biased_test_reduced.csv"
        write(path, f'initial_demo,comments_processed\nx,{group} one\nx,"{group}, two"\n')
    assert redditbias.read_test_pairs(tmp_path, "gender") == [("female one", "male one"), ("female, two", "male, two")]


@pytest.mark.parametrize(
    "call",
    [lambda p: redditbias.read_training_pairs(p, "gender"), lambda p: stereoset.read_examples(p)],
    ids=["redditbias", "stereoset"],
)
def test_missing_data_says_what_and_where_from(tmp_path, call):
    with pytest.raises(FileNotFoundError, match=r"is missing; get it from https://github.com/.*\((MIT|CC BY-SA 4.0)\)"):
        call(tmp_path)


def test_unknown_names_are_errors(tmp_path):
    for call in (
        lambda: redditbias.read_training_pairs(tmp_path, "height"),
        lambda: redditbias.read_training_pairs(tmp_path, "gender", "both"),
        lambda: redditbias.read_test_pairs(tmp_path, "religion"),
        lambda: stereoset.read_examples(tmp_path, "paragraph"),
        lambda: stereoset.read_training_pairs(tmp_path, "height"),
    ):
        with pytest.raises(ValueError, match="allowed are"):
            call()


def row(**other):
    sentences = [{"id": f"s{i}", "sentence": f"Tea is {i}.", "gold_label": g} for i, g in enumerate(stereoset.LABELS)]
    return {"id": "e", "target": "tea", "bias_type": "race", "context": "Tea.", "sentences": sentences, **other}


def test_a_line_of_stereoset_may_hold_other_line_separators(tmp_path):
    line = json.dumps(row(context="Tea.\u2028More."), ensure_ascii=False)
    write(tmp_path / "dev_intersentence.jsonl", f"\ufeff{line}\r\n{line}\r\n")
    found = stereoset.read_examples(tmp_path, "intersentence")
    assert [example.context for example in found] == ["Tea.\u2028More."] * 2


def test_every_format_of_stereoset_gives_the_same_examples(tmp_path):
    whole = json.dumps({"data": {"intersentence": [row()], "intrasentence": []}})
    write(tmp_path / "a/stereoset/dev_intersentence.jsonl", json.dumps(row()) + "\n")
    write(tmp_path / "b/dev.json", whole)
    (tmp_path / "c").mkdir()
    (tmp_path / "c/dev.json.gz").write_bytes(gzip.compress(whole.encode()))
    one, two, three = (stereoset.read_examples(tmp_path / name, "intersentence") for name in "abc")
    assert one == two == three
    assert one[0]["unrelated"].id == "s2"
    assert one[0].term == "tea"
    assert stereoset.read_training_pairs(tmp_path / "a", "race", "intersentence") == [
        SentencePair("Tea. Tea is 1.", "Tea. Tea is 0.")
    ]


def test_example_without_three_labels_is_an_error(tmp_path):
    write(tmp_path / "dev_intrasentence.jsonl", json.dumps(row(sentences=row()["sentences"][:2])))
    with pytest.raises(ValueError, match="other labels"):
        stereoset.read_examples(tmp_path)


def test_a_draw_takes_some_of_each_domain_in_order_and_less_lies_in_more(tmp_path):
    rows = [row(id=f"{domain}{i}", bias_type=domain) for i in range(6) for domain in ("race", "gender")]
    write(tmp_path / "dev.json", json.dumps({"data": {"intersentence": [], "intrasentence": rows}}))
    examples = stereoset.read_examples(tmp_path)
    two, four = (stereoset.draw(examples, count) for count in (2, 4))
    assert (len(two), len(four)) == (4, 8)
    assert [e for e in four if e in two] == two
    assert [e for e in examples if e in four] == four
    assert stereoset.draw(examples, None) == examples
