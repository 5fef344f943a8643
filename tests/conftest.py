# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiger_ext

sys.path.append(str(Path(__file__).resolve().parent / "cuda_on_cpu"))
import emulation

if emulation.active:
    emulation.select(True)

try:  # only some test files need it; `make gpu-check` runs the others where it is missing
    from hypothesis import settings
except ImportError:
    pass
else:
    settings.register_profile("tests", derandomize=True, deadline=None, database=None)
    settings.load_profile("tests")
torch.sparse.check_sparse_tensor_invariants.disable()


def pytest_collection_modifyitems(config, items):
    # A GPU finds bad indices only while its kernels run: tests/cuda_on_cpu has the tests of that.
    if emulation.active:
        kept = [i for i in items if i.get_closest_marker("indices_checked_at_once") is None]
        config.hook.pytest_deselected(items=[i for i in items if i not in kept])
        items[:] = kept


@pytest.fixture(autouse=True)
def _same_random_numbers_and_threads():
    torch.manual_seed(20240607)
    threads, grad_mode = torch.get_num_threads(), torch.is_grad_enabled()
    yield
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad_mode)  # a step that was interrupted may have left another


@pytest.fixture
def run_python():
    """Run a program in a fresh interpreter that can import the package and the tests' modules."""

    def run(program: str, *, check: bool = True, **environment: str):
        here = Path(__file__).resolve().parent
        package = Path(tiger_ext.__file__).resolve().parent.parent  # the one under test
        env = {k: v for k, v in os.environ.items() if not k.startswith("TIGER_EXT_")}
        env["PYTHONPATH"] = os.pathsep.join([str(here), str(package)])
        result = subprocess.run(
            [sys.executable, "-c", program],
            env={**env, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
        if check:
            assert result.returncode == 0, result.stderr
        return result

    return run


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def on_each_instruction_set(request, run_python):
    """Run a program as `run_python` does, with each set of kernels that this processor can run.

    Which sets there are is the processor's: on one without AVX-512 its kernels cannot be run.
    """

    def run(program: str) -> tuple[str, str]:
        result = run_python(program, check=False, TIGER_EXT_CPU_ISA=request.param)
        if request.param != "baseline" and "is not available here" in result.stderr:
            pytest.skip(f"this processor has no {request.param}")
        assert result.returncode == 0, result.stderr
        return request.param, result.stdout

    return run
