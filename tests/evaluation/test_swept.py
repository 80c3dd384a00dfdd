"""Systems that differ in α share the forward of what they score, and are scored as each by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ensemble_decode import LLM, ExpertPair
from ensemble_decode.cli import main
from ensemble_decode.cli.systems import parse_system, sweep
from ensemble_decode.evaluation.bold import Continuations
from ensemble_decode.evaluation.crows_pairs import CrowsPairs
from ensemble_decode.evaluation.diversity import Diversity
from ensemble_decode.evaluation.metric import Record, System
from ensemble_decode.evaluation.perplexity import Perplexity
from ensemble_decode.evaluation.runner import make_tasks, run_tasks
from ensemble_decode.evaluation.swept import SweptLLM, share_forwards
from tests.conftest import Models
from tests.models.test_loading import with_tokenizer


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [f"w{i} w7 w8,w{i} w9 w10 w11,age" for i in range(5, 12)]
    (tmp_path / "crows_pairs_anonymized.csv").write_text("\n".join(["sent_more,sent_less,bias_type", *rows]) + "\n")
    return tmp_path


def test_shared_forwards_give_the_same_scores(models: Models, data: Path, tmp_path: Path) -> None:
    target = str(with_tokenizer(models.model("llama"), tmp_path / "model", 190))
    llm = LLM(target, {"a": ExpertPair(models.adapter("llama", 1), models.adapter("llama", 2))}, dtype="float32")
    specs = [*sweep([0.0, 0.5, 2.0]), parse_system("trigger: alpha=0; trigger=w20 w21")]
    metrics = [CrowsPairs(resamples=20), Diversity(Continuations(str(tmp_path)))]
    tasks = make_tasks([spec.of(llm) for spec in specs], metrics, {}, data, None)
    shared = share_forwards(tasks, tmp_path / "records")
    assert [task.metric.name for task in shared] == ["crows_pairs"] * 4 + ["diversity"] * 4
    assert [isinstance(task.system.llm, SweptLLM) for task in shared] == [True] * 3 + [False] * 5
    records = []
    for name, some in (("alone", tasks), ("shared", shared)):
        some = [task for task in some if task.metric.name == "crows_pairs"]
        run_tasks(some, data, tmp_path / name, say=lambda line: None)
        paths = [task.path(tmp_path / name / "records") for task in some]
        records.append([json.loads(path.read_text())["records"] for path in paths])
    for alone, together in zip(*records, strict=True):
        for one, other in zip(alone, together, strict=True):
            assert one["more"] == pytest.approx(other["more"], abs=1e-4)
            assert one["less"] == pytest.approx(other["less"], abs=1e-4)
    assert records[1][0] != records[1][2]  # α moves scores
    again = share_forwards(tasks, tmp_path / "shared" / "records")
    assert not any(isinstance(task.system.llm, SweptLLM) for task in again)


@pytest.mark.parametrize("order", ["0,1", "1,0"])
def test_an_interrupted_run_writes_the_same_bytes_as_a_whole_one(
    order: str, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two α the second is scored by itself after the interruption, and beside the first without one."""
    model = with_tokenizer(models.model("llama"), tmp_path / "model", 190)
    (tmp_path / "wiki.test.tokens").write_text(" ".join(f"w{3 + i * 7 % 180}" for i in range(120)))
    pair = f"a={models.adapter('llama', 1)},{models.adapter('llama', 2)}"
    command = ["evaluate", "-m", str(model), "--pair", pair, "--dtype", "float32", "--alpha", order, "--window", "40"]
    command += ["--data", str(tmp_path), "--metrics", "perplexity", "--out"]
    run, started = Perplexity.run, []

    def interrupted(self: Perplexity, system: System, data: Path, limit: int | None = None) -> list[Record]:
        started.append(system.name)
        if len(started) == 2:
            raise KeyboardInterrupt
        return run(self, system, data, limit)

    assert main([*command, str(tmp_path / "whole")]) == 0
    monkeypatch.setattr(Perplexity, "run", interrupted)
    assert main([*command, str(tmp_path / "cut")]) == 130
    assert main([*command, str(tmp_path / "cut")]) == 0
    whole, cut = (
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
        for name in ("whole", "cut")
    )
    assert whole == cut
