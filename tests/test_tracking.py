# SPDX-License-Identifier: Apache-2.0
"""Tracked modules: which of their arguments are the ids, what wraps them, what replaces tables."""

import copy
import functools
import gc

import psutil
import pytest
import torch
import torch.nn.functional as F
from oracle import same_bits, unchanged
from published import backends
from torch import nn
from torch.nn import Parameter
from torch.nn.utils import parametrize
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from tiger_ext import Tiger
from tiger_ext.nn import TiedEmbedding

ROWS = 12
HYPER = dict(lr=0.05, weight_decay=0.3)
IDS = torch.tensor([3, 7, 3])


class Lookup(nn.Module):
    """A table under another name, and ids that are not the first keyword argument."""

    def __init__(self, rows=ROWS):
        super().__init__()
        self.table = Parameter(torch.randn(rows, 4))

    def forward(self, ids, factor=1.0):
        return F.embedding(ids.long(), self.table) * factor


def table_of(module):
    return module.table if isinstance(module, Lookup) else module.weight


def changed_rows(p, before):
    return (p.detach() != before).any(1).nonzero().flatten().tolist()


def tracking(module, **options):
    options = {"rows": "tracked", "lazy": "exact", **options}
    optimizer = Tiger([table_of(module)], **HYPER, **options)
    optimizer.track(module, table_of(module))
    return optimizer


def used(optimizer, call, *args, **kwargs):
    """Return the rows that the next step updates after a call."""
    (table,) = optimizer.param_groups[0]["params"]
    optimizer.flush()
    before = table.detach().clone()
    call(*args, **kwargs)
    table.grad = torch.ones_like(table)
    optimizer.step()
    table.grad = None
    return changed_rows(table, before)


def read(optimizer, table, call, *args, **kwargs):
    """Return the rows that a call has brought up to date."""
    optimizer.step()  # without a gradient: every row is behind
    clock = optimizer.state[table].get("last_step")
    before = None if clock is None else clock.clone()
    call(*args, **kwargs)
    clock = optimizer.state[table]["last_step"]
    if before is None:
        before = torch.full_like(clock, -1)
    rows = (clock != before).nonzero().flatten().tolist()
    optimizer.step()  # which forgets what was used
    return rows


# ------------------------------------------------------------------------------ which argument


@backends
@pytest.mark.parametrize(
    "order", [("offsets", "input"), ("per_sample_weights", "offsets", "input"), ("input",)]
)
def test_the_ids_of_a_bag_are_those_called_input(order, fused):
    bag = nn.EmbeddingBag(ROWS, 4, mode="sum")
    optimizer = tracking(bag, fused=fused)
    values = dict(
        offsets=torch.tensor([0, 1]), input=IDS, per_sample_weights=torch.tensor([1.0, 2.0, 3.0])
    )
    kwargs = {name: values[name] for name in order}
    if order == ("input",):
        kwargs["input"] = IDS[None]
    assert used(optimizer, bag, **kwargs) == [3, 7]


def decorated(forward):
    @functools.wraps(forward)
    def call(*args, **kwargs):
        return forward(*args, **kwargs)

    return call


@backends
@pytest.mark.parametrize("how", ["plain", "wraps", "partial", "compile"])
def test_the_ids_are_the_argument_that_forward_calls_first(how, fused):
    module = Lookup()
    optimizer = tracking(module, fused=fused)
    if how == "wraps":
        module.forward = decorated(module.forward)
    elif how == "partial":
        module.forward = functools.partial(Lookup.forward, module)
    elif how == "compile":
        module.compile(backend="eager")
    assert used(optimizer, module, factor=torch.tensor(2), ids=IDS) == [3, 7]
    assert used(optimizer, module, IDS + 1, factor=2.0) == [4, 8]


@backends
def test_a_forward_that_names_no_argument(fused):
    class Any(Lookup):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    module = Any()
    optimizer = tracking(module, fused=fused)
    assert used(optimizer, module, IDS, factor=2.0) == [3, 7]
    assert used(optimizer, module, ids=IDS + 1) == [4, 8]
    with pytest.raises(TypeError, match=r"Any is tracked.*ids first.*\['factor', 'ids'\]"):
        module(factor=torch.tensor(2), ids=IDS)


