"""The demo's page: what it asks of the engine, and how it lays out what comes back."""

import argparse
import json
import math

import pytest

from ensemble_decode import demo
from ensemble_decode.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from ensemble_decode.models.pairs import ExpertPair


class FakeLLM:
    """Answers with texts that name their α; "she" loses half of what "he" wins for each unit of α."""

    def __init__(self):
        self.requests = []

    def generate(self, prompts, params, *, use_tqdm=True):
        prompts = [prompts] if isinstance(prompts, str) else prompts
        each = params if isinstance(params, list) else [params] * len(prompts)
        self.requests.append((prompts, each))
        return [self.answer(prompt, param) for prompt, param in zip(prompts, each, strict=True)]

    def answer(self, prompt, params):
        logprobs = None
        if params.logprobs:
            she = 0.8 / 2**params.alpha
            logprobs = [
                {
                    5: Logprob(math.log(she), 1, " she", math.log(0.8)),
                    6: Logprob(math.log(1 - she), 2, " he", math.log(0.2)),
                }
            ]
        text = f" she went to α{params.alpha:g}\nand came back"
        output = CompletionOutput(0, text, [5] * params.max_tokens, None, logprobs, "length")
        return RequestOutput("0", prompt, [1], [output], True, params.seed, RequestMetrics(0.0))


def arguments(*argv):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(argv)


@pytest.fixture
def llm(monkeypatch):
    fake = FakeLLM()
    monkeypatch.setattr(demo, "load", lambda *args, **kwargs: fake)
    return fake


def test_page_shows_every_prompt_at_every_alpha(llm, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert demo.run(arguments()) == 0
    page = capsys.readouterr().out
    for prompt in demo.PROMPTS:
        assert page.count(f"{prompt} …") == 2  # its texts, and what moved most
    for alpha in ("0", "0.5", "1", "2"):
        assert page.count(f"α{alpha}\n") + page.count(f"α{alpha} ") >= len(demo.PROMPTS)
    assert "she 80.0% → 20.0%" in page
    assert page.count("tokens/s") == 4
    assert "\033" not in page  # no colours into a pipe
    assert max(map(len, page.splitlines())) <= 120


def test_one_batch_and_the_same_seeds_at_every_alpha(llm):
    demo.run(arguments("--alpha", "0", "3", "--seed", "7", "--max-tokens", "9"))
    timed = [(prompts, each) for prompts, each in llm.requests if each[0].max_tokens == 9]
    assert [each[0].alpha for _, each in timed] == [0.0, 3.0]
    for prompts, each in timed:
        assert prompts == list(demo.PROMPTS)
        assert [params.seed for params in each] == [7, 8, 9, 10, 11]


def test_json_is_one_object(llm, capsys):
    demo.run(arguments("--json", "--prompt", "A", "--prompt", "B", "--alpha", "0", "1"))
    found = json.loads(capsys.readouterr().out)
    assert found["prompts"] == ["A", "B"]
    assert [one["alpha"] for one in found["steered"]] == [0.0, 1.0]
    assert found["steered"][0]["tokens_per_s"] > 0
    she, he = found["moved"]["prompts"]["A"]
    assert (she["token"], round(she["target"], 3), round(she["ensemble"], 3)) == (" she", 0.8, 0.4)
    assert he["ensemble"] > he["target"]


def test_a_trained_pair_is_taken_as_its_folder(tmp_path, monkeypatch):
    for side in ("expert", "anti_expert"):
        (tmp_path / side).mkdir()
    (tmp_path / "pair.json").write_text('{"alpha": 0.5}')
    loaded = []
    monkeypatch.setattr("ensemble_decode.LLM", lambda model, pairs, **kwargs: loaded.append(pairs["demo"]))
    demo.load("m", [str(tmp_path)], "auto", max_num_seqs=8)
    demo.load("m", ["x"], "auto", max_num_seqs=8)
    demo.load("m", ["x", "y"], "auto", max_num_seqs=8)
    trained = ExpertPair(tmp_path / "expert", tmp_path / "anti_expert", alpha=0.5)
    assert loaded == [trained, ExpertPair("x"), ExpertPair("x", "y")]


def test_narrow_terminal_puts_texts_below_each_other():
    lines = demo.Page(width=44, colour=False).side_by_side("P", [("α = 0", "one two " * 10), ("α = 0.5", "three")])
    assert lines[0] == "P …"
    assert lines[1].startswith("  α = 0")
    assert lines[-1] == "  α = 0.5  three"
    assert max(map(len, lines)) <= 44


def test_columns_are_aligned_and_wrapped():
    lines = demo.Page(width=60, colour=False).side_by_side("P", [("α = 0", "word " * 12), ("α = 1", "other " * 6)])
    starts = {line.index("other") for line in lines if "other" in line}
    assert starts == {lines[1].index("α = 1")}
    assert max(map(len, lines)) <= 60


def test_gendered_words_are_coloured_whole():
    page = demo.Page(width=80, colour=True)
    assert page.gendered("She sheltered him.") == "\033[35mShe\033[0m sheltered \033[36mhim\033[0m."


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--alpha", "nan"], "--alpha is nan"),
        (["--max-tokens", "0"], "--max-tokens is 0"),
        (["--pair", "a,b,c"], "--pair is 'a,b,c'"),
        (["--pair", "a,"], "--pair is 'a,'"),
    ],
)
def test_bad_flags_are_refused_before_anything_loads(argv, message, monkeypatch):
    monkeypatch.setattr(demo, "load", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        demo.run(arguments(*argv))
