"""Builds the C++ operators (``csrc``) into ``ensemble_decode/_C.abi3.so``.

Everything else about the package is in pyproject.toml. The extension uses LibTorch's stable ABI:
one file for every Python from 3.11 on and every torch from 2.13 on.
"""

import shutil
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
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
