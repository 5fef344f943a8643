# SPDX-License-Identifier: Apache-2.0
"""One thread trains while another one reads the tracked table, as an evaluation does."""

import sys
import threading

import pytest
import torch
from cases import clock_of
from torch import nn

from tiger_ext import Tiger

ROWS, DIM = 20_000, 4


@pytest.fixture(autouse=True)
def many_switches():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def lagging_table(settings):
    """Return a table whose rows lag by different numbers of steps, in a history of changes."""
    table = nn.Embedding(ROWS, DIM, sparse=True)
    optimizer = Tiger(table.parameters(), lr=1e-3, lazy="exact")
    optimizer.track(table)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["history"] = f"{settings} 0 " + " ".join(
        f"{i} {1e-3 + 1e-9 * i!r} 0.01 0.9 0.9" for i in range(1, settings + 1)
    )
    optimizer.load_state_dict(saved)
    table.weight.grad = torch.sparse_coo_tensor(
        torch.zeros(1, 1, dtype=torch.long), torch.ones(1, DIM), table.weight.shape
    )
    optimizer.step()
    return table, optimizer


@pytest.mark.parametrize("flushes", [False, True], ids=["", "flushed"])
def test_a_history_that_grows_while_rows_are_read(flushes):
    settings = (1 << 12) - 6  # the memory's end comes a few steps later
    table, optimizer = lagging_table(settings)
    last_step = optimizer.state[table.weight]["last_step"]
    done = threading.Event()
    errors = []

    def read():
        try:
            with torch.no_grad():
                while not done.is_set():
                    now = clock_of(optimizer).history.begin
                    last_step.copy_(-1 - now - torch.randint(0, settings, (ROWS,)).int() % 100)
                    table(torch.arange(ROWS))
        except Exception as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for step in range(40):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 + (step + 1) / 1000)
        optimizer.step()
        if flushes and step % 10 == 9:
            optimizer.flush()
    done.set()
    reader.join()
    assert not errors
    assert bool(torch.isfinite(table.weight).all())


def test_rows_read_by_another_thread_end_as_without_it():
    def run(reads):
        torch.manual_seed(0)
        table = nn.Embedding(ROWS, DIM, sparse=True)
        optimizer = Tiger(table.parameters(), lr=1e-3, weight_decay=0.1, lazy="exact")
        optimizer.track(table)
        done = threading.Event()

        def read():
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                while not done.is_set():
                    table(torch.randint(ROWS, (2000,), generator=generator))

        readers = [threading.Thread(target=read) for _ in range(reads)]
        for reader in readers:
            reader.start()
        rows = torch.Generator().manual_seed(2)
        for step in range(60):
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 + step % 3)
            indices = torch.randint(ROWS, (1, 3000), generator=rows)
            table.weight.grad = torch.sparse_coo_tensor(
                indices, torch.ones(3000, DIM), table.weight.shape
            )
            optimizer.step()
        done.set()
        for reader in readers:
            reader.join()
        optimizer.flush()
        return table.weight.detach()

    torch.testing.assert_close(run(2), run(0), rtol=1e-5, atol=1e-6)
