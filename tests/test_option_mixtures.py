# SPDX-License-Identifier: Apache-2.0
"""Random mixtures of all options against the float64 transcription, a few parameters at a time."""

import io
import math
import pickle
import random

import pytest
import torch
from cases import FLOATS, VIEWS, parameter, set_grad, sparse_grad
from oracle import same_bits
from published import SCALES, backends, momentum_of, verified_window
from torch import nn
from torch.nn import Parameter

from tiger_ext import AdamW, Lion, Tiger

SHAPES = [
    (),
    (1,),
    (33,),
    (1, 1),
    (9, 1),
    (1, 70),
    (40, 7),
    (23, 16),
    (12, 64),
    (5, 257),
    (6, 5, 4),
    (300, 3),
]


def random_options(rng):
    direction = rng.choice(list(SCALES))
    options = dict(
        direction=direction,
        direction_scale=rng.choice([None, None, 0.7, 3.0]),
        scale=rng.choice([None, "rms", "rms_rows"]),
        rms_floor=rng.choice([0.0, 1e-3, 0.5]),
        rows=rng.choice([None, "nonzero"]),
        nonfinite=rng.choice(["propagate", "skip", "shrink"]),
        shrink_ratio=rng.choice([0.99, 0.5]),
        momentum_dtype=rng.choice([None, None, torch.float32, torch.bfloat16]),
        maximize=rng.choice([False, True]),
        weight_decay=rng.choice([0.0, 0.3]),
        lr=rng.choice([0.02, 0.3]),
    )
    if rng.random() < 0.6:
        options |= dict(algorithm="tiger", betas=(rng.choice([0.0, 0.9]),))
        options["accumulation_steps"] = rng.choice([1, 1, 2, 3])
    else:
        options |= dict(algorithm="lion", betas=rng.choice([(0.7, 0.95), (0.0, 0.9)]))
    if rng.random() < 0.3:
        options["shrink_to"] = 1.0
    if rng.random() < 0.3:
        options["lr"] = torch.tensor(options["lr"])
    if options["scale"] == "rms_rows":
        options["nonfinite"] = "propagate"
    return options


def random_grad(rng, p, options, sparse):
    """Make a gradient, or none, as large as the direction needs it to be."""
    if rng.random() < 0.1:
        return None
    kappa = options["direction_scale"] or SCALES[options["direction"]]
    size = 1.0 / kappa if options["direction"] in ("clip", "atan") else 1.0
    bad = options["nonfinite"] != "propagate" and rng.random() < 0.3
    number = rng.choice([math.nan, math.inf, -math.inf])
    dtype = rng.choice([p.dtype, p.dtype, torch.float32])
    if sparse:
        dims = sparse
        nnz = rng.choice([0, 1, 5, 60, 700])
        grad = sparse_grad(p, nnz, sparse_dim=dims, dtype=dtype, rows=rng.choice([None, 3]))
        values = grad._values().mul_(size)
        if bad and values.numel():
            values.view(-1)[rng.randrange(values.numel())] = number
        return grad.coalesce() if rng.random() < 0.4 else grad
    grad = (size * torch.randn(p.shape, dtype=torch.float64)).to(dtype)
    if p.dim() and rng.random() < 0.5:
        grad[torch.rand(len(p)) < 0.5] = 0
    if bad:
        grad.view(-1)[rng.randrange(grad.numel())] = number
    return rng.choice([v for v in VIEWS if v.dims <= p.dim() and v.dims < 3]).make(grad)


@backends
@pytest.mark.parametrize("seed", range(40))
def test_mixtures(seed, fused):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(rng.choice([1, 2]))
    for _ in range(3):
        options = random_options(rng)
        params, sparse = [], []
        for _ in range(rng.choice([1, 3, 8])):
            shape = rng.choice(SHAPES)
            dtype = rng.choice(list(FLOATS.values()))
            view = rng.choice([v for v in VIEWS if v.dims <= len(shape) and v.dims < 3])
            params.append(Parameter(view.make(parameter(*shape, dtype=dtype).detach())))
            sparse.append(rng.randint(1, len(shape)) if shape and rng.random() < 0.5 else 0)
        group = {"params": params, **options}
        opt = Tiger([group], fused=fused)
        for _ in range(2):
            micro = [
                [random_grad(rng, p, options, s) for p, s in zip(params, sparse)]
                for _ in range(options.get("accumulation_steps", 1))
            ]
            for grads in micro:
                for p, g in zip(params, grads):
                    set_grad(p, g)
            verified_window(opt, params, *micro)


