# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from both import available

# Without a GPU and outside the test build there are no CUDA kernels to test.
collect_ignore_glob = [] if available() else ["test_*.py"]


@pytest.fixture(autouse=True)
def _one_thread(_same_random_numbers_and_threads):
    # The problems are small, and the CPU's results do not depend on the number of threads.
    torch.set_num_threads(1)