def test_a_module_called_without_ids_says_so():
    module = Lookup()
    optimizer = tracking(module)
    with (
        unchanged(optimizer),
        pytest.raises(TypeError, match=r"Lookup is tracked.*ids first.*\['factor'\]"),
    ):
        module(factor=1.0)


# ------------------------------------------------------------------------------- kinds of ids


@backends
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_ids(layout, fused):
    table = nn.Embedding(ROWS, 4)
    optimizer = tracking(table, fused=fused)
    rows = [torch.tensor([1, 2]), torch.tensor([5])]
    ids = torch.nested.nested_tensor(rows, layout=layout)
    assert used(optimizer, table, ids) == [1, 2, 5]
    assert read(optimizer, table.weight, table, ids) == [1, 2, 5]


def not_contiguous():
    rows = [torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5, 6]])]
    return torch.nested.nested_tensor(rows).transpose(1, 2)


@backends
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "ids,got",
    [
        (lambda: torch.tensor([0, 3]).to_sparse(), "layout torch.sparse_coo"),
        (not_contiguous, "nested tensor that is not contiguous"),
        (lambda: torch.tensor([1.0]), "torch.float32"),
        (lambda: [1, 2], "list"),
        (lambda: None, "NoneType"),
    ],
    ids=["sparse", "nested", "floats", "list", "None"],
)
def test_what_is_no_tensor_of_ids_is_refused(ids, got, fused):
    class Anything(Lookup):
        def forward(self, ids):
            return self.table.sum()

    module = Anything()
    optimizer = tracking(module, fused=fused)
    with unchanged(optimizer), pytest.raises(TypeError, match=f"Anything is tracked.*{got}"):
        module(ids())


def test_a_tensor_that_wraps_others_is_refused():
    from torch.testing._internal.two_tensor import TwoTensor

    module = Lookup()
    optimizer = tracking(module)
    with (
        unchanged(optimizer),
        pytest.raises(TypeError, match=r"Lookup is tracked.*plain tensor of ids.*TwoTensor"),
    ):
        module(TwoTensor(IDS, IDS))


@backends
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.uint16, torch.int16, torch.int32])
@pytest.mark.parametrize("shape", ["scalar", "empty", "strided", "subclass"])
def test_ids_of_every_type_are_read_and_used(dtype, shape, fused):
    class Ids(torch.Tensor):
        pass

    ids = torch.tensor([[1, 0], [1, 0]]).to(dtype)
    ids = {
        "scalar": ids[0, 0],
        "empty": torch.empty(0, 2).to(dtype),
        "strided": ids[:, 0],
        "subclass": ids[:, 0].as_subclass(Ids),
    }[shape]
    module = Lookup()
    optimizer = tracking(module, fused=fused)
    expected = [] if shape == "empty" else [1]
    assert used(optimizer, module, ids) == expected
    assert read(optimizer, module.table, module, ids) == expected


@backends
def test_ids_without_values_are_passed_over(fused):
    class Anything(Lookup):
        def forward(self, ids):
            return self.table.sum()

    module = Anything()
    optimizer = tracking(module, fused=fused)
    assert used(optimizer, module, IDS.to("meta")) == []
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(IDS)
    assert used(optimizer, module, fake) == []
    meta = Anything().to("meta")
    optimizer = tracking(meta, fused=fused)
    meta(IDS)
    meta.table.grad = torch.ones_like(meta.table)
    optimizer.step()


@backends
def test_rows_of_a_table_that_autograd_ignores_are_recorded(fused):
    # Its gradient may come from elsewhere.
    table = nn.Embedding(ROWS, 4)
    optimizer = tracking(table, fused=fused)
    table.weight.requires_grad_(False)
    assert used(optimizer, table, IDS) == [3, 7]


@backends
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_padding_is_read_and_not_used(kind, fused):
    table = kind(ROWS, 4, padding_idx=-5)
    table.weight.data.fill_(1.0)
    optimizer = tracking(table, fused=fused)
    assert used(optimizer, table, IDS[None]) == [3]
    assert read(optimizer, table.weight, table, IDS[None]) == [3, 7]
    # Another module of the table may have none.
    other = nn.Embedding(ROWS, 4)
    other.weight = table.weight
    optimizer.track(other)
    assert used(optimizer, lambda: (other(IDS), table(IDS[None]))) == [3, 7]


