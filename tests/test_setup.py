"""``setup.py``: when the CUDA kernels are built, left out, or missed."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import setuptools

SWITCH = "ENSEMBLE_DECODE_CUDA"


@pytest.fixture
def cuda_home(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path | None]:
    """The function of setup.py, which builds nothing here."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("setup_of_the_package", Path(__file__).parents[1] / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.cuda_home


def test_without_nvcc_cuda_is_left_out_unless_it_is_wanted(
    cuda_home: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for value in ("", "0"):
        monkeypatch.setenv(SWITCH, value)
        assert cuda_home() is None
    monkeypatch.setenv(SWITCH, "1")
    with pytest.raises(SystemExit, match=rf"^ensemble_decode: {SWITCH} is 1, but there is no nvcc on PATH$"):
        cuda_home()


def test_an_nvcc_that_does_not_work_is_said_in_one_line(
    cuda_home: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv(SWITCH, "")
    with pytest.raises(SystemExit, match=r"^ensemble_decode: \S+/nvcc does not work here \(set .*\)$"):
        cuda_home()
    monkeypatch.setenv(SWITCH, "0")
    assert cuda_home() is None


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_where_the_toolkit_is(cuda_home: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also behind a script of that name: there are a compiler and a runtime to link."""
    monkeypatch.setenv(SWITCH, "1")
    home = cuda_home()
    assert (home / "bin" / "nvcc").exists()
    assert list(home.rglob("libcudart_static.a"))
    monkeypatch.setenv(SWITCH, "0")
    assert cuda_home() is None
