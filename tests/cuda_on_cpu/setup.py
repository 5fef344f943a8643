# SPDX-License-Identifier: Apache-2.0
"""Builds tiger_ext._C with the CUDA kernels compiled by the host compiler, for tests only.

Run by `make cuda-on-cpu` from the project's root. Everything in csrc is compiled, the .cu files
through the files in cuda/ beside this one, and linked with the emulator.
"""

import os
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sanitize = os.environ.get("TIGER_EXT_SANITIZE", "")
flags = [
    # At -O2 GCC 12 was seen to merge a vector's load with the loads of its elements one by one,
    # which are there for memory that is not aligned, into one that wants it aligned.
    "-O1",
    "-std=c++20",
    "-fopenmp",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-strict-aliasing",  # nvcc does not assume it either
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-unknown-pragmas",  # unroll
]
link = ["-fopenmp"]
if sanitize:
    flags += [
        f"-fsanitize={sanitize}",
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
        "-g1",
    ]
    link += [f"-fsanitize={sanitize}"]

setup(
    name="tiger-ext-cuda-on-cpu",
    packages=["tiger_ext"],
    package_dir={"tiger_ext": "tiger_ext"},
    ext_modules=[
        CppExtension(
            "tiger_ext._C",
            sorted(
                os.path.relpath(path, ROOT)
                for path in [*(ROOT / "csrc").rglob("*.cpp"), *HERE.rglob("*.cpp")]
                if path.name not in ("selftest.cpp", "faults_test.cpp")
            ),
            include_dirs=[str(HERE / "include"), str(ROOT / "csrc")],
            extra_compile_args=flags,
            extra_link_args=link,
            define_macros=[
                ("TIGER_EXT_VERSION", '"0+cuda.on.cpu"'),
                ("TIGER_EXT_BUILT_WITH_TORCH", '"any"'),
            ],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
