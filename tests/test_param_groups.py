# SPDX-License-Identifier: Apache-2.0
"""Which parameters ``param_groups`` takes for what: norms of other libraries, zeros, tensors."""

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import lr_scheduler

import tiger_ext
from tiger_ext import AdamW, Lion, Tiger

GAIN = dict(lr=0.125, weight_decay=0.0, scale=None, shrink_to=1.0)
BIAS = dict(lr=0.125, weight_decay=0.0, scale=None, shrink_to=0.0)
OTHER = dict(lr=0.25, weight_decay=0.5, scale="rms", rms_floor=1e-3)
TABLE = dict(lr=0.25, weight_decay=0.5, scale="rms_rows", rms_floor=1e-3)
ZEROS = {**OTHER, "rms_floor": 0.02}
ZERO_TABLE = {**TABLE, "rms_floor": 0.02}


def group_of(model, name, **options):
    """Return the group of a parameter, with the optimizer's defaults filled in."""
    opt = Tiger(tiger_ext.param_groups(model, lr=0.25, weight_decay=0.5, **options))
    p = dict(model.named_parameters())[name]
    (group,) = [g for g in opt.param_groups if any(q is p for q in g["params"])]
    assert group["param_names"][[q is p for q in group["params"]].index(True)] == name
    return group


def assert_is(kind, model, name):
    group = group_of(model, name)
    assert {key: group.get(key) for key in kind} == kind
    assert group.get("shrink_to", 0.0) == kind.get("shrink_to", 0.0)


def norm_class(name, base=nn.Module):
    """Return a class that is called like a library's norm: one gain, made as these make it."""

    def init(self, shape, fill=1.0):
        nn.Module.__init__(self)
        self.weight = Parameter(torch.full(shape, fill))
        self.variance_epsilon = 1e-6

    return type(name, (base,), {"__init__": init})


NORMS = [
    "LlamaRMSNorm",
    "Qwen2RMSNorm",
    "Qwen2_5_VLRMSNorm",
    "Qwen3NextRMSNormGated",
    "GemmaRMSNorm",
    "T5LayerNorm",
    "MixtralRMSNorm",
    "DeepseekV3RMSNorm",
    "NemotronLayerNorm1P",
    "OPTLayerNorm",
    "FusedLayerNorm",
    "FusedRMSNorm",
    "MixedFusedRMSNorm",
    "MixedFusedLayerNorm",
    "LayerNorm2d",
    "LayerNormAct",
    "LayerNormAct2d",
    "BatchNormAct2d",
    "GroupNormAct",
    "RmsNorm",
    "RMSNorm",
    "LayerNorm",
    "SimpleNorm",
    "EvoNorm2dS0",
    "ScaleNorm",
    "ActNorm",
    "Norm",
    "RMSnorm",
    "Layernorm",
    "rms_norm",
    "layer_norm",
    "LayerNormalization",
    "BatchNormalisation",
]


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("shape", [(8,), (), (1, 8, 1, 1)])
def test_norms_of_other_libraries_are_recognised_by_name(name, shape):
    model = nn.Sequential(nn.Linear(8, 8), norm_class(name)(shape))
    assert_is(GAIN, model, "1.weight")
    assert_is(OTHER, model, "0.weight")


NO_NORMS = [
    "Normal",
    "DiagonalNormal",
    "Normalize",
    "NormedLinear",
    "LayerNormalizer",
    "LayerScale",
]


@pytest.mark.parametrize("name", NO_NORMS)
def test_what_is_no_norm_is_not_taken_for_one(name):
    assert_is(OTHER, nn.Sequential(norm_class(name)((8,))), "0.weight")


def test_matrices_in_a_norm_are_no_gains():
    assert_is(OTHER, nn.Sequential(norm_class("AdaptiveRMSNorm")((8, 3))), "0.weight")


def test_what_derives_from_a_norm_is_one():
    derived = norm_class("Final", base=norm_class("LlamaRMSNorm"))
    assert_is(GAIN, nn.Sequential(derived((8,))), "0.weight")


