"""The AVX-512 level of the CPU operators on machines without it: built with instructions that AVX2 computes, and tested."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .cpu import needs_library

pytestmark = [
    needs_library,
    pytest.mark.skipif(
        os.environ.get("ENSEMBLE_DECODE_FULL_GRID") != "1", reason="some minutes: only in the full grid"
    ),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX2 computes what AVX-512 would"),
]

ROOT = Path(__file__).parents[2]
HEADER = Path(__file__).with_name("avx512_on_avx2.h").read_text()
INSTRUCTIONS = '#pragma GCC target("arch=x86-64-v4,avx512bf16")\n'


def copy_with(folder: Path, header: str) -> Path:
    """A copy of the project in which the level's instructions are those of ``header``, built without CUDA."""
    parts = ("csrc", "ensemble_decode", "kernels", "tests", "setup.py", "pyproject.toml", "README.md", "LICENSE")
    for name in parts:
        source = ROOT / name
        if source.is_dir():
            unwanted = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(source, folder / name, symlinks=True, ignore=unwanted)
        elif source.exists():
            shutil.copy(source, folder)
    cpu = folder / "csrc" / "cpu"
    (cpu / "avx512_on_avx2.h").write_text(header)
    level, choice = cpu / "layers_v4.cpp", cpu / "layers.cpp"
    before, found, after = level.read_text().partition(INSTRUCTIONS)
    assert found
    level.write_text(
        f'{before}#include <cstring>\n#pragma GCC target("arch=x86-64-v3")\n#include "avx512_on_avx2.h"\n{after}'
    )
    choice.write_text("#define __builtin_cpu_supports(name) 1\n" + choice.read_text())
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(build, cwd=folder, env={**os.environ, "ENSEMBLE_DECODE_CUDA": "0"}, capture_output=True)
    assert done.returncode == 0, done.stdout.decode()[-4000:] + done.stderr.decode()[-4000:]
    return folder


def run_tests(folder: Path, *which: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "ENSEMBLE_DECODE_CPU": "v4", "PYTHONPATH": str(folder), "ENSEMBLE_DECODE_FULL_GRID": ""}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:xdist", *which]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_the_level_passes_the_tests_of_operators_and_models(tmp_path: Path) -> None:
    folder = copy_with(tmp_path, HEADER)
    done = run_tests(folder, "tests/ops", "tests/models", "tests/engine/test_correctness.py")
    assert done.returncode == 0, done.stdout[-4000:]


def test_a_wrong_instruction_is_found(tmp_path: Path) -> None:
    wrong = HEADER.replace("flushed(upper)) + flushed(lower)", "flushed(upper)) - flushed(lower)")
    assert wrong != HEADER
    assert run_tests(copy_with(tmp_path, wrong), "tests/ops/test_linear.py").returncode == 1
