# SPDX-License-Identifier: Apache-2.0
"""One thread trains while another one reads the tracked table, as an evaluation does."""

import contextlib
import sys
import threading
import time

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


class Reader:
    """A thread that reads again and again until it is told to end.

    Attributes:
        reads: how many reads have ended.
        error: what ended it, if a read raised.
    """

    def __init__(self, read):
        self.read, self.reads, self.error = read, 0, None
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self):
        try:
            with torch.no_grad():
                while not self.done.is_set():
                    self.read()
                    self.reads += 1
        except Exception as error:
            self.error = error


@contextlib.contextmanager
def reading(*reads):
    """Call each of these functions again and again, in a thread of its own.

    Yields a function that returns when each has been called once more. What is inside begins after
    the first calls; when it has ended, none must have raised.
    """
    readers = [Reader(read) for read in reads]

    def once_more():
        wanted, end = [reader.reads + 1 for reader in readers], time.monotonic() + 60
        while any(r.reads < n and r.error is None for r, n in zip(readers, wanted)):
            assert time.monotonic() < end, "a reader has not read for a minute"
            time.sleep(1e-4)

    try:
        once_more()
        yield once_more
    finally:
        for reader in readers:
            reader.done.set()
        for reader in readers:
            reader.thread.join(60)
        assert [reader.error for reader in readers if reader.error is not None] == []
    assert not any(reader.thread.is_alive() for reader in readers)


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

    def read():
        nonlocal reads
        now = clock_of(optimizer).history.begin
        last_step.copy_(-1 - now - torch.randint(0, settings, (ROWS,)).int() % 100)
        table(torch.arange(ROWS))
        reads += 1

    reads = 0

    with reading(read) as once_more:
        for step in range(40):
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 + (step + 1) / 1000)
            optimizer.step()
            if step % 10 == 9:
                once_more()
                if flushes:
                    optimizer.flush()
    assert reads >= 5
    assert bool(torch.isfinite(table.weight).all())


def test_rows_read_by_another_thread_end_as_without_it():
    def run(readers):
        counts = [0] * readers
        torch.manual_seed(0)
        table = nn.Embedding(ROWS, DIM, sparse=True)
        optimizer = Tiger(table.parameters(), lr=1e-3, weight_decay=0.1, lazy="exact")
        optimizer.track(table)

        def reader(seed):
            generator = torch.Generator().manual_seed(seed)

            def read():
                table(torch.randint(ROWS, (2000,), generator=generator))
                counts[seed] += 1

            return read

        rows = torch.Generator().manual_seed(2)
        with reading(*map(reader, range(readers))) as once_more:
            for step in range(60):
                optimizer.param_groups[0]["lr"] = 1e-3 * (1 + step % 3)
                indices = torch.randint(ROWS, (1, 3000), generator=rows)
                table.weight.grad = torch.sparse_coo_tensor(
                    indices, torch.ones(3000, DIM), table.weight.shape
                )
                optimizer.step()
                if step % 10 == 9:
                    once_more()
        assert all(count >= 7 for count in counts)
        optimizer.flush()
        return table.weight.detach()

    torch.testing.assert_close(run(2), run(0), rtol=1e-5, atol=1e-6)