def test_torchs_norms_have_gains_of_any_shape():
    model = nn.Sequential(
        nn.LayerNorm([3, 4]), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.RMSNorm(4)
    )
    for k in range(4):
        assert_is(GAIN, model, f"{k}.weight")
    for k in range(3):
        assert_is(BIAS, model, f"{k}.bias")


class AdaptiveLayerNorm(nn.Module):
    """A norm with layers and a shift: only its own vectors are gains."""

    def __init__(self):
        super().__init__()
        self.gamma = Parameter(torch.ones(8))
        self.beta = Parameter(torch.zeros(8))
        self.bias = Parameter(torch.ones(8))
        self.modulation = nn.Linear(8, 8)


def test_only_a_norms_own_vectors_are_gains():
    model = AdaptiveLayerNorm()
    assert_is(GAIN, model, "gamma")
    assert_is(BIAS, model, "beta")  # zero, and to stay near it
    assert_is(BIAS, model, "bias")
    assert_is(OTHER, model, "modulation.weight")
    assert_is(BIAS, model, "modulation.bias")


# -------------------------------------------------------------------------------------- zeros


@pytest.mark.parametrize("make", [norm_class("GemmaRMSNorm"), norm_class("Zero", nn.LayerNorm)])
def test_gains_that_begin_at_zero_shrink_towards_zero(make):
    model = nn.Sequential(make((8,), 0.0), make((8,), 1.0))
    assert_is(BIAS, model, "0.weight")
    assert_is(GAIN, model, "1.weight")
    opt = Tiger(tiger_ext.param_groups(model, nonfinite="shrink"))
    for p in model.parameters():
        p.grad = torch.full((8,), torch.nan)
    opt.step()
    assert model[0].weight.tolist() == [0.0] * 8 and model[1].weight.tolist() == [1.0] * 8


class LoraLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.lora_A = nn.Linear(64, 4, bias=False)
        self.lora_B = nn.Linear(4, 64, bias=False)
        nn.init.zeros_(self.lora_B.weight)


def test_matrices_that_begin_at_zero_move_as_those_beside_them():
    model = LoraLinear()
    assert_is(OTHER, model, "lora_A.weight")
    assert_is(ZEROS, model, "lora_B.weight")
    opt = Tiger(tiger_ext.param_groups(model, lr=1e-3))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    torch.testing.assert_close(model.lora_B.weight, torch.full((64, 4), -2e-5))


def test_the_callers_floor_wins():
    assert group_of(LoraLinear(), "lora_B.weight", rms_floor=0.5)["rms_floor"] == 0.5
    group = group_of(LoraLinear(), "lora_B.weight", scale=None)
    assert group["scale"] is None


def test_tables_that_begin_at_zero():
    model = nn.ModuleDict(
        {"bias_of": nn.Embedding(10_000, 1), "table": nn.Embedding(9, 3, padding_idx=0)}
    )
    nn.init.zeros_(model["bias_of"].weight)
    assert_is(ZERO_TABLE, model, "bias_of.weight")
    assert_is(TABLE, model, "table.weight")  # its first row is zero
    with torch.no_grad():
        model["bias_of"].weight[-1] = 1.0
    assert_is(TABLE, model, "bias_of.weight")
    nn.init.zeros_(model["bias_of"].weight)
    groups = tiger_ext.param_groups(model, embedding_algorithm="lion")
    assert [g["algorithm"] for g in groups] == ["lion", "lion"]
    (group,) = tiger_ext.param_groups(model, embedding_algorithm="adamw")
    assert group["algorithm"] == "adamw" and "rms_floor" not in group
    assert len(AdamW([group]).param_groups[0]["params"]) == 2


def test_zero_scalars_and_nan():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.alpha = Parameter(torch.zeros(()))
            self.broken = Parameter(torch.full((2, 2), torch.nan))
            self.empty = Parameter(torch.zeros(0, 3))

    for name, kind in (("alpha", ZEROS), ("broken", OTHER), ("empty", OTHER)):
        assert_is(kind, Gate(), name)


