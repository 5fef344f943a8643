# SPDX-License-Identifier: Apache-2.0
"""Large tables: their memory, their state before the first step, huge pages behind them."""

import math
import os
import pickle
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import every_rule
from pages import asks_for_huge_pages, existing_bytes, huge_bytes
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter

import tiger_ext
from tiger_ext import AdamW, Lion, Tiger, empty_table, huge_pages

MIB = 2**20
ROWS, DIM = 4_000_000, 16  # 256 MB in float32


def sparse(table, ids, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(ids), *table.shape[1:], generator=generator).to(table.dtype)
    return torch.sparse_coo_tensor(torch.tensor([ids]), values, table.shape)


def can_see_huge_pages() -> bool:
    try:
        huge_bytes(torch.zeros(1))
    except OSError:
        return False
    return True


def thp() -> str:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return re.findall(r"\[(\w+)\]", path.read_text())[0] if path.exists() else "never"


with_huge_pages = pytest.mark.skipif(
    tiger_ext._native.C is None or thp() == "never" or not can_see_huge_pages(),
    reason="no transparent huge pages, or no way to see them",
)

# ------------------------------------------------------------------------------- empty_table


@pytest.mark.parametrize("kind", ["anonymous", "shared", "file"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_table_is_of_zeros_and_its_pages_do_not_exist(kind, dtype, tmp_path):
    where = {"shared": {"shared": True}, "file": {"path": tmp_path / "table"}}.get(kind, {})
    table = empty_table(ROWS, DIM, dtype, **where)
    assert table.shape == (ROWS, DIM) and table.dtype == dtype and table.is_contiguous()
    assert not table.requires_grad and table.is_leaf and not table._is_view()
    assert table.is_shared() == (kind != "anonymous")
    # Of shared memory torch writes the last byte.
    assert existing_bytes(table) == (4096 if kind == "shared" else 0)
    table[ROWS // 2] = 3
    assert 0 < existing_bytes(table) <= 4 * MIB
    assert not table[ROWS // 3].any() and table[ROWS // 2].eq(3).all()


def test_a_table_may_be_larger_than_what_is_written():
    table = empty_table(100_000_000, 32, torch.bfloat16)  # 6.4 GB
    opt = Tiger([Parameter(table)], lr=0.1)
    (p,) = opt.param_groups[0]["params"]
    p.grad = sparse(p, [0, 99_999_999])
    opt.step()
    assert p[0].any() and p[-1].any()
    assert existing_bytes(p) + existing_bytes(opt.state[p]["exp_avg"]) <= 16 * MIB


def test_what_is_written_reaches_the_file_and_is_there_when_it_is_opened_again(tmp_path):
    path = tmp_path / "table.bin"
    table = empty_table(1000, 8, path=path)
    p = Parameter(table)
    opt = Tiger([p], lr=0.5, weight_decay=0.0)
    p.grad = sparse(p, [3, 999])
    opt.step()
    other = empty_table(1000, 8, path=str(path))  # while the first is mapped
    assert torch.equal(other, p.detach())
    other[5] = 7
    assert p[5].eq(7).all()
    assert path.stat().st_size == 32_000
    assert os.listdir(tmp_path) == ["table.bin"]
    stored = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32)
    assert torch.equal(stored.view(1000, 8), p.detach())


def test_a_file_of_another_size_is_refused_with_both_and_left_alone(tmp_path):
    path = tmp_path / "table"
    path.write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"table'.* 100 bytes.* 320 bytes"):
        empty_table(10, 8, path=path)
    assert path.read_bytes() == b"x" * 100
    with pytest.raises(FileNotFoundError):
        empty_table(10, 8, path=tmp_path / "none" / "table")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": 0}, r"rows=0: expected an integer >= 1"),
        ({"rows": -3}, r"rows=-3: expected an integer >= 1"),
        ({"rows": 2.5}, r"rows=2\.5: expected an integer >= 1"),
        ({"rows": True}, r"rows=True: expected an integer >= 1"),
        ({"dim": 0}, r"dim=0: expected an integer >= 1"),
        ({"dim": None}, r"dim=None: expected an integer >= 1"),
        ({"rows": 2**60, "dim": 16}, r"rows=\d+, dim=16: .*expected less than 2\*\*63"),
        ({"dtype": torch.int64}, r"dtype=torch\.int64: expected one of torch\.float32"),
        ({"dtype": "float32"}, r"dtype='float32': expected one of"),
        ({"shared": 1}, r"shared=1: expected True or False"),
        ({"huge_pages": None}, r"huge_pages=None: expected True or False"),
        ({"path": 3}, r"path=3: expected None or a path"),
        ({"path": "x", "shared": True}, r"shared=True, path='x': expected one of them"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        empty_table(**{"rows": 10, "dim": 8, **arguments})
    assert os.listdir(tmp_path) == []


@with_huge_pages
@pytest.mark.parametrize("kind", ["anonymous", "shared"])
def test_huge_pages_are_asked_for_unless_they_are_not_wanted(kind):
    wanted = empty_table(ROWS, DIM, shared=kind == "shared")
    assert asks_for_huge_pages(wanted)
    assert not asks_for_huge_pages(
        empty_table(ROWS, DIM, shared=kind == "shared", huge_pages=False)
    )
    if kind == "anonymous":
        wanted[:] = 1.0
        assert huge_bytes(wanted) >= wanted.nbytes - 4 * MIB


def test_tables_work_without_the_compiled_module(run_python):
    run_python(
        "import sys, warnings\n"
        "sys.modules['tiger_ext._C'] = None\n"
        "warnings.simplefilter('ignore')\n"
        "import torch, tiger_ext\n"
        "from pages import existing_bytes\n"
        "assert tiger_ext._native.C is None\n"
        "p = torch.nn.Parameter(tiger_ext.empty_table(4_000_000, 16))\n"
        "opt = tiger_ext.Tiger([p])\n"
        "opt.init_state()\n"
        "p.grad = torch.sparse_coo_tensor([[5]], torch.ones(1, 16), p.shape)\n"
        "opt.step()\n"
        "assert p[5].lt(0).all() and not p[6].any()\n"
        "assert existing_bytes(p) <= 4 << 20\n"
    )


@pytest.mark.parametrize("kind", ["anonymous", "shared", "file"])
def test_the_default_device_does_not_matter(kind, tmp_path):
    where = {"shared": {"shared": True}, "file": {"path": tmp_path / "table"}}.get(kind, {})
    with torch.device("meta"):
        table = empty_table(1_000_000, DIM, **where)
        opt = Tiger([Parameter(table)])
        opt.share_memory()
    momentum = opt.state[opt.param_groups[0]["params"][0]]["exp_avg"]
    assert table.device.type == momentum.device.type == "cpu" and momentum.is_shared()


def test_a_table_is_copied_and_pickled_as_any_tensor():
    table = empty_table(100, 4)
    table[3] = 1
    for copy in (table.clone(), pickle.loads(pickle.dumps(table))):
        copy[4] = 2
        assert copy[3].eq(1).all() and not table[4].any()
    module = torch.nn.Embedding.from_pretrained(table, freeze=False, sparse=True)
    assert module.weight.data_ptr() == table.data_ptr()


# -------------------------------------------------------------------------------- init_state

INITIAL = {
    "tiger": lambda ps: Tiger(ps, lr=0.1),
    "lion": lambda ps: Lion(ps, lr=0.1),
    "adamw": lambda ps: AdamW(ps, lr=0.1),
    "rmsprop": lambda ps: AdamW(ps, lr=0.1, betas=(0.0, 0.99)),
    "bf16 momentum": lambda ps: Tiger(ps, lr=0.1, momentum_dtype=torch.bfloat16),
    "decay": lambda ps: Tiger(ps, lr=0.1, lazy="decay"),
    "exact": lambda ps: Lion(ps, lr=0.1, lazy="exact"),
    "adamw decay": lambda ps: AdamW(ps, lr=0.1, lazy="decay"),
    "accumulation": lambda ps: Tiger(ps, lr=0.1, accumulation_steps=2),
    "accumulation, exact": lambda ps: Tiger(ps, lr=0.1, accumulation_steps=2, lazy="exact"),
    "nonzero": lambda ps: Tiger(ps, lr=0.1, rows="nonzero"),
    "reference": lambda ps: Tiger(ps, lr=0.1, fused=False),
    "reference, exact": lambda ps: Tiger(ps, lr=0.1, fused=False, lazy="exact"),
}


def parameters():
    generator = torch.Generator().manual_seed(5)
    shapes = [(50, 4), (6,), (), (8, 3)]
    return [Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def train(opt, steps=5):
    table, *dense = opt.param_groups[0]["params"]
    for k in range(steps):
        table.grad = sparse(table, [k, 7 * k % 50, 11], seed=k)
        for p in dense:
            p.grad = torch.full_like(p, (-1.0) ** k * (k + 1))
        opt.step()


def contents(opt):
    found = [p.detach().clone() for group in opt.param_groups for p in group["params"]]
    for p in opt.param_groups[0]["params"]:
        for name, value in sorted(opt.state[p].items()):
            # Lists and windows of rows may be kept in another form, with the same meaning.
            if not name.startswith("window"):
                found.append(value.clone())
    return found


@pytest.mark.parametrize("name", INITIAL)
def test_a_run_with_init_state_is_that_without_it_bit_by_bit(name):
    one, other = (INITIAL[name](parameters()) for _ in range(2))
    start = contents(other)[:4]
    other.init_state()
    for a, b in zip(start, contents(other)[:4], strict=True):
        assert torch.equal(a, b)  # nothing moved
    other.init_state()  # again: nothing is reset
    train(one), train(other)
    for a, b in zip(contents(one), contents(other), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype


@pytest.mark.parametrize("name", INITIAL)
def test_init_state_creates_what_the_first_step_would(name):
    first, ahead = (INITIAL[name](parameters()) for _ in range(2))
    train(first, steps=1)
    ahead.init_state()
    for p, q in zip(*(o.param_groups[0]["params"] for o in (first, ahead)), strict=True):
        created = {k: v for k, v in first.state[p].items() if k != "window_rows"}
        assert ahead.state[q].keys() == created.keys()
        for key, value in ahead.state[q].items():
            assert value.dtype == created[key].dtype
            if key == "last_step" or (key == "window" and q.dim() >= 2):
                assert value.shape == q.shape[: min(q.dim() - 1, 1) if q.dim() else 0]
            else:
                assert value.shape == created[key].shape
            assert (value == (-1 if key == "last_step" else 0)).all()


def test_init_state_counts_no_step():
    opt = Tiger(parameters(), lr=0.1, lazy="exact")
    opt.init_state()
    fresh = Tiger(parameters(), lr=0.1, lazy="exact").state_dict()
    assert opt.state_dict()["param_groups"] == fresh["param_groups"]
    adamw = AdamW(parameters())
    adamw.init_state()
    assert all(int(state["step"]) == 0 for state in adamw.state.values())


def test_init_state_keeps_what_is_there_and_completes_the_rest():
    opt = Tiger(parameters(), lr=0.1)
    table = opt.param_groups[0]["params"][0]
    table.grad = sparse(table, [1, 2])
    opt.step()
    momentum = opt.state[table]["exp_avg"]
    before = momentum.clone()
    opt.init_state()
    assert opt.state[table]["exp_avg"] is momentum and torch.equal(momentum, before)
    assert len(opt.state) == 4


def test_init_state_leaves_frozen_parameters_alone():
    ps = parameters()
    ps[0].requires_grad_(False)
    opt = Tiger(ps)
    opt.init_state()
    assert ps[0] not in opt.state and len(opt.state) == 3


@pytest.mark.parametrize("rule", [Tiger, AdamW])
def test_construction_and_init_state_touch_no_page(rule):
    p = Parameter(empty_table(ROWS, DIM))
    opt = rule([p])
    opt.init_state()
    moments = [value for value in opt.state[p].values() if value.shape == p.shape]
    assert len(moments) == (1 if rule is Tiger else 2)
    assert all(existing_bytes(each) == 0 for each in (p, *moments))


@every_rule
def test_the_first_step_writes_the_pages_of_its_rows_alone(rule):
    p = Parameter(empty_table(ROWS, DIM))
    opt = rule([p])
    p.grad = sparse(p, [1, ROWS - 1])
    opt.step()
    for value in opt.state[p].values():
        assert existing_bytes(value) <= 6 * MIB


def test_large_state_keeps_the_memory_format():
    p = Parameter(torch.zeros(3000, 4000).T)  # 48 MB, columns first
    p.grad = torch.ones(3000, 4000).T
    opt = Tiger([p], lr=0.1)
    opt.step()
    assert opt.state[p]["exp_avg"].stride() == p.stride() == (1, 4000)
    assert torch.equal(opt.state[p]["exp_avg"], torch.full_like(p, 0.035))


# -------------------------------------------------------------------- saving and loading


def state_pointers(state):
    return [
        (i, name, value.data_ptr())
        for i, own in sorted(state.items())
        for name, value in sorted(own.items())
        if isinstance(value, torch.Tensor)
    ]


@pytest.mark.parametrize("name", INITIAL)
def test_state_dict_copies_nothing_and_assign_takes_the_tensors_themselves(name):
    opt = INITIAL[name](parameters())
    train(opt)
    saved = opt.state_dict()
    own = dict(enumerate(opt.state[p] for p in opt.param_groups[0]["params"]))
    assert state_pointers(saved["state"]) == state_pointers(own)

    other = INITIAL[name]([Parameter(p.detach().clone()) for p in opt.param_groups[0]["params"]])
    other.load_state_dict(saved, assign=True)
    loaded = dict(enumerate(other.state[p] for p in other.param_groups[0]["params"]))
    assert state_pointers(loaded) == state_pointers(own)
    other.load_state_dict(saved)
    copied = dict(enumerate(other.state[p] for p in other.param_groups[0]["params"]))
    assert not {x[-1] for x in state_pointers(copied)} & {x[-1] for x in state_pointers(own)} - {0}
    train(opt), train(other)
    for a, b in zip(contents(opt), contents(other), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("last_step", lambda x: x.long(), r"last_step: got torch\.int64, expected torch\.int32"),
        ("step", lambda x: x.float(), r"step: got torch\.float32, expected torch\.int64"),
        ("step", int, r"step: got 'int', expected a tensor"),
        ("exp_avg", lambda x: x.to("meta"), r"exp_avg: got .*meta.*, expected "),
    ],
)
def test_assign_refuses_what_it_would_have_to_convert(key, change, message):
    opt = AdamW(parameters(), lazy="decay")
    train(opt)
    saved = opt.state_dict()
    before = state_pointers(saved["state"])
    saved["state"][0] = {**saved["state"][0], key: change(saved["state"][0][key])}
    with pytest.raises(ValueError, match=rf"load_state_dict: parameter .*{message}"):
        opt.load_state_dict(saved, assign=True)
    assert state_pointers(opt.state_dict()["state"]) == before
    if key != "exp_avg":
        opt.load_state_dict(saved)  # copies are converted


def test_a_checkpoint_is_loaded_trained_and_saved_in_bounded_memory(tmp_path, run_python):
    table = Parameter(torch.ones(1_000_000, 64))  # 256 MB, and as much momentum
    opt = Tiger([table], lr=0.1)
    ids = list(range(0, 1_000_000, 100_000))
    table.grad = sparse(table, ids)
    opt.step()
    torch.save({"table": table.detach(), "optimizer": opt.state_dict()}, tmp_path / "saved.pt")
    table.grad = sparse(table, ids, seed=1)
    opt.step()
    torch.save((table.detach()[ids].clone(), opt.state[table]["exp_avg"][ids]), tmp_path / "end.pt")
    run_python(
        "import psutil, torch\n"
        "from test_tables import sparse\n"
        "from tiger_ext import Tiger\n"
        "def private(): return psutil.Process().memory_full_info().uss\n"
        "before = private()\n"
        f"saved = torch.load({str(tmp_path / 'saved.pt')!r}, mmap=True, weights_only=True)\n"
        "table = torch.nn.Parameter(saved['table'])\n"
        "opt = Tiger([table])\n"
        "opt.load_state_dict(saved['optimizer'], assign=True)\n"
        f"ids = {ids!r}\n"
        "table.grad = sparse(table, ids, seed=1)\n"
        "opt.step()\n"
        f"p, m = torch.load({str(tmp_path / 'end.pt')!r})\n"
        "assert torch.equal(table.detach()[ids], p)\n"
        "assert torch.equal(opt.state[table]['exp_avg'][ids], m)\n"
        "assert private() - before < 64 << 20, (private() - before) >> 20\n"
        "import re, resource\n"  # saving may take little memory too
        "own = 1024 * int(re.search(r'VmData:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (own + (96 << 20), resource.RLIM_INFINITY))\n"
        f"torch.save((table.detach(), opt.state_dict()), {str(tmp_path / 'again.pt')!r})\n"
    )


# -------------------------------------------------------------------------------- huge pages


def wait_until(happened, seconds=20.0):
    end = time.monotonic() + seconds
    while not happened() and time.monotonic() < end:
        time.sleep(0.002)
    return happened()


def is_huge(tensor):
    return huge_bytes(tensor) > 0.85 * tensor.nbytes  # not both ends


def table_in_use(rows=700_001):
    p = Parameter(torch.ones(rows, 16))  # 45 MB, in small pages
    p.grad = sparse(p, list(range(0, rows, 1009)))
    return p


@with_huge_pages
def test_a_table_in_use_moves_to_huge_pages_after_its_first_step():
    p = table_in_use(4_000_000)
    assert huge_bytes(p) < p.nbytes / 2
    opt = Tiger([p], lr=0.1)
    opt.step()
    assert huge_bytes(p) < p.nbytes / 2  # the step has not waited for it
    after = p.detach().clone()
    assert wait_until(lambda: is_huge(p))
    assert torch.equal(p.detach(), after)


@with_huge_pages
def test_a_table_in_shared_memory_moves_to_huge_pages():
    # Where a mapping begins is the system's choice; that it suits huge pages is a good guess.
    tables = [empty_table(700_001, 16, shared=True) for _ in range(8)]
    suited = [table for table in tables if table.data_ptr() % (2 * MIB) == 0]
    assert len(suited) >= 4
    p = Parameter(suited[0].fill_(1.0))
    p.grad = sparse(p, [1, 5])
    Tiger([p]).step()
    assert wait_until(lambda: is_huge(p))


@with_huge_pages
def test_state_moves_once_half_of_it_is_written():
    p = table_in_use()
    opt = Tiger([p], lr=0.1)
    opt.step()
    momentum = opt.state[p]["exp_avg"]
    assert wait_until(lambda: is_huge(p))  # the thread has been there
    assert huge_bytes(momentum) == 0 and existing_bytes(momentum) < 0.2 * momentum.nbytes
    before = momentum.clone()
    p.grad = sparse(p, list(range(0, len(p), 100)))
    opt.step()
    after = momentum.clone()
    assert wait_until(lambda: is_huge(momentum))
    assert torch.equal(momentum, after) and not torch.equal(before, after)


@with_huge_pages
def test_measurements_can_wait_until_all_is_moved():
    p = table_in_use(2_000_000)
    opt = Tiger([p], lr=0.1)
    opt.step()
    opt.state[p]["exp_avg"].fill_(0.5)
    assert huge_pages.settle_huge_pages(60.0)
    assert is_huge(p) and is_huge(opt.state[p]["exp_avg"])
    assert huge_pages.settle_huge_pages(0.5)  # at once, nothing is left


@with_huge_pages
@pytest.mark.parametrize("kind", ["anonymous", "shared"])
def test_pages_that_do_not_exist_are_not_moved(kind):
    p = Parameter(empty_table(700_001, 16, shared=kind == "shared", huge_pages=False))
    p.grad = sparse(p, [1, 5])
    other = table_in_use()
    for each in (p, other):
        Tiger([each]).step()
    assert wait_until(lambda: is_huge(other))
    assert existing_bytes(p) <= 3 * 4096


@with_huge_pages
def test_a_table_that_is_freed_or_replaced_while_it_moves_is_let_go(monkeypatch):
    monkeypatch.setattr(huge_pages, "_mover", huge_pages._Mover())
    for name in ("_FIRST_WAIT", "_LONGEST_WAIT"):
        monkeypatch.setattr(huge_pages, name, 0.01)
    frees = [lambda p: None, lambda p: setattr(p, "data", torch.ones(700_001, 16))]
    for free in frees:
        p = table_in_use(4_000_000)
        storage = StorageWeakRef(p.untyped_storage())
        Tiger([p]).step()
        assert not storage.expired() and huge_pages._mover._thread is not None
        free(p)
        kept = [p] if free is frees[1] else []
        del p
        assert wait_until(storage.expired, 0.1)  # all of it would take longer
    assert wait_until(lambda: is_huge(kept[0]))  # the new memory is moved
    kept.clear()
    assert wait_until(lambda: huge_pages._mover._thread is None)


def test_a_process_ends_while_a_table_moves(run_python):
    program = (
        "import torch\n"
        "torch.sparse.check_sparse_tensor_invariants.disable()\n"
        "from tiger_ext import Tiger, huge_pages\n"
        "p = torch.nn.Parameter(torch.ones(4_000_000, 16))\n"
        "p.grad = torch.sparse_coo_tensor([[5]], torch.ones(1, 16), p.shape)\n"
        "Tiger([p]).step()\n"
        "print(huge_pages._mover._thread is not None)\n"
    )
    result = run_python(program)
    assert result.stderr == ""
    assert result.stdout.strip() == str(tiger_ext._native.C is not None)
    assert run_python(program, TIGER_EXT_HUGE_PAGES="0").stdout.strip() == "False"


def test_a_forked_child_starts_without_the_thread(run_python):
    result = run_python(
        "import os, torch, warnings\n"
        "warnings.simplefilter('ignore')\n"
        "torch.set_num_threads(1)\n"
        "from tiger_ext import Tiger, huge_pages\n"
        "p = torch.nn.Parameter(torch.ones(4_000_000, 16))\n"
        "p.grad = torch.sparse_coo_tensor([[5]], torch.ones(1, 16), p.shape)\n"
        "Tiger([p]).step()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    huge_pages.move_to_huge_pages(p)\n"
        "    huge_pages._mover.end()\n"
        "    os._exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert result.stdout.strip() == "7"


def test_loaded_state_is_in_huge_pages():
    p = table_in_use()
    opt = Tiger([p])
    opt.step()
    again = Tiger([Parameter(p.detach())])
    again.load_state_dict(opt.state_dict())
    (q,) = again.param_groups[0]["params"]
    assert torch.equal(again.state[q]["exp_avg"], opt.state[p]["exp_avg"])
    assert math.isclose(q.nbytes, again.state[q]["exp_avg"].nbytes)
    if tiger_ext._native.C is not None and thp() != "never":
        assert asks_for_huge_pages(again.state[q]["exp_avg"])


def test_loaded_numbers_of_rows_are_in_huge_pages(monkeypatch):
    monkeypatch.setattr(huge_pages, "_LARGE_TABLE_BYTES", 4 << 20)
    options = {"momentum_dtype": torch.int8, "lazy": "decay"}
    p = Parameter(empty_table(2_000_000, 2))
    opt = Tiger([p], **options)
    opt.init_state()
    again = Tiger([Parameter(p.detach())], **options)
    again.load_state_dict(opt.state_dict())
    (state,) = again.state.values()
    for name in ("exp_avg_scale", "last_step"):
        assert torch.equal(state[name], opt.state[p][name])
        assert state[name].dtype == opt.state[p][name].dtype
        if tiger_ext._native.C is not None and thp() != "never":
            assert asks_for_huge_pages(state[name]), name


def test_threads_that_create_one_file_all_get_it(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        for k in range(20):
            path = tmp_path / f"{k}"
            tables = list(pool.map(lambda _, path=path: empty_table(10, 4, path=path), range(8)))
            tables[0][3] = 1.0
            assert all(bool((table[3] == 1).all()) for table in tables)
    assert len(os.listdir(tmp_path)) == 20


@with_huge_pages
def test_a_table_that_is_on_its_way_to_huge_pages_is_not_taken_again():
    p = Parameter(empty_table(4_000_000, 16))
    for _ in range(4):
        huge_pages.move_to_huge_pages(p)
    mover = huge_pages._mover
    assert sum(table.is_of(p) for table in (*mover._tables, mover._moving) if table) == 1