@pytest.mark.parametrize("seed", range(20))
def test_mixtures_give_the_same_bits_on_any_number_of_threads(seed):
    results = []
    for threads in (1, 2):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        options = random_options(rng)
        params = [parameter(3000, 7), parameter(400, 130), parameter(50_001)]
        opt = Tiger([{"params": params, **options}])
        for _ in range(3):
            for p, s in zip(params, (1, 1, 0)):
                set_grad(p, random_grad(rng, p, options, s))
            opt.step()
        results.append([x for p in params for x in (p.detach(), momentum_of(opt, p))])
    assert all(same_bits(a, b) for a, b in zip(*results))


@backends
@pytest.mark.parametrize("cls", [Tiger, Lion, AdamW])
@pytest.mark.parametrize("nonfinite", ["skip", "shrink", "raise"])
@pytest.mark.parametrize("rows", ["nonzero", "tracked"])
def test_state_dicts_and_pickles(cls, nonfinite, rows, fused):
    table = nn.Embedding(20, 6)
    options = dict(rows=rows, nonfinite=nonfinite, fused=fused)
    if cls is not AdamW:
        options |= dict(direction="clip", scale="rms_rows")
    opt = cls(table.parameters(), **options)
    opt.track(table)

    def step(module, optimizer, seed):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        (module(torch.randint(20, (5,))) * torch.randn(5, 6)).sum().backward()
        optimizer.step()

    step(table, opt, 1)
    opt.zero_grad()
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    loaded = nn.Embedding.from_pretrained(table.weight.detach().clone(), freeze=False)
    other = cls(loaded.parameters(), fused=fused)
    other.load_state_dict(torch.load(file, weights_only=True))
    pickled_table, pickled = pickle.loads(pickle.dumps((table, opt)))
    step(table, opt, 2)
    for module, optimizer in ((loaded, other), (pickled_table, pickled)):
        optimizer.track(module)
        step(module, optimizer, 2)
        assert same_bits(module.weight, table.weight)


@backends
@pytest.mark.parametrize("rows", ["nonzero", "tracked"])
def test_closures(rows, fused):
    table = nn.Embedding(20, 6)
    opt = Tiger(table.parameters(), rows=rows, fused=fused)
    opt.track(table)

    def closure():
        opt.zero_grad()
        loss = table(torch.tensor([4, 11])).sum()
        loss.backward()
        return loss

    before = table.weight.detach().clone()
    opt.step(closure)
    changed = (table.weight != before).any(1).nonzero()[:, 0].tolist()
    assert changed == [4, 11]


@backends
def test_schedulers_with_the_new_options(fused):
    p = parameter(20, 6)
    opt = Tiger(
        [p],
        lr=0.1,
        weight_decay=0.3,
        accumulation_steps=2,
        scale="rms",
        rows="nonzero",
        fused=fused,
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        opt, max_lr=0.5, total_steps=20, base_momentum=0.8, max_momentum=0.95
    )
    for _ in range(5):
        micro = [[torch.randn(20, 6)] for _ in range(2)]
        verified_window(opt, [p], *micro)
        scheduler.step()


def test_compiled_steps():
    start = torch.randn(20, 6)
    results = []
    for compiled in (False, True):
        torch.manual_seed(1)
        p = Parameter(start.clone())
        opt = Tiger(
            [p],
            direction="clip",
            scale="rms",
            rows="nonzero",
            nonfinite="skip",
            accumulation_steps=2,
        )
        step = torch.compile(opt.step, backend="eager") if compiled else opt.step
        for k in range(6):
            p.grad = 1e-4 * torch.randn(20, 6)
            p.grad[::3] = 0
            p.grad[4, 1] = math.nan if k % 2 else 1.0
            step()
        results.append(p.detach())
    assert same_bits(*results)
