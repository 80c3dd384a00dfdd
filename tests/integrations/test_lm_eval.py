"""The harness's own Hugging Face model is the reference: the same answers at α = 0 on tasks of local files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from ensemble_decode import SamplingParams
from ensemble_decode.cli import main
from ensemble_decode.evaluation.crows_pairs import CrowsPairs
from ensemble_decode.evaluation.metric import System
from ensemble_decode.integrations.lm_eval import EnsembleLM, parse_alpha, parse_pairs
from ensemble_decode.models.pairs import ExpertPair
from tests.conftest import VOCAB, Models
from tests.models.test_loading import with_tokenizer

TASKS = {
    "choice": "output_type: multiple_choice\ndoc_to_text: '{{text}}'\ndoc_to_target: 0\n"
    'doc_to_choice: \'{{["w7 w8", "w9"]}}\'\nmetric_list:\n  - metric: acc\n',
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    "metric_list:\n  - metric: word_perplexity\n",
    "until": "output_type: generate_until\ndoc_to_text: '{{text}}'\ndoc_to_target: 'w1'\n"
    "generation_kwargs:\n  until: ['w30']\n  max_gen_toks: 12\n  do_sample: false\n"
    "metric_list:\n  - metric: exact_match\n",
}


@pytest.fixture(scope="module")
def folder(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("harness")
    with_tokenizer(models.model("llama"), root / "model", VOCAB)
    texts = [
        "w5 w6",
        "w9 w10 w11",
        " ".join(f"w{3 + i % 150}" for i in range(300)),
    ]  # the last is longer than the model
    (root / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name, body in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {root}/docs.jsonl\ntest_split: test\n"
        (root / f"{name}.yaml").write_text(head + body)
    return root


def answers(model: Any, folder: Path) -> dict[str, list[Any]]:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
    assert found is not None
    return {name: [sample["resps"] for sample in found["samples"][name]] for name in TASKS}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)


def test_alpha_0_is_the_harness_own_model(folder: Path, models: Models) -> None:
    theirs = answers(HFLM(str(folder / "model"), dtype="float32", device="cpu", batch_size=2), folder)
    pairs = f"a:{models.adapter('llama', 1)}+{models.adapter('llama', 2)}"
    ours = answers(EnsembleLM(str(folder / "model"), pairs=pairs, alpha=0.0, dtype="float32"), folder)
    for own, other in zip(flat(ours["choice"]), flat(theirs["choice"]), strict=True):
        assert own == pytest.approx(other, abs=1e-3)
    for own, other in zip(flat(ours["rolling"]), flat(theirs["rolling"]), strict=True):
        assert own == pytest.approx(other, rel=1e-4)
    assert ours["until"] == theirs["until"]
    steered = answers(EnsembleLM(str(folder / "model"), pairs=pairs, alpha="a:2", dtype="float32"), folder)
    assert steered["choice"] != ours["choice"]


def test_crows_pairs_scores_a_sentence_as_the_harness_does(folder: Path, models: Models, tmp_path: Path) -> None:
    """The tokenizer puts nothing before a text; the first word counts all the same."""
    pairs = f"a:{models.adapter('llama', 1)}+{models.adapter('llama', 2)}"
    model = EnsembleLM(str(folder / "model"), pairs=pairs, alpha=1.0, dtype="float32")
    (tmp_path / "crows_pairs_anonymized.csv").write_text("sent_more,sent_less,bias_type\nw5 w6 w7,w8 w6 w7,x\n")
    (record,) = CrowsPairs().run(System("s", model.llm, SamplingParams(alpha=1.0)), tmp_path)
    asked = [Instance("loglikelihood", {}, ("", text), 0) for text in ("w5 w6 w7", "w8 w6 w7")]
    (more, _), (less, _) = model.loglikelihood(asked)
    assert (record["more"], record["less"]) == pytest.approx((more, less), abs=1e-4)


@pytest.mark.parametrize(
    "arguments", [["--model", "ensemble_decode", "--tasks", "a,b", "-h"], ["run", "--limit", "-1"], ["--help"], []]
)
def test_the_command_passes_everything_on(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(sys, "argv", ["ensemble-decode"])
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: seen.append(sys.argv))
    assert main(["lm-eval", *arguments]) == 0
    assert seen == [["lm_eval", *arguments]]


def flat(values: Any) -> list[float]:
    return [x for value in values for x in flat(value)] if isinstance(values, list | tuple) else [float(values)]


def test_a_trained_pair_is_taken_as_its_folder(tmp_path: Path) -> None:
    for side in ("expert", "anti_expert"):
        (tmp_path / side).mkdir()
    (tmp_path / "pair.json").write_text('{"alpha": 0.5}')
    trained = ExpertPair(tmp_path / "expert", tmp_path / "anti_expert", "base", 0.5)
    assert parse_pairs(f"a:{tmp_path};b:x", "base") == {"a": trained, "b": ExpertPair("x", base="base")}


def test_arguments() -> None:
    assert parse_alpha("a:1;b:0.5") == {"a": 1.0, "b": 0.5}
    assert parse_alpha(2) == 2
    assert set(parse_pairs("a:x+y;b:demo")) == {"a", "b"}
    with pytest.raises(ValueError, match="alpha is 'high'"):
        parse_alpha("high")
    with pytest.raises(ValueError, match="pairs holds 'x'"):
        parse_pairs("x")
