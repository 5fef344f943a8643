# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
from cases import RULES
from workload import outcome

from tiger_ext import _C

ISA = "from tiger_ext import _C; print(_C.cpu_isa())"
OUTCOME = ISA + "; import json, workload; print(json.dumps(workload.outcome()))"
ISAS = ("baseline", "avx2", "avx512")


@pytest.fixture(scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = outcome()
    torch.set_num_threads(threads)
    return result


def test_the_workload_tells_the_rules_apart(one_thread):
    assert len(set(one_thread.values())) == len(RULES)


def test_repeated_runs(one_thread):
    torch.set_num_threads(1)
    assert outcome() == one_thread


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_numbers_of_threads(one_thread, threads):
    torch.set_num_threads(threads)
    assert outcome() == one_thread


def test_instruction_sets(one_thread, on_each_instruction_set):
    isa, printed = on_each_instruction_set(OUTCOME)
    name, digests = printed.splitlines()
    assert name == isa
    assert json.loads(digests) == one_thread


def test_best_instruction_set_is_the_default():
    flags = torch.backends.cpu.get_cpu_capability()
    expected = {"AVX512": "avx512", "AVX2": "avx2"}
    if flags in expected:
        assert _C.cpu_isa() == expected[flags]
    assert _C.cpu_isa() in ISAS


def test_unknown_instruction_set_is_refused(run_python):
    found = run_python(ISA, check=False, TIGER_EXT_CPU_ISA="sse9")
    assert found.returncode == 1
    assert "RuntimeError: TIGER_EXT_CPU_ISA=sse9" in found.stderr
    assert "baseline" in found.stderr


def test_unavailable_instruction_set_fails_before_the_first_write(run_python):
    run_python(
        """
import torch, tiger_ext
p = torch.nn.Parameter(torch.ones(5))
q = torch.nn.Parameter(torch.ones(5, 2))
opt = tiger_ext.AdamW([p, q])
p.grad = torch.ones(5)
q.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (5, 2))
try:
    opt.step()
except RuntimeError as error:
    assert "TIGER_EXT_CPU_ISA=sse9" in str(error)
else:
    raise SystemExit("accepted")
assert torch.equal(p, torch.ones(5)) and torch.equal(q, torch.ones(5, 2))
assert not opt.state
""",
        TIGER_EXT_CPU_ISA="sse9",
    )


# What torch.set_flush_denormal(True) sets is a mode of the thread that calls it, and of those that
# it starts later.
SUBNORMAL = """
import hashlib, torch, tiger_ext
torch.manual_seed(0)
def subnormal(*shape):
    return torch.randn(*shape) * 2.0**-130
made = [torch.nn.Parameter(subnormal(300_000)), torch.nn.Parameter(subnormal(3000, 40))]
made += [torch.nn.Parameter(p.detach().clone()) for p in made]
grads = [[subnormal(300_000), torch.sparse_coo_tensor(
    torch.randint(3000, (1, 9000)), subnormal(9000, 40), (3000, 40))] * 2 for _ in range(2)]
def digest(flush, threads):
    params = [torch.nn.Parameter(p.detach().clone()) for p in made]
    options = dict(scale="rms_rows", direction="power", direction_scale=1.0)
    opt = tiger_ext.Tiger([{"params": params[:2]}, {"params": params[2:], **options}],
                          rms_floor=0.0)
    torch.set_flush_denormal(flush)
    torch.set_num_threads(threads)
    for gs in grads:
        for p, g in zip(params, gs):
            p.grad = g
        opt.step()
        p.grad = None
    torch.set_flush_denormal(False)
    tensors = params + [opt.state[p]["exp_avg"] for p in params]
    assert all(bool((t.detach().view(torch.int32) << 1 != 0).any()) for t in tensors)
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()
"""


@pytest.mark.parametrize("first", [False, True])
def test_flushed_subnormal_numbers_for_any_number_of_threads(run_python, first):
    code = SUBNORMAL + f"\nfor flush in ({first}, {not first}):\n    for threads in (1, 2, 4):\n"
    found = run_python(code + "        print(digest(flush, threads))")
    assert len(set(found.stdout.split())) == 1, found.stdout


def test_the_mode_of_the_calling_thread_stays(run_python):
    run_python(
        SUBNORMAL
        + """
p = torch.nn.Parameter(torch.ones(4))
p.grad = torch.ones(4)
torch.set_flush_denormal(True)
tiger_ext.Tiger([p]).step()
assert not bool((torch.tensor([1e-38]) * 0.01 != 0).any())
"""
    )
