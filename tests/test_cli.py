"""The command line, run as a user runs it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ensemble_decode.cli import main
from ensemble_decode.cli.common import parse_alpha
from tests.conftest import Models
from tests.models.test_loading import with_tokenizer


def run(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ensemble_decode", *arguments],
        capture_output=True,
        text=True,
        input=stdin,
        timeout=300,
        check=False,
    )


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """As :func:`run`, in this process: a new one imports for seconds."""

    def call(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        code = main(arguments)
        captured = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def model(models: Models, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(with_tokenizer(models.model("llama"), tmp_path_factory.mktemp("cli") / "m", 199))


def test_help_teaches() -> None:
    text = run("--help").stdout
    for word in ("demo", "generate", "bench", "examples:", "--pair gender=demo"):
        assert word in text
    for command in ("demo", "generate", "bench"):
        assert run(command, "--help").returncode == 0


def test_generate_json_from_arguments_file_and_stdin(
    model: str, tmp_path: Path, models: Models, command: Command
) -> None:
    pair = f"a={models.adapter('llama', 1)},{models.adapter('llama', 2)}"
    common = (
        "generate",
        "-m",
        model,
        "-p",
        pair,
        "-a",
        "a=0.5",
        "--seed",
        "3",
        "--max-tokens",
        "5",
        "--json",
        "--logprobs",
        "2",
    )
    lines = ["w5 w6", "w9 \u2028 w7 \x85"]  # only a newline ends a prompt
    (tmp_path / "prompts.txt").write_text("\r\n".join(lines) + "\r\n\n", encoding="utf-8", newline="")
    outputs = [
        command(*common, *lines).stdout,
        command(*common, "-f", str(tmp_path / "prompts.txt")).stdout,
        command(*common, stdin="\n".join(lines)).stdout,
    ]
    assert outputs[0] == outputs[1] == outputs[2]
    found = [json.loads(line) for line in outputs[0].rstrip("\n").split("\n")]
    assert [entry["prompt"] for entry in found] == lines
    assert found[0]["seed"] == 3
    assert len(found[0]["outputs"][0]["logprobs"][0]) >= 2


def test_generate_prints_text(model: str) -> None:
    done = run("generate", "-m", model, "w5 w6", "--max-tokens", "3", "-t", "0", "-n", "2")
    assert done.returncode == 0
    assert done.stdout.count("w5 w6") == 2


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("-a", "x"), "--alpha is 'x'"),
        (("-a", "b=1"), "alpha names the pair 'b', known are none"),
        (("-p", "x"), "--pair is 'x'"),
        (("-m", "/nowhere"), "no such folder"),
        (("--top-p", "2"), "top_p is 2.0"),
        (("-f", "x.txt"), "one of the two"),
        (("--nucleus", "both"), "nucleus is 'both'"),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], word: str, model: str, command: Command) -> None:
    rest = () if "-m" in arguments else ("-m", model)
    done = command("generate", "w5", *rest, *arguments)
    assert done.returncode == 2
    assert word in done.stderr
    assert done.stderr.splitlines()[-1].startswith("ensemble-decode: ")


def test_files_that_can_not_be_read_or_written_are_named_in_one_line(
    model: str, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    latin, file = tmp_path / "latin.txt", tmp_path / "file"
    latin.write_bytes("w5\ncafé\n".encode("latin-1"))
    file.touch()
    pair = ("--pair", "a=demo", "--data", str(tmp_path))
    cases = {
        ("generate", "-f", str(tmp_path)): f"{str(tmp_path)!r}: Is a directory",
        ("generate", "-f", str(tmp_path / "none")): f"{str(tmp_path / 'none')!r}: No such file",
        ("generate", "-f", str(latin)): f"--file {str(latin)!r} is not UTF-8 at byte 6",
        ("calibrate", *pair, "--out", str(file)): f"{str(file)!r}: File exists",
        ("calibrate", *pair, "--out", str(file / "x")): f"{str(file / 'x')!r}: Not a directory",
        ("evaluate", "--data", str(tmp_path), "--metrics", "diversity", "--out", str(file)): f"{str(file)!r}: File ex",
    }
    monkeypatch.setattr("ensemble_decode.evaluation.bold.Continuations.check", lambda self, data: None)
    for arguments, message in cases.items():
        done = command(*arguments, "-m", model)
        assert done.returncode == 2
        assert f"ensemble-decode: {message}" in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("flag", "package"), [("--html", "jinja2"), ("--csv", "pandas")])
def test_explain_says_what_it_needs_before_it_begins(
    flag: str, package: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else object())
    monkeypatch.setattr("ensemble_decode.cli.explain.load_model", lambda args: pytest.fail("it began"))
    done = command("explain", "w5", flag, "file")
    assert (done.returncode, done.stderr) == (
        2,
        f"ensemble-decode: {flag} needs {package}: pip install 'ensemble_decode[report]'\n",
    )


def test_no_prompts() -> None:
    done = run("generate", stdin="\n\n")
    assert (done.returncode, done.stderr.count("\n"), "no prompts" in done.stderr) == (2, 1, True)


def test_bench_json(model: str, command: Command) -> None:
    done = command(
        "bench",
        "-m",
        model,
        "--batch",
        "1",
        "2",
        "--prompt-tokens",
        "8",
        "--new-tokens",
        "4",
        "--rounds",
        "1",
        "--json",
    )
    results = json.loads(done.stdout)
    assert [entry["batch"] for entry in results] == [1, 2]
    assert all(entry["tokens_per_s"] > 0 for entry in results)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (["2", "0"], "--batch is 0, allowed is 1 or more"),
        (["1", "65"], "--batch is 65, allowed is --max-num-seqs (64) or less"),
    ],
)
def test_bench_refuses_a_batch(batch: list[str], message: str) -> None:
    done = run("bench", "-m", "nowhere", "--batch", *batch)
    assert (done.returncode, done.stderr.count("\n"), message in done.stderr) == (2, 1, True)


def test_parse_alpha() -> None:
    assert parse_alpha(None) is None
    assert parse_alpha("1.5") == 1.5
    assert parse_alpha("gender=1, race=0.5") == {"gender": 1.0, "race": 0.5}


def test_explain(model: str, models: Models, tmp_path: Path, command: Command) -> None:
    page, table = tmp_path / "why.html", tmp_path / "why.csv"
    common = ("explain", "w5 w6", "-m", model, "-p", f"a={models.adapter('llama', 1)},{models.adapter('llama', 2)}")
    done = command(*common, "--max-tokens", "4", "--html", str(page), "--csv", str(table))
    assert done.returncode == 0
    assert "log-odds" in done.stdout
    assert "\x1b[" not in done.stdout  # not a terminal
    assert "<!doctype html>" in page.read_text()
    assert table.read_text().startswith("step,role,token_id")
    found = json.loads(command(*common, "--max-tokens", "4", "--json").stdout)
    assert len(found["steps"]) == 4
