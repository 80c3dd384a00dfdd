"""Builds the operators (``csrc``) into ``ensemble_decode/_C.abi3.so``: C++ always, CUDA where nvcc is.

Everything else about the package is in pyproject.toml. The extension uses LibTorch's stable ABI:
one file for every Python from 3.11 on and every torch from 2.13 on. A build host needs no GPU, and neither does a
machine that loads the file: the CUDA runtime is linked statically. ``ENSEMBLE_DECODE_CUDA=0`` leaves CUDA out,
``ENSEMBLE_DECODE_CUDA=1`` makes it an error to build without.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.exit(
        "ensemble_decode builds against your torch, and none is installed here: run "
        "`pip install torch==2.13.0 setuptools wheel ninja`, then `pip install --no-build-isolation .`"
    )

ROOT = Path(__file__).parent
TORCH_TARGET_VERSION = "0x020d000000000000"
# Of these, what nvcc knows (CUDA 12.8 is the first with 100). The last one also as PTX, for GPUs that are newer.
CUDA_ARCHITECTURES = ("80", "90", "100")


def cuda_home() -> Path | None:
    """Where the CUDA toolkit is; None where there is none, or it isn't wanted."""
    wanted = os.environ.get("ENSEMBLE_DECODE_CUDA", "")
    if wanted == "0":
        return None
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        if wanted == "1":
            sys.exit("ensemble_decode: ENSEMBLE_DECODE_CUDA is 1, but there is no nvcc on PATH")
        return None
    # nvcc on PATH may be a script that calls another: it says itself where it lies.
    dry = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True)
    tops = [line.partition(" TOP=")[2].strip() for line in dry.stderr.splitlines() if " TOP=" in line]
    if not tops:
        sys.exit(f"ensemble_decode: {nvcc} does not work here (set ENSEMBLE_DECODE_CUDA=0 to build without it)")
    return Path(tops[0]).resolve()


def without_cuda(why: str) -> None:
    """Says why CUDA is left out; the end where it was asked for."""
    if os.environ.get("ENSEMBLE_DECODE_CUDA") == "1":
        sys.exit(f"ensemble_decode: ENSEMBLE_DECODE_CUDA is 1, but {why}")
    print(f"ensemble_decode: {why}; building without CUDA", file=sys.stderr)


def compile_cuda(home: Path, folder: Path) -> tuple[Path, Path] | None:
    """Compiles ``csrc/cuda`` into ``folder``: the object file, and the folder of the runtime that it needs; None without."""
    runtime = next(home.rglob("libcudart_static.a"), None)
    if runtime is None:
        return without_cuda(f"there is no libcudart_static.a under {home}")
    nvcc = str(home / "bin" / "nvcc")
    source = ROOT / "csrc" / "cuda" / "ensemble_sample.cu"
    target = folder / "ensemble_sample_cuda.o"
    read = [
        *(ROOT / "csrc").glob("*.h"),
        *(ROOT / "csrc" / "cpu").glob("*.h"),
        *source.parent.iterdir(),
        Path(__file__),
    ]
    if target.exists() and target.stat().st_mtime > max(p.stat().st_mtime for p in read):
        return target, runtime.parent
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    architectures = [a for a in CUDA_ARCHITECTURES if f"compute_{a}" in known]
    if not architectures:
        return without_cuda(f"{nvcc} knows none of sm_{', sm_'.join(CUDA_ARCHITECTURES)}")
    folder.mkdir(parents=True, exist_ok=True)
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    codes.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
    # --fmad=false for the same reason as -ffp-contract=off below.
    flags = ["-O3", "-std=c++17", "--fmad=false", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    if subprocess.run([nvcc, *flags, *codes, "-c", str(source), "-o", str(target)]).returncode:
        return without_cuda(f"{nvcc} did not compile {source.name} (it says why above)")
    return target, runtime.parent


class Build(BuildExtension):  # type: ignore[misc]
    """Before the C++ files, compiles ``csrc/cuda`` where the toolkit is: some ten seconds."""

    def build_extensions(self) -> None:
        home = cuda_home()
        compiled = compile_cuda(home, Path(self.build_temp).resolve()) if home is not None else None
        if home is not None and compiled is not None:
            kernels, runtime = compiled
            for extension in self.extensions:
                extension.extra_objects.append(str(kernels))
                extension.define_macros.append(("ENSEMBLE_DECODE_WITH_CUDA", None))
                extension.include_dirs.append(str(home / "include"))
                extension.library_dirs.append(str(runtime))
                extension.libraries += ["cudart_static", "dl", "pthread", "rt"]
        super().build_extensions()


def extensions() -> list:
    if shutil.which("c++") is None and shutil.which("g++") is None:
        print("ensemble_decode: no C++ compiler found; the package will run on its PyTorch reference", file=sys.stderr)
        return []
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("[!c]*/*.cpp"))
    sources += sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cpu").glob("*.cpp"))
    return [
        CppExtension(
            "ensemble_decode._C",
            sources,
            extra_compile_args={
                "cxx": [
                    "-O3",
                    "-std=c++20",
                    # The sampling contract fixes every rounding: no contraction that one back end
                    # does and another does not. Kernels that want an FMA ask for it by name.
                    "-ffp-contract=off",
                    "-fno-math-errno",
                    "-fvisibility=hidden",
                    # Python's own flags ask for debug information: 15 times the file, and nearly half of the time.
                    "-g0",
                    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
                ]
            },
            py_limited_api=True,
        )
    ]


if tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2]) < (2, 13):
    sys.exit(f"ensemble_decode needs torch 2.13 or later to build, found {torch.__version__}")

setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": Build.with_options(use_ninja=True)},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
