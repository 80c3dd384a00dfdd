"""``setup.py``: when the CUDA kernels are built, left out, or missed."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import setuptools

SWITCH = "ENSEMBLE_DECODE_CUDA"


@pytest.fixture
def setup_file(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py, which builds nothing here."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("setup_of_the_package", Path(__file__).parents[1] / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cuda_home(setup_file: ModuleType) -> Callable[[], Path | None]:
    return setup_file.cuda_home


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


#: What an nvcc of that toolkit knows; it writes down how it was called, as an object file.
NVCC = """#!/bin/sh
case $1 in
  --list-gpu-arch) printf 'compute_80\\ncompute_90\\n' ;;
  *) while [ "$1" != -o ]; do all="$all $1"; shift; done; echo "$all" > "$2" ;;
esac
"""


def toolkit(folder: Path, nvcc: str = NVCC, runtime: str = "lib64/libcudart_static.a") -> Path:
    for name, text in (("bin/nvcc", nvcc), (runtime, "")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "bin/nvcc").chmod(0o755)
    return folder


def test_what_nvcc_knows_is_compiled_for(setup_file: ModuleType, tmp_path: Path) -> None:
    """Before CUDA 12.8 there is no sm_100."""
    home = toolkit(tmp_path / "cuda")
    target, runtime = setup_file.compile_cuda(home, tmp_path / "built")
    assert runtime == home / "lib64"
    codes = [word for word in target.read_text().split() if word.startswith("-gencode")]
    assert [code.rpartition("=")[2] for code in codes] == ["sm_80", "sm_90", "compute_90"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"nvcc": "#!/bin/sh\necho compute_50\n"}, r"\S+/nvcc knows none of sm_80, sm_90, sm_100"),
        ({"nvcc": NVCC.replace("while", "exit 1; while")}, r"\S+/nvcc did not compile \S+\.cu \(it says why above\)"),
        ({"runtime": "lib64/libcudart.so"}, r"there is no libcudart_static\.a under \S+/cuda"),
    ],
    ids=["architectures", "compilation", "runtime"],
)
def test_a_toolkit_that_will_not_do_is_said_in_one_line(
    setup_file: ModuleType,
    changes: dict[str, str],
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    home = toolkit(tmp_path / "cuda", **changes)
    monkeypatch.setenv(SWITCH, "")
    assert setup_file.compile_cuda(home, tmp_path / "built") is None
    assert re.fullmatch(rf"ensemble_decode: {why}; building without CUDA\n", capsys.readouterr().err)
    monkeypatch.setenv(SWITCH, "1")
    with pytest.raises(SystemExit, match=rf"^ensemble_decode: {SWITCH} is 1, but {why}$"):
        setup_file.compile_cuda(home, tmp_path / "built")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_where_the_toolkit_is(cuda_home: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also behind a script of that name: there are a compiler and a runtime to link."""
    monkeypatch.setenv(SWITCH, "1")
    home = cuda_home()
    assert (home / "bin" / "nvcc").exists()
    assert list(home.rglob("libcudart_static.a"))
    monkeypatch.setenv(SWITCH, "0")
    assert cuda_home() is None
