"""Perplexity against transformers' own loop, and windows counted by hand."""

import math
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ensemble_decode import LLM, SamplingParams
from ensemble_decode.evaluation.metric import System
from ensemble_decode.evaluation.perplexity import Perplexity, read_text, windows
from ensemble_decode.evaluation.swept import SweptLLM
from ensemble_decode.models.smollm2 import smollm2_path
from tests.conftest import Models
from tests.models.test_loading import with_tokenizer


def test_windows_count_each_token_once() -> None:
    assert windows(10, 4, 4) == [(0, 4, 0), (4, 8, 4), (8, 10, 8)]
    assert windows(10, 4, 2) == [(0, 4, 0), (2, 6, 4), (4, 8, 6), (6, 10, 8)]
    assert windows(9, 4, 4)[-1] == (4, 8, 4)  # the last window would have no token with a context


def test_only_a_newline_ends_a_row_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "wiki.test.tokens").write_text("a \u2028 b\x85\n \nc\n", encoding="utf-8")
    assert read_text(tmp_path, "paper") == "a \u2028 b\x85\n\n\n\n\nc\n"


@pytest.fixture(scope="module")
def both() -> tuple[LLM, torch.nn.Module]:
    llm = LLM(str(smollm2_path()), dtype="float32", max_model_len=128, max_num_seqs=4)
    return llm, AutoModelForCausalLM.from_pretrained(smollm2_path(), dtype=torch.float32)


@pytest.mark.parametrize(("protocol", "stride"), [("paper", 96), ("huggingface", 40)])
def test_equals_transformers_own_loop(protocol: str, stride: int, request: pytest.FixtureRequest) -> None:
    root = os.environ.get("ENSEMBLE_DECODE_DATA")
    if root is None:
        pytest.skip("ENSEMBLE_DECODE_DATA is unset: WikiText-2 is in a folder that the user names")
    llm, model = request.getfixturevalue("both")
    metric = Perplexity(protocol, window=96, stride=stride, tokens=288)
    figures = metric.summarise(metric.run(System("target", llm, SamplingParams(alpha=0.0)), Path(root)))

    ids = torch.tensor([llm.tokenizer(read_text(Path(root), protocol))["input_ids"][:288]])
    total, count, previous = 0.0, 0, 0
    for begin in range(0, 288, stride):  # the loop of transformers' guide to perplexity
        end = min(begin + 96, 288)
        labels = ids[:, begin:end].clone()
        labels[:, : previous - begin] = -100
        with torch.no_grad():
            loss = model(ids[:, begin:end], labels=labels).loss
        valid = int((labels[:, 1:] != -100).sum())
        total, count, previous = total + float(loss) * valid, count + valid, end
        if end == 288:
            break
    assert figures["PPL"].value == pytest.approx(math.exp(total / count), rel=0, abs=1e-4)


@pytest.mark.parametrize("swept", [False, True])
@pytest.mark.parametrize(
    ("window", "prefix", "length"), [(None, "", 40), (40, "", 40), (41, "", 41), (None, "w5 w6 w7", 38)]
)
def test_a_window_of_the_model_s_length_is_scored(
    window: int | None, prefix: str, length: int, swept: bool, models: Models, tmp_path: Path
) -> None:
    """And one token more, for the last one takes no position."""
    (tmp_path / "wiki.test.raw").write_text(" ".join(f"w{3 + i * 7 % 180}" for i in range(100)))
    model = with_tokenizer(models.model("gpt2"), tmp_path / "model", 190)
    llm = LLM(str(model), dtype="float32", max_model_len=40)
    one = SweptLLM(llm, [0.0]) if swept else llm
    system = System("s", one, SamplingParams(alpha=0.0), prefix)  # type: ignore[arg-type]
    first = Perplexity("huggingface", window=window).run(system, tmp_path)[0]
    assert (first["end"], first["tokens"]) == (length, length - 1)
    assert math.isfinite(first["nll"])
    assert Perplexity("paper").lengths(40) == (8, 8)


@pytest.mark.parametrize("arguments", [{"protocol": "other"}, {"window": 1}])
def test_what_is_not_allowed_is_said(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Perplexity(**arguments)  # type: ignore[arg-type]


def test_missing_data_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"WikiText-2 is not in .*huggingface\.co"):
        read_text(tmp_path, "paper")