def test_what_has_no_values_is_not_zero():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), norm_class("LlamaRMSNorm")((3,)))
    assert_is(OTHER, model, "0.weight")
    assert_is(GAIN, model, "1.weight")
    lazy = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    assert [len(g["params"]) for g in tiger_ext.param_groups(lazy)] == [1, 2, 1]


# ------------------------------------------------------------------------- nothing is shared


def model_of_all_kinds():
    zero = nn.Linear(3, 3)
    nn.init.zeros_(zero.weight)
    return nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3), nn.LayerNorm(3), zero)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("cls", [Tiger, Lion])
def test_each_group_has_an_lr_of_its_own(cls, shape):
    lr = torch.full(shape, 0.5)
    opt = cls(tiger_ext.param_groups(model_of_all_kinds(), lr=lr))
    rates = [group["lr"] for group in opt.param_groups]
    assert len(rates) == 5 and len({r.data_ptr() for r in [lr, *rates]}) == 6
    assert all(r.shape == shape for r in rates)
    before = [float(r) for r in rates]
    for group in opt.param_groups:
        group["lr"].mul_(0.5)
    assert [float(r) for r in rates] == [0.5 * b for b in before] and float(lr) == 0.5
    rates = [0.1, 0.2, 0.3, 0.4, 0.5]
    lr_scheduler.OneCycleLR(opt, max_lr=rates, total_steps=10)
    wanted = pytest.approx([rate / 25 for rate in rates])
    assert [float(group["lr"]) for group in opt.param_groups] == wanted


def test_no_group_has_anothers_betas_or_options():
    options = dict(betas=[0.5], tags=["a"], schedule={"end": 3})
    groups = tiger_ext.param_groups(model_of_all_kinds(), **options)
    for name, value in options.items():
        found = [group[name] for group in groups]
        assert all(f == value for f in found)
        assert len({id(f) for f in [value, *found]}) == 6


def test_betas_of_the_embeddings_algorithm_may_be_any_sequence():
    for betas in (torch.tensor([0.5, 0.25]), [0.5, 0.25]):
        groups = tiger_ext.param_groups(
            model_of_all_kinds(), betas=betas, embedding_algorithm="tiger"
        )
        assert [group.get("betas") is None for group in groups] == [True, *[False] * 4]
        assert Lion(groups).param_groups[1]["betas"] == (0.5, 0.25)


@pytest.mark.parametrize("algorithm", ["tiger", "lion", "adamw"])
@pytest.mark.parametrize("betas", [0.9, None, {0.5}, "0.9", ()], ids=repr)
def test_what_is_no_sequence_of_betas_is_refused(algorithm, betas):
    with pytest.raises(ValueError, match=rf"^betas=.*: {algorithm} expects a tuple of"):
        tiger_ext.param_groups(nn.Linear(3, 3), betas=betas, embedding_algorithm=algorithm)


@pytest.mark.parametrize(
    "lr", [10**400, -1.0, "0.1", [0.1], torch.ones(2)], ids=lambda v: type(v).__name__
)
def test_what_is_no_learning_rate_is_refused(lr):
    with pytest.raises(ValueError, match=r"(?s)^lr=.*: expected a finite number >= 0"):
        tiger_ext.param_groups(nn.Linear(3, 3), lr=lr)


def test_what_the_groups_have():
    groups = tiger_ext.param_groups(model_of_all_kinds(), embedding_algorithm="adamw", eps=1e-6)
    assert set(groups[0]) == {"params", "param_names", "algorithm", "eps"}
    every = {"params", "param_names", "lr", "weight_decay", "scale"}
    more = [set(group) - every for group in groups[1:]]
    assert more == [set(), {"rms_floor"}, {"shrink_to"}, {"shrink_to"}]
    assert all(every <= set(group) for group in groups[1:])
    assert [g.get("eps") for g in Tiger(groups).param_groups] == [1e-6, None, None, None, None]
    with pytest.raises(TypeError, match="tiger has no option 'eps'"):
        Tiger(tiger_ext.param_groups(model_of_all_kinds(), eps=1e-6))
