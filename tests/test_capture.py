# SPDX-License-Identifier: Apache-2.0
"""Steps in a captured CUDA graph whose replays could not do the same are refused by a sentence.

No graph is captured here: torch is made to say so. tests/cuda_on_cpu/test_contract_gpu.py captures
graphs, on a GPU.
"""

import itertools
from contextlib import contextmanager

import pytest
import torch
from cases import clock_of, dense_grad, parameter, sparse_grad
from oracle import same_bits, unchanged
from torch.utils._python_dispatch import TorchDispatchMode

from tiger_ext import AdamW, Lion, Tiger

ROADS = pytest.mark.parametrize("fused", [None, False], ids=["native", "reference"])


@contextmanager
def capturing(monkeypatch, *, cpu_is_gpu=False):
    """Let torch say that a graph is being captured; ``cpu_is_gpu``: of steps on the CPU."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        if cpu_is_gpu:
            patch.setattr("tiger_ext.step.check_capture", lambda *_: None)
        yield


def ready(optimizer, fused, **options):
    """Make an optimizer that has taken a step."""
    p = parameter(6, 4)
    opt = optimizer([p], fused=fused, capturable=True, **options)
    p.grad = dense_grad(p)
    opt.step()
    return opt, p


def assert_refused(opt, monkeypatch, match):
    """The step raises and changes nothing; outside of the capture it is taken."""
    groups = [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]
    with (
        unchanged(opt),
        capturing(monkeypatch),
        pytest.raises(RuntimeError, match=match),
    ):
        opt.step()
    assert groups == [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]
    opt.step()


@ROADS
def test_a_group_that_is_not_capturable_is_refused(fused, monkeypatch):
    opt, _ = ready(Tiger, fused)
    opt.param_groups[0]["capturable"] = False
    assert_refused(opt, monkeypatch, "Tiger.step is being captured.*capturable=True")


@ROADS
def test_an_accumulation_window_is_refused(fused, monkeypatch):
    opt, _ = ready(Tiger, fused, accumulation_steps=2)
    match = r"group 0 has accumulation_steps=2.*accumulation_steps=1"
    assert_refused(opt, monkeypatch, match)


@ROADS
def test_nonfinite_raise_is_refused(fused, monkeypatch):
    opt, _ = ready(Lion, fused)
    opt.add_param_group({"params": [parameter(3)], "nonfinite": "raise", "fused": fused})
    assert_refused(opt, monkeypatch, r"group 1 has nonfinite='raise'.*'skip'")


@ROADS
def test_a_learning_rate_in_a_tensor_on_the_cpu_is_refused(fused, monkeypatch):
    opt, _ = ready(AdamW, fused, lr=torch.tensor(0.1))
    assert_refused(opt, monkeypatch, "the lr of group 0 is a tensor on the CPU")


@ROADS
def test_a_parameter_on_the_cpu_is_refused(fused, monkeypatch):
    opt, p = ready(Tiger, fused)
    assert_refused(opt, monkeypatch, r"parameter \(group 0, position 0\) is on the CPU")
    p.grad = None
    with capturing(monkeypatch):
        opt.step()  # without a gradient it takes no part


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
def test_a_tensor_of_the_scaler_on_the_cpu_is_refused(name, monkeypatch):
    opt, p = ready(Tiger, None)
    p.grad = None
    setattr(opt, name, torch.ones(()) if name == "grad_scale" else torch.zeros(()))
    assert_refused(opt, monkeypatch, "grad_scale or found_inf is on the CPU")


def test_tracked_rows_want_a_record_before_the_capture(monkeypatch):
    table = torch.nn.Embedding(6, 4)
    opt = Tiger(table.parameters(), rows="tracked", capturable=True)
    opt.track(table)

    def forward(*ids):
        table.weight.grad = None
        table(torch.tensor(ids)).sum().backward()

    table.weight.grad = torch.ones(6, 4)
    match = "rows='tracked', but the CUDA graph"
    with unchanged(opt), capturing(monkeypatch, cpu_is_gpu=True):
        with pytest.raises(RuntimeError, match=match):
            opt.step()
        with pytest.raises(RuntimeError, match=match):
            forward(1)
    forward(1)
    opt.step()
    forward(2)
    before = table.weight.detach().clone()
    with capturing(monkeypatch, cpu_is_gpu=True):
        forward(4)
        opt.step()
    changed = (table.weight.detach() != before).any(1)
    assert changed.nonzero().flatten().tolist() == [2, 4]


class HostReads(TorchDispatchMode):
    """Counts the operations whose result or its size the host must know."""

    NAMES = ("aten::_local_scalar_dense", "aten::nonzero", "aten::_unique2")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = func.name().startswith("aten::index") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8)
            for i in (args[1] if isinstance(args[1], (list, tuple)) else [])
        )
        self.count += masks or func.name() in self.NAMES
        return func(*args, **(kwargs or {}))


OPTIONS = {
    "optimizer": [Tiger, Lion, AdamW],
    "rows": [None, "nonzero"],
    "scale": [None, "rms", "rms_rows"],
    "lazy": ["frozen", "decay"],
    "nonfinite": ["propagate", "skip", "shrink"],
    "sparse": [False, True],
}


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_the_reference_is_captured_where_it_reads_nothing_on_the_host(lr, monkeypatch):
    taken = 0
    for values in itertools.product(*OPTIONS.values()):
        options = dict(zip(OPTIONS, values))
        optimizer, sparse = options.pop("optimizer"), options.pop("sparse")
        if optimizer is AdamW and options.pop("scale") is not None:
            continue
        if options["lazy"] != "frozen" and options.get("scale") is not None:
            continue
        p = parameter(6, 4)
        opt = optimizer([p], fused=False, capturable=True, lr=0.1, **options)
        p.grad = sparse_grad(p, 5) if sparse else dense_grad(p)
        opt.step()
        if isinstance(lr, torch.Tensor):
            # On a GPU it is not read.
            monkeypatch.setattr("tiger_ext.group_step.GroupStep.lr", lr)
        with HostReads() as reads:
            opt.step()
        reads_on_host = reads.count > 0
        before = p.detach().clone()
        with capturing(monkeypatch, cpu_is_gpu=True):
            if reads_on_host:
                with unchanged(opt), pytest.raises(RuntimeError, match="runs on the reference"):
                    opt.step()
            else:
                opt.step()
                assert not same_bits(p, before)
                taken += 1
        monkeypatch.undo()
    assert taken == 4


@ROADS
def test_flush_is_refused(fused, monkeypatch):
    opt, _ = ready(Tiger, fused, lazy="decay")
    with (
        unchanged(opt),
        capturing(monkeypatch),
        pytest.raises(RuntimeError, match=r"Tiger\.flush is being captured"),
    ):
        opt.flush()
    assert clock_of(opt).history.settings != []
    opt.flush()
