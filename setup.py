# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled module tiger_ext._C; everything else stands in pyproject.toml."""

import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    sys.exit(
        f"tiger_ext compiles against PyTorch, which cannot be imported here ({error}). Install "
        "torch >= 2.10 first and build with `pip install --no-build-isolation .`"
    )


if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 10):
    sys.exit(f"tiger_ext needs torch >= 2.10, found {torch.__version__}")


def cuda_wanted():
    """Whether to compile the CUDA kernels: decided by torch and the toolkit, never by a GPU."""
    choice = os.environ.get("TIGER_EXT_CUDA", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"TIGER_EXT_CUDA={choice!r}: expected 1 (force), 0 (forbid) or unset (automatic)")
    if choice == "0":
        return False
    missing = None
    if torch.version.cuda is None:
        missing = f"torch {torch.__version__} is not a CUDA build"
    elif CUDA_HOME is None:
        missing = "no CUDA toolkit was found (set CUDA_HOME)"
    if missing and choice == "1":
        sys.exit(f"TIGER_EXT_CUDA=1, but {missing}")
    if missing and torch.version.cuda:
        print(
            f"warning: building for the CPU only: {missing}. CUDA parameters will be updated by "
            "the slow pure PyTorch reference.",
            file=sys.stderr,
        )
    return missing is None


compiler = os.environ.get("CXX", "c++").split()[0]
if "sdist" not in sys.argv and "egg_info" not in sys.argv and shutil.which(compiler) is None:
    sys.exit(f"tiger_ext needs a C++20 compiler, but {compiler!r} was not found (set CXX)")


def sources():
    """Return the files to compile: csrc/cuda only with CUDA."""
    files = (p.relative_to(ROOT) for p in (ROOT / "csrc").rglob("*.c*"))
    return sorted(
        str(p) for p in files if p.suffix in (".cpp", ".cu") and (cuda or "cuda" not in p.parts)
    )


version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M).group(1)
sanitize = os.environ.get("TIGER_EXT_SANITIZE")  # for example "address,undefined"
debug = os.environ.get("TIGER_EXT_DEBUG") == "1"  # keeps debug symbols, ten times the size
flags = [
    # Python's own flags ask for debug symbols.
    "-g" if debug else "-g0",
    "-O3",
    "-std=c++20",
    "-fopenmp",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
]
if sanitize:
    flags = [f if f != "-O3" else "-O1" for f in flags]
    flags += [
        f"-fsanitize={sanitize}",
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
        "-g",
    ]

nvcc_flags = ["-O3", "-std=c++20", "-fmad=false", "-Xcompiler=-Wall,-Wextra"]
if os.environ.get("TIGER_EXT_STRICT") == "1":  # `make cuda-build`: no warning, no spilled register
    nvcc_flags += ["-Werror=all-warnings", "-Xptxas=-v,-warn-spills,-warn-lmem-usage"]

cuda = cuda_wanted()
setup(
    ext_modules=[
        (CUDAExtension if cuda else CppExtension)(
            "tiger_ext._C",
            sources(),
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={"cxx": flags, "nvcc": nvcc_flags},
            extra_link_args=["-fopenmp"] + ([f"-fsanitize={sanitize}"] if sanitize else []),
            define_macros=[
                ("TIGER_EXT_VERSION", f'"{version}"'),
                ("TIGER_EXT_BUILT_WITH_TORCH", f'"{torch.__version__}"'),
            ],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
