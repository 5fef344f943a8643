# SPDX-License-Identifier: Apache-2.0
import os
import time

import psutil
import pytest
import torch
from cases import every_rule
from torch.nn import Parameter

from tiger_ext import AdamW, Tiger
from tiger_ext.change_file import Source
from tiger_ext.checkpoint import apply_changes, position, save_changes

MIB = 2**20


def resident() -> int:
    return psutil.Process().memory_info().rss


def sparse(rows: int, dim: int, nnz: int) -> torch.Tensor:
    ids = torch.randint(rows, (1, nnz))
    return torch.sparse_coo_tensor(ids, torch.randn(nnz, dim), (rows, dim))


@every_rule
def test_memory_does_not_grow_over_a_thousand_steps(rule):
    table = Parameter(torch.randn(20_000, 16))
    matrix = Parameter(torch.randn(300, 40).T)
    other = Parameter(torch.randn(5000, dtype=torch.bfloat16))
    opt = rule([table, matrix, other])

    def step(k: int) -> None:
        table.grad = sparse(20_000, 16, 1 + 131 * k % 4000)
        matrix.grad = sparse(40, 300, k % 50) if k % 3 else torch.randn(40, 300)
        other.grad = torch.randn(5000).bfloat16()
        opt.step()

    for k in range(200):
        step(k)
    before = resident()
    for k in range(1000):
        step(k)
    # One leaked work buffer of the average step would make this 250 MB.
    assert resident() - before < 16 * MIB


@pytest.mark.indices_checked_at_once
@every_rule
def test_failing_steps_do_not_leak(rule):
    table = Parameter(torch.randn(20_000, 16))
    opt = rule([table])
    values = torch.randn(4000, 16)
    rows = torch.randint(20_000, (1, 4000))
    rows[0, -1] = 20_000
    table.grad = torch.sparse_coo_tensor(rows, values, table.shape, check_invariants=False)

    def fail(times: int) -> None:
        for _ in range(times):
            try:
                opt.step()
            except IndexError:
                continue
            raise AssertionError("accepted")

    fail(20)
    before = resident()
    fail(300)
    assert resident() - before < 16 * MIB


def test_a_step_costs_by_entries_not_by_rows():
    rows = 10_000_000
    opt = Tiger([Parameter(torch.zeros(rows, 4))])
    (table,) = opt.param_groups[0]["params"]
    table.grad = sparse(rows, 4, 1000)
    opt.step()  # creates the state, 160 MB
    opt.state[table]["exp_avg"].zero_()  # ... and its pages
    before = resident()
    times = []
    for _ in range(5):
        table.grad = sparse(rows, 4, 1000)
        start = time.perf_counter()
        opt.step()
        times.append(time.perf_counter() - start)
    # A single byte per row would be 10 MB; one pass over the table takes tens of milliseconds.
    assert resident() - before < 4 * MIB
    assert min(times) < 5e-3


@pytest.mark.parametrize("rule", [Tiger, AdamW])
def test_huge_pages_change_no_content(rule):
    # Large enough for the advice, whose range starts and ends inside the tables.
    start = torch.randn(150_001, 64)
    p = Parameter(start.clone())
    rows = torch.arange(0, 150_001, 1009)
    p.grad = torch.sparse_coo_tensor(rows[None], torch.ones(len(rows), 64), p.shape)
    opt = rule([p], weight_decay=0.1)
    opt.step()
    untouched = torch.ones(len(p), dtype=torch.bool)
    untouched[rows] = False
    assert torch.equal(p.detach()[untouched], start[untouched])
    assert not torch.any(p.detach()[rows] == start[rows])
    for state in opt.state[p].values():
        if state.dim():
            assert not state[untouched].any() and state[rows].all()


def test_deltas_are_saved_and_applied_without_a_copy_of_the_table(tmp_path, monkeypatch):
    rows = 1 << 20

    def make():
        table = Parameter(torch.ones(rows, 32))
        optimizer = Tiger([table], lr=0.01, lazy="exact")
        table.grad = torch.sparse_coo_tensor([[5]], torch.ones(1, 32), table.shape)
        optimizer.step()
        optimizer.flush()
        return table, optimizer

    table, optimizer = make()
    copy, other = make()
    since = position(optimizer)
    half = torch.arange(0, rows, 2)
    table.grad = torch.sparse_coo_tensor(half[None], torch.ones(rows // 2, 32), table.shape)
    optimizer.step()
    table.grad = None
    pieces, peaks = Source.pieces, []

    def watched(self):
        for piece in pieces(self):
            peaks.append(resident())
            yield piece

    monkeypatch.setattr(Source, "pieces", watched)
    before = resident()
    save_changes(optimizer, tmp_path / "rows", since)
    optimizer.flush()
    save_changes(optimizer, tmp_path / "whole", since)
    assert os.path.getsize(tmp_path / "rows") > 128 * MIB
    assert os.path.getsize(tmp_path / "whole") > 256 * MIB
    assert max(peaks) - before < 32 * MIB
    before = resident()
    apply_changes(other, tmp_path / "whole")  # which is mapped as long as it is read
    assert resident() - before < 32 * MIB
    assert torch.equal(table, copy)