# ------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "rows,lazy", [("tracked", "frozen"), ("tracked", "exact"), (None, "frozen"), (None, "exact")]
)
def test_forward_passes_without_a_step_keep_no_ids(rows, lazy):
    class Reads(Lookup):
        def forward(self, ids):
            return None

    ids = torch.randint(ROWS, (500_000,))
    reads = Reads()
    optimizer = tracking(reads, rows=rows, lazy=lazy)
    for _ in range(3):
        reads(ids)
    before = psutil.Process().memory_info().rss
    for _ in range(40):
        reads(ids)
    assert psutil.Process().memory_info().rss - before < 32 * 2**20  # 40 lists of ids are 160 MB
    reads.table.grad = torch.ones(ROWS, 4)
    optimizer.step()


@backends
def test_rows_used_before_a_model_moves(fused):
    """Its parameters are the same objects, of another dtype, when the step comes."""
    table = nn.Embedding(ROWS, 4)
    optimizer = tracking(table, fused=fused)

    def call():
        table(IDS)
        table.double()

    assert used(optimizer, call) == [3, 7]


# ------------------------------------------------------------------------------------ wrappers


class Passing(nn.Module):
    """Passes its ids on; has the table of another module for its own."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.weight = inner, inner.weight

    def forward(self, ids):
        return self.inner(ids)


def with_copied_dict(inner):
    outer = Passing(inner)
    own = {k: copy.copy(v) if isinstance(v, dict) else v for k, v in vars(inner).items()}
    outer.__dict__ = {**own, "inner": inner}
    return outer


def with_shared_dict(inner):
    outer = Passing(inner)
    outer.__dict__ = {**vars(inner), "inner": inner}
    return outer


def with_wraps(inner):
    outer = Passing(inner)
    functools.update_wrapper(outer, inner)
    outer.__dict__["inner"] = inner
    return outer


WRAPPERS = [
    Passing,
    with_copied_dict,
    with_shared_dict,
    with_wraps,
    copy.copy,
    nn.DataParallel,
    functools.partial(torch.compile, backend="eager"),
]


@backends
@pytest.mark.parametrize("tracked", ["inner", "outer", "inner before"])
@pytest.mark.parametrize("called", ["inner", "outer"])
@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda w: getattr(w, "__name__", "compile"))
def test_a_wrapper_and_what_it_wraps_are_tracked_alike(wrap, called, tracked, fused):
    torch._dynamo.reset()
    inner = nn.Embedding(ROWS, 4)
    optimizer = Tiger([inner.weight], rows="tracked", lazy="exact", fused=fused, **HYPER)
    handle = optimizer.track(inner) if tracked == "inner before" else None
    outer = wrap(inner)
    if handle is None:
        handle = optimizer.track({"inner": inner, "outer": outer}[tracked])
    call = {"inner": inner, "outer": outer}[called]
    assert read(optimizer, inner.weight, call, IDS) == [3, 7]
    assert used(optimizer, call, IDS) == [3, 7]
    handle.remove()
    assert read(optimizer, inner.weight, call, IDS) == []


@backends
def test_a_replica_of_data_parallel(fused):
    """It reads a copy that was made before the hook runs."""
    table = nn.Embedding(ROWS, 4)
    optimizer = tracking(table, lazy="frozen", fused=fused)
    replica = table._replicate_for_data_parallel()
    replica.weight = table.weight.detach().clone()
    assert used(optimizer, replica, IDS) == [3, 7]
    optimizer = tracking(table, fused=fused)
    replica = table._replicate_for_data_parallel()
    replica.weight = table.weight.detach().clone()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"DataParallel.*flush"):
        replica(IDS)
    optimizer.flush()
    replica(IDS)
    # Tracked with its wrapper, whose hook runs before the copies are made.
    table = nn.Embedding(ROWS, 4)
    parallel = nn.DataParallel(table)
    optimizer = Tiger([table.weight], rows="tracked", lazy="exact", fused=fused, **HYPER)
    optimizer.track(parallel)
    optimizer.step()
    replica = table._replicate_for_data_parallel()
    replica.weight = table.weight.detach().clone()
    replica(IDS)


@backends
def test_distributed_data_parallel(fused):
    # Without gloo, whose thread may wait for the GIL while the group is destroyed with it held.
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        table = nn.Embedding(ROWS, 4)
        parallel = nn.parallel.DistributedDataParallel(table)
        optimizer = Tiger(parallel.parameters(), rows="tracked", lazy="exact", fused=fused)
        optimizer.track(parallel)
        for call in (parallel, table):
            assert read(optimizer, table.weight, call, IDS) == [3, 7]
            assert used(optimizer, call, IDS) == [3, 7]
    finally:
        torch.distributed.destroy_process_group()


def test_what_is_no_module_cannot_be_tracked():
    table = nn.Embedding(ROWS, 4)
    optimizer = Tiger(table.parameters())
    with pytest.raises(TypeError, match=r"track expects an nn\.Module, got function"):
        optimizer.track(decorated(table.forward), table.weight)


FLOATS = [
    nn.Linear(4, 3),
    nn.Bilinear(4, 3, 2),
    nn.Conv1d(3, 3, 1),
    nn.ConvTranspose2d(3, 3, 1),
    nn.BatchNorm1d(3),
    nn.InstanceNorm2d(3, affine=True),
    nn.LayerNorm(3),
    nn.RMSNorm(3),
    nn.GroupNorm(1, 3),
    nn.PReLU(),
]


@pytest.mark.parametrize("module", FLOATS, ids=lambda m: type(m).__name__)
def test_modules_that_take_floats_are_refused(module):
    name = type(module).__name__
    optimizer = Tiger(module.parameters())
    for each in (module, nn.DataParallel(module)):
        with pytest.raises(TypeError, match=f"{name} is called with a tensor of floats"):
            optimizer.track(each)


# ------------------------------------------------------------------------------ the table itself


@backends
def test_a_replaced_table_is_refused(fused):
    table = nn.Embedding(ROWS, 4, dtype=torch.float64)
    optimizer = Tiger([("words", table.weight)], rows="tracked", fused=fused, **HYPER)
    optimizer.track(table)
    table(IDS).sum().backward()
    optimizer.step()
    old, table.weight = table.weight, Parameter(torch.ones(2 * ROWS, 4))
    for training in (True, False):
        match = r"Embedding.*'words'.*replaced.*add_param_group.*optimizer\.track.*resize"
        with unchanged(optimizer), pytest.raises(RuntimeError, match=match):
            table.train(training)(IDS)
    table.train()
    optimizer.add_param_group({"params": [("new words", table.weight)]})
    with pytest.raises(RuntimeError, match="'words'"):
        table(IDS)  # the old handle still watches
    table.weight = old
    table(IDS)


@backends
@pytest.mark.parametrize("lazy", ["frozen", "exact"])
def test_a_resized_table_is_refused(lazy, fused):
    table = nn.Embedding(ROWS, 4)
    optimizer = Tiger([("words", table.weight)], rows="tracked", lazy=lazy, fused=fused, **HYPER)
    optimizer.track(table)
    table(IDS).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    table(IDS)
    table.weight.data = torch.randn(2 * ROWS, 4)
    match = rf"'words'.*was resized.*{ROWS} rows.*{2 * ROWS}.*optimizer\.track"
    for training in (True, False):
        with unchanged(optimizer), pytest.raises(RuntimeError, match=match):
            table.train(training)(IDS)
    table.weight.grad = torch.ones(2 * ROWS, 4)
    with unchanged(optimizer), pytest.raises(RuntimeError, match=match):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"exp_avg has shape \[12, 4\].*\[24, 4\]"):
        optimizer.track(table)
    del optimizer.state[table.weight]
    optimizer.track(table)
    table.train()
    table.weight.grad = None
    assert used(optimizer, table, torch.tensor([2 * ROWS - 1])) == [2 * ROWS - 1]


@backends
@pytest.mark.parametrize("lazy", ["frozen", "exact"])
@pytest.mark.parametrize("rows", [5, 20])
@pytest.mark.parametrize("sparse", [True, False])
def test_a_resized_table_with_state_of_the_old_size(sparse, rows, lazy, fused):
    table = nn.Embedding(ROWS, 4, sparse=sparse)
    optimizer = Tiger([("words", table.weight)], lazy=lazy, fused=fused, **HYPER)
    table(torch.tensor([3])).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    table.weight.data = torch.randn(rows, 4)
    match = rf"'words'.*exp_avg has shape \[12, 4\].*\[{rows}, 4\]"
    if lazy != "frozen":
        with unchanged(optimizer), pytest.raises(RuntimeError, match=match):
            optimizer.flush()
    table(torch.tensor([4])).sum().backward()
    with unchanged(optimizer), pytest.raises(RuntimeError, match=match):
        optimizer.step()


@backends
def test_a_table_given_by_name_may_be_held_elsewhere(fused):
    class Elsewhere(nn.Module):
        def __init__(self, table):
            super().__init__()
            self.get = lambda: table

        def forward(self, ids):
            return self.get()[ids]

    table = Parameter(torch.randn(ROWS, 4))
    module = Elsewhere(table)
    optimizer = Tiger([table], rows="tracked", lazy="exact", fused=fused, **HYPER)
    optimizer.track(module, table)
    assert used(optimizer, module, IDS) == [3, 7]
    table.data = torch.randn(ROWS + 1, 4)
    with pytest.raises(RuntimeError, match="was resized"):
        module(IDS)


@backends
def test_functional_calls_with_tensors_of_their_own(fused):
    table = nn.Embedding(ROWS, 4)
    optimizer = tracking(table, fused=fused)
    call = torch.func.functional_call
    own = {"weight": torch.randn(ROWS + 5, 4)}
    assert used(optimizer, call, table, own, IDS + 9) == []
    assert read(optimizer, table.weight, call, table, own, IDS) == []
    # The table's own storage.
    shared = {name: p.detach() for name, p in table.named_parameters()}
    assert used(optimizer, call, table, shared, IDS) == [3, 7]
    assert read(optimizer, table.weight, call, table, shared, IDS) == [3, 7]
    assert read(optimizer, table.weight, call, table, dict(table.named_parameters()), IDS) == [3, 7]
    # Those of an average of the model, as parameters.
    with pytest.raises(RuntimeError, match=r"functional_call takes parameters detached"):
        call(table, {"weight": Parameter(own["weight"])}, IDS)


@backends
def test_parametrized_tables(fused):
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    before, after = nn.Embedding(ROWS, 4), nn.Embedding(ROWS, 4)
    parametrize.register_parametrization(before, "weight", Double())
    p = before.parametrizations.weight.original
    optimizer = Tiger([p], rows="tracked", lazy="exact", fused=fused, **HYPER)
    optimizer.track(before, p)
    assert used(optimizer, before, IDS) == [3, 7]
    optimizer = tracking(after, fused=fused)
    parametrize.register_parametrization(after, "weight", Double())
    assert used(optimizer, after, IDS) == [3, 7]


@backends
@pytest.mark.parametrize("how", ["to", "swap on conversion", "swap_tensors", "data"])
@pytest.mark.filterwarnings("error:.*written to by others")  # as a conversion has not
def test_tables_that_are_converted_stay_tracked(how, fused):
    table = nn.Embedding(ROWS, 4)
    optimizer = tracking(table, fused=fused)
    assert used(optimizer, table, IDS) == [3, 7]
    p = table.weight
    if how in ("swap_tensors", "data"):
        optimizer.flush()  # as before other values are put in its place
    if how == "to":
        table.double()
    elif how == "swap on conversion":
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            table.double()
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
    elif how == "swap_tensors":
        torch.utils.swap_tensors(p, Parameter(torch.randn(ROWS, 4)))
    else:
        p.data = torch.randn(ROWS, 4)
    assert table.weight is p
    assert used(optimizer, table, IDS + 1) == [4, 8]


# ------------------------------------------------------------------- programs and transforms


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_scripting_a_tracked_module_says_what_to_do():
    model = nn.Sequential(nn.Embedding(ROWS, 4), nn.Linear(4, 3))
    optimizer = Tiger(model.parameters(), lazy="exact", **HYPER)
    handle = optimizer.track(model[0])
    for each in (model, copy.deepcopy(model)):
        with pytest.raises(AttributeError, match=r"cannot compile a tracked module.*remove\(\)"):
            torch.jit.script(each)
    handle.remove()
    scripted = torch.jit.script(model)
    assert torch.equal(scripted(IDS), model(IDS))


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@backends
def test_a_scripted_module_is_tracked_by_what_contains_it(fused):
    scripted = torch.jit.script(nn.Embedding(ROWS, 4))
    optimizer = Tiger(scripted.parameters(), rows="tracked", lazy="exact", fused=fused, **HYPER)
    with pytest.raises(TypeError, match=r"takes no hooks.*module that contains it"):
        optimizer.track(scripted)
    module = nn.Sequential(scripted)
    optimizer.track(module, scripted.weight)
    assert used(optimizer, module, IDS) == [3, 7]
    assert read(optimizer, scripted.weight, module, input=IDS) == [3, 7]


@backends
@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", ["trace", "make_fx", "symbolic_trace"])
def test_a_traced_program_has_no_trace_of_the_tracking(how, fused):
    from torch.fx.experimental.proxy_tensor import make_fx

    class Leafless(Lookup):
        def forward(self, ids):
            return F.embedding(ids, self.table)

    module = Leafless()
    optimizer = tracking(module, fused=fused)

    model = nn.Sequential(module)

    def traced():
        if how == "trace":
            return torch.jit.trace(model, IDS)
        return make_fx(model)(IDS) if how == "make_fx" else torch.fx.symbolic_trace(model)

    program = traced()
    nodes = str(program.inlined_graph if how == "trace" else program.graph)
    assert "embedding" in nodes
    assert not any(name in nodes for name in ("index_fill", "clamp", "aminmax", "item"))
    assert used(optimizer, traced) == []
    other = IDS + 1
    expected = module(other)  # the program reads the rows as they are
    assert torch.equal(program(other), expected)
    optimizer.step()
    assert used(optimizer, module, IDS) == [3, 7]


@backends
@pytest.mark.parametrize("wrap", [torch.vmap, torch.func.functionalize, "grad", "jacrev"])
def test_transforms_of_tracked_modules(wrap, fused):
    table = nn.Embedding(ROWS, 4)
    optimizer = tracking(table, fused=fused)
    ids = torch.tensor([[1, 2], [2, 9]])
    if isinstance(wrap, str):
        transform = getattr(torch.func, wrap)

        def call(ids):
            params = {name: p.detach() for name, p in table.named_parameters()}

            def loss(params, ids):
                return torch.func.functional_call(table, params, (ids,)).sum()

            torch.vmap(transform(loss), in_dims=(None, 0))(params, ids)

    else:
        call = wrap(table)
        assert torch.equal(call(ids), F.embedding(ids, table.weight))
        optimizer.step()
    assert used(optimizer, call, ids) == [1, 2, 9]
    assert read(optimizer, table.weight, call, ids) == [1, 2, 9]
    assert used(optimizer, table, torch.tensor([0])) == [0]  # no wrapper has stayed behind
    with pytest.raises(IndexError, match="12"):
        call(ids + 10)


@backends
def test_an_ensemble_by_vmap_reads_its_own_tables(fused):
    table = nn.Embedding(ROWS, 4)
    optimizer = tracking(table, fused=fused)
    stacked = {"weight": torch.randn(3, ROWS, 4)}

    def call(params, ids):
        return torch.func.functional_call(table, params, (ids,))

    each = torch.vmap(call, in_dims=(0, None))
    assert used(optimizer, each, stacked, IDS) == []
    assert torch.equal(each(stacked, IDS), stacked["weight"][:, IDS])


@backends
def test_a_dispatch_mode_does_not_see_the_tracking(fused):
    class Names(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    table = nn.Embedding(ROWS, 4)
    optimizer = tracking(table, fused=fused)
    seen = Names()

    def call():
        with seen:
            table(IDS)

    assert read(optimizer, table.weight, call) == [3, 7]
    assert seen.names == ["embedding.default"]


# ------------------------------------------------------------- parameters that are not tracked


def mixed_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(ROWS, 4), nn.Linear(4, 4), nn.Linear(4, 3))


@backends
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(lazy="exact"),
        dict(scale="rms"),
        dict(scale="rms", accumulation_steps=2),
        dict(nonfinite="skip"),
        dict(accumulation_steps=2, lazy="decay"),
    ],
    ids=lambda o: "-".join(map(str, o.values())) or "plain",
)
def test_other_parameters_of_a_tracked_group_are_updated_as_without_it(options, fused):
    model, twin = mixed_model(), mixed_model()
    optimizer = Tiger(model.parameters(), rows="tracked", fused=fused, **options)
    groups = [{"params": twin[0].weight, "rows": "tracked"}, {"params": twin[1:].parameters()}]
    other = Tiger(groups, fused=fused, **options)
    optimizer.track(model[0])
    other.track(twin[0])
    for step in range(5):
        for m, o in ((model, optimizer), (twin, other)):
            o.zero_grad()
            m(IDS + step % 2).square().sum().backward()
            if options.get("nonfinite"):
                m[1].weight.grad[0, 0] = torch.nan
            if step == 3:
                m[2].weight.grad = None
            o.step()
    for p, q in zip(model.parameters(), twin.parameters()):
        assert same_bits(p, q)
        assert set(optimizer.state[p]) == set(other.state[q])
        for name, value in optimizer.state[p].items():
            assert same_bits(value, other.state[q][name]), name


@backends
def test_an_untracked_embedding_of_a_tracked_group_is_refused(fused):
    model = nn.Sequential(nn.Linear(4, 4), nn.EmbeddingBag(ROWS, 4), nn.Embedding(ROWS, 4))
    parametrize.register_parametrization(model[2], "weight", nn.Identity())
    optimizer = Tiger(model.named_parameters(), rows="tracked", fused=fused)
    for number in (1, 2):
        for p in model.parameters():
            p.grad = None
        for p in model[number].parameters():
            p.grad = torch.ones_like(p)
        model[0].weight.grad = torch.ones(4, 4)
        with unchanged(optimizer), pytest.raises(RuntimeError, match=f"'{number}\\..*track"):
            optimizer.step()
    model[2].parametrizations.weight.original.grad = None
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert changed_rows(model[0].weight, before) == [0, 1, 2, 3]


@backends
def test_tracking_that_concerns_no_parameter_is_refused(fused):
    model, tied = nn.Linear(4, 4), TiedEmbedding(ROWS, 4)
    optimizer = Tiger([model.weight, tied.weight], rows="tracked", fused=fused)
    model.weight.grad = torch.ones(4, 4)
    with unchanged(optimizer), pytest.raises(RuntimeError, match=r"position 0.*track"):
        optimizer.step()
    handle = optimizer.track(tied)
    before = model.weight.detach().clone()
    optimizer.step()
    assert changed_rows(model.weight, before) == [0, 1, 2, 3]
    # What was once tracked is a table also when it is not any more.
    handle.remove()
    tied.weight.grad = torch.ones(ROWS, 4)
    with unchanged(optimizer), pytest.raises(RuntimeError, match=r"position 1.*track"):
        optimizer.step()


@backends
def test_a_table_that_is_tracked_late(fused):
    """It was taken for another parameter until then."""
    table, module = nn.Embedding(ROWS, 4), Lookup()
    optimizer = Tiger([table.weight, module.table], rows="tracked", fused=fused, **HYPER)
    optimizer.track(table)
    module.table.grad = torch.ones(ROWS, 4)
    optimizer.step()
    optimizer.track(module, module.table)
    before = module.table.detach().clone()
    module(IDS)
    optimizer.step()
    assert changed_rows(module.table, before) == [3, 7]


def test_embeddings_are_searched_once(monkeypatch):
    model = mixed_model()
    optimizer = Tiger(model.parameters(), rows="tracked")
    optimizer.track(model[0])
    searches = []
    everything = gc.get_objects
    monkeypatch.setattr(gc, "get_objects", lambda: searches.append(1) or everything())
    for _ in range(3):
        model(IDS).sum().backward()
        optimizer.step()
    assert len(searches) == 1


def test_a_read_looks_at_no_other_parameter():
    # Whatever the number of parameters in the optimizer: each would have to be looked at.
    class Counted(list):
        looked = 0

        def __iter__(self):
            Counted.looked += 1
            return super().__iter__()

    table = nn.Embedding(ROWS, 4)
    others = [nn.Parameter(torch.ones(1)) for _ in range(20)]
    optimizer = Tiger([*others, table.weight], rows="tracked", lazy="decay")
    optimizer.track(table)
    table(IDS).sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["params"] = Counted(optimizer.param_groups[0]["params"])
    table(IDS)
    assert Counted.looked == 0
