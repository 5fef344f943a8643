# SPDX-License-Identifier: Apache-2.0
"""Every learning rate scheduler of torch, and SWALR, on the optimizers."""

import inspect
import warnings

import pytest
import torch
from table_model import Model, batch, every_lazy, every_mode
from torch.optim import lr_scheduler as s
from torch.optim.swa_utils import SWALR

from tiger_ext import AdamW, Lion, Tiger

LR = 0.02
MAKE = {
    "LambdaLR": [lambda o: s.LambdaLR(o, lambda e: 0.9**e)],
    "MultiplicativeLR": [lambda o: s.MultiplicativeLR(o, lambda e: 0.8 + 0.1 * (e % 3))],
    "StepLR": [lambda o: s.StepLR(o, 3, gamma=0.5)],
    "MultiStepLR": [lambda o: s.MultiStepLR(o, [2, 7], gamma=0.3)],
    "ConstantLR": [lambda o: s.ConstantLR(o, factor=0.5, total_iters=4)],
    "LinearLR": [lambda o: s.LinearLR(o, start_factor=0.2, total_iters=6)],
    "ExponentialLR": [lambda o: s.ExponentialLR(o, 0.9)],
    "SequentialLR": [
        lambda o: s.SequentialLR(
            o, [s.LinearLR(o, 0.1, total_iters=4), s.CosineAnnealingLR(o, 6)], [4]
        )
    ],
    "PolynomialLR": [lambda o: s.PolynomialLR(o, total_iters=9, power=2.0)],
    "CosineAnnealingLR": [lambda o: s.CosineAnnealingLR(o, 7, eta_min=1e-3)],
    "ChainedScheduler": [
        lambda o: s.ChainedScheduler([s.ConstantLR(o, 0.1, 5), s.ExponentialLR(o, 0.9)])
    ],
    "ReduceLROnPlateau": [lambda o: s.ReduceLROnPlateau(o, patience=1, factor=0.5)],
    "CyclicLR": [
        lambda o: s.CyclicLR(o, 1e-3, 0.04, step_size_up=3, cycle_momentum=True),
        lambda o: s.CyclicLR(o, 1e-3, 0.04, step_size_up=3, cycle_momentum=False),
        lambda o: s.CyclicLR(o, 1e-3, 0.04, step_size_up=2, mode="triangular2"),
    ],
    "CosineAnnealingWarmRestarts": [lambda o: s.CosineAnnealingWarmRestarts(o, 4, T_mult=2)],
    "OneCycleLR": [
        lambda o: s.OneCycleLR(o, max_lr=0.05, total_steps=20, cycle_momentum=True),
        lambda o: s.OneCycleLR(o, max_lr=0.05, total_steps=20, cycle_momentum=False),
    ],
    "SWALR": [lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=6)],
}
CASES = [
    pytest.param(make, id=name if i == 0 else f"{name}-{i}")
    for name, makes in MAKE.items()
    for i, make in enumerate(makes)
]
every_scheduler = pytest.mark.parametrize("make", CASES)
STEPS = 14


def metric(step):
    return 1.0 if step < 8 else 0.5  # a plateau, twice


def advance(scheduler, step):
    if isinstance(scheduler, s.ReduceLROnPlateau):
        scheduler.step(metric(step))
    else:
        scheduler.step()


def made(make, optimizer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(optimizer)


def test_no_scheduler_of_torch_is_missing():
    bases = {"LRScheduler", "_LRScheduler"}
    torchs = {
        name
        for name, cls in vars(s).items()
        if inspect.isclass(cls) and issubclass(cls, s.LRScheduler)
    }
    assert torchs - bases | {"SWALR"} == set(MAKE)


@every_scheduler
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("cls", [Tiger, Lion, AdamW])
def test_the_learning_rates_are_those_of_sgd(cls, make, tensor_lr):
    def rates(optimizer):
        scheduler = made(make, optimizer)
        seen = []
        for step in range(STEPS):
            optimizer.step()
            seen.append([float(group["lr"]) for group in optimizer.param_groups])
            advance(scheduler, step)
        return seen, scheduler.state_dict()

    def groups():
        p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
        p.grad, q.grad = torch.ones(2), torch.ones(2)
        return [{"params": [p]}, {"params": [q], "lr": lr(2 * LR)}]

    def lr(value):
        return torch.tensor(value, dtype=torch.float64) if tensor_lr else value

    ours, state = rates(cls(groups(), lr=lr(LR)))
    theirs, reference = rates(torch.optim.SGD(groups(), lr=lr(LR), momentum=0.9))
    assert ours == theirs
    assert len({tuple(row) for row in ours}) > 1
    for key in ("last_epoch", "_last_lr"):
        assert state.get(key) == reference.get(key)


@pytest.mark.parametrize("cls", [Tiger, Lion, AdamW])
@pytest.mark.parametrize("make", [MAKE["CyclicLR"][0], MAKE["OneCycleLR"][0]])
def test_the_momenta_are_those_of_adam(cls, make):
    def first_betas(optimizer):
        scheduler = made(make, optimizer)
        seen = []
        for _ in range(STEPS):
            optimizer.step()
            betas = optimizer.param_groups[0]["betas"]
            assert len(betas) == count
            seen.append(betas[0])
            scheduler.step()
        return seen

    p = torch.nn.Parameter(torch.ones(2))
    count = 1 if cls is Tiger else 2
    ours = first_betas(cls([p], lr=LR))
    count = 2
    assert ours == first_betas(torch.optim.Adam([p], lr=LR))
    assert len(set(ours)) > 1


@every_scheduler
@pytest.mark.parametrize("cls", [Tiger, Lion])
def test_exact_sparse_steps_under_a_scheduler_equal_dense_ones(cls, make):
    sparse, dense = Model(sparse=True).double(), Model(sparse=False).double()
    lazy = cls(sparse.parameters(), lr=LR, weight_decay=0.2, lazy="exact")
    full = cls(dense.parameters(), lr=LR, weight_decay=0.2)
    lazy.track(sparse.table)
    schedulers = made(make, lazy), made(make, full)
    for step in range(STEPS):
        for model, optimizer, scheduler in zip((sparse, dense), (lazy, full), schedulers):
            optimizer.zero_grad()
            model(batch(step)).backward()
            optimizer.step()
            advance(scheduler, step)
    assert sparse.table.weight.grad.layout == torch.sparse_coo
    lazy.flush()
    for p, q in zip(sparse.parameters(), dense.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
        torch.testing.assert_close(
            lazy.state[p]["exp_avg"], full.state[q]["exp_avg"], rtol=0, atol=1e-12
        )


@every_mode
def test_scheduler_and_optimizer_saved_together_go_on_alike(cls, lazy):
    def make():
        model = Model()
        optimizer = cls(model.parameters(), lr=LR, weight_decay=0.2, lazy=lazy)
        return model, optimizer, s.CosineAnnealingWarmRestarts(optimizer, 4)

    def run(model, optimizer, scheduler, steps):
        for step in steps:
            optimizer.zero_grad()
            model(batch(step)).backward()
            optimizer.step()
            scheduler.step()

    first, second = make(), make()
    run(*first, range(6))
    for mine, other in zip(second, first):
        mine.load_state_dict(other.state_dict())
    run(*first, range(6, STEPS))
    run(*second, range(6, STEPS))
    for _, optimizer, _ in (first, second):
        optimizer.flush()
    for p, q in zip(first[0].parameters(), second[0].parameters()):
        assert torch.equal(p, q)


@every_lazy
def test_averaged_model_reads_current_rows_after_a_flush(lazy):
    model = Model()
    optimizer = Tiger(model.parameters(), lr=LR, weight_decay=0.2, lazy=lazy)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    scheduler = SWALR(optimizer, swa_lr=0.05, anneal_epochs=3)
    tables = []
    for step in range(8):
        optimizer.zero_grad()
        model(batch(step)).backward()
        optimizer.step()
        scheduler.step()
        if step >= 4:
            optimizer.flush()
            averaged.update_parameters(model)
            tables.append(model.table.weight.detach().clone())
    torch.testing.assert_close(averaged.module.table.weight.detach(), sum(tables) / len(tables))
    averaged(batch(0))
