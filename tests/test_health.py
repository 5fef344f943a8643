# SPDX-License-Identifier: Apache-2.0
"""The health report flags the bad rows and no others, from an optimizer and from a checkpoint."""

import copy
import json
import math

import pytest
import torch
from cases import FLOATS
from torch import nn

from tiger_ext import AdamW, Tiger, health_report
from tiger_ext.__main__ import main
from tiger_ext.health_findings import HealthReport, printable

DECAY = 0.1  # the bound is 10


def planted(rows=5000, dim=16, dtype=torch.float32):
    table = torch.randn(rows, dim, generator=torch.Generator().manual_seed(1)) * 0.3
    table[[3, 700]] = 9.5  # saturated
    table[41, :8] = -9.2  # just half of its elements
    table[42, :7] = 9.2  # one less than half: only an outlier
    table[[0, 99]] = 0.0
    table[5, 2] = torch.nan
    table[6, 2] = -torch.inf
    return table.to(dtype)


EXPECTED = {
    "saturated_rows": [3, 41, 700],
    "zero_rows": [0, 99],
    "nonfinite_rows": [5, 6],
    "outlier_rows": [3, 41, 42, 700],
}


def flags(table):
    return {name: getattr(table, name).tolist() for name in EXPECTED}


def optimizer_of(table, cls=Tiger, **options):
    p = nn.Parameter(table)
    return cls([("words", p)], lr=0.01, weight_decay=DECAY, **options)


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_exactly_the_planted_rows_are_flagged(dtype):
    opt = optimizer_of(planted(dtype=dtype))
    before = planted(dtype=dtype)
    report = health_report(opt)
    assert flags(report.tables["words"]) == EXPECTED
    p = opt.param_groups[0]["params"][0]
    assert torch.equal(p.nan_to_num(), before.nan_to_num()) and p.grad is None and not opt.state


@pytest.mark.parametrize("shape", [(100_000, 8), (4000, 64), (1000, 1), (1000, 3, 5)])
def test_a_healthy_table_has_no_flags(shape):
    table = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    (t,) = health_report(optimizer_of(table, rows="nonzero")).tables.values()
    assert flags(t) == {name: [] for name in EXPECTED}
    assert (t.rows, t.dim) == (shape[0], math.prod(shape[1:]))


def test_non_contiguous_tables_and_small_chunks(monkeypatch):
    import tiger_ext.health

    monkeypatch.setattr(tiger_ext.health, "_PIECE_ELEMENTS", 16 * 7)
    table = planted().T.contiguous().T
    assert not table.is_contiguous()
    assert flags(health_report(optimizer_of(table)).tables["words"]) == EXPECTED


def test_quantiles_and_shares():
    table = torch.zeros(2000, 2)
    table[:, 0] = torch.arange(2000) / 200.0  # 0 ... 9.995
    t = health_report(optimizer_of(table)).tables["words"]
    for q, norm in t.norm_quantiles.items():
        assert norm == pytest.approx(q * 9.995, abs=0.01)
    assert t.bound_quantiles[1.0] == pytest.approx(0.9995)
    assert t.bound_share_090 == pytest.approx(200 / 4000, abs=1 / 4000)
    assert t.bound_share_099 == pytest.approx(20 / 4000, abs=1 / 4000)
    assert t.steps_to_half_bound == pytest.approx(math.log(2) / -math.log1p(-0.001))


def test_the_steps_to_half_bound_are_those_of_the_rule():
    p = nn.Parameter(torch.zeros(1000, 1, dtype=torch.float64))
    opt = Tiger([p], lr=0.01, weight_decay=DECAY)
    steps = health_report(opt).tables["group0.0"].steps_to_half_bound
    p.grad = torch.ones_like(p)
    for _ in range(round(steps)):
        opt.step()
        p.grad.zero_()
    assert p[0].item() == pytest.approx(-5.0, abs=0.01)


def test_without_weight_decay_there_is_no_bound():
    p = nn.Parameter(planted())
    t = health_report(Tiger([p], weight_decay=0.0)).tables["group0.0"]
    assert t.bound_share_090 is None and t.steps_to_half_bound is None
    assert t.saturated_rows.tolist() == [] and t.zero_rows.tolist() == [0, 99]


def test_ages_of_rows():
    opt = optimizer_of(torch.randn(1000, 4))
    p = opt.param_groups[0]["params"][0]
    last = torch.full((1000,), -1, dtype=torch.int32)
    last[:101] = torch.arange(101, dtype=torch.int32)
    opt.state[p]["last_step"] = last
    t = health_report(opt).tables["words"]
    assert t.never_touched == 899
    assert (t.age_p50, t.age_p90, t.age_p99, t.age_max) == (50, 90, 99, 100)


def test_which_parameters_are_tables():
    sparse = nn.Parameter(torch.randn(5, 3))
    sparse.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 3), (5, 3))
    opt = Tiger(
        [
            {"params": [nn.Parameter(torch.randn(300, 300)), nn.Parameter(torch.randn(5000))]},
            {"params": [sparse]},
            {"params": [nn.Parameter(torch.randn(4, 3))], "rows": "nonzero"},
            {"params": [nn.Parameter(torch.randn(4, 3))], "scale": "rms_rows"},
            {"params": [nn.Parameter(torch.randn(4, 3))]},
        ]
    )
    assert list(health_report(opt).tables) == ["group1.0", "group2.0", "group3.0"]


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_empty_tables(shape):
    (t,) = health_report(optimizer_of(torch.zeros(shape), rows="nonzero")).tables.values()
    assert flags(t) == {name: [] for name in EXPECTED}


def test_text_scalars_and_plot(tmp_path):
    report = health_report(optimizer_of(planted()))
    text = str(report)
    assert "words" in text and "saturated rows: 3, 41, 700" in text
    scalars = report.to_dict()
    assert scalars["words/saturated_rows"] == 3 and scalars["words/rows"] == 5000
    assert all(isinstance(x, (int, float)) for x in scalars.values())
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "health.png")
    assert (tmp_path / "health.png").stat().st_size > 1000


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(16)  # its buffers stand between the parameters
        self.words = nn.Embedding.from_pretrained(planted(), freeze=False)
        self.out = nn.Linear(16, 3)


def save(path, *, names, cls=Tiger):
    model = Model()
    params = model.named_parameters() if names else model.parameters()
    opt = cls(params, lr=0.01, weight_decay=DECAY)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    with torch.no_grad():
        model.words.weight.copy_(planted())
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, path)
    return model, opt


@pytest.mark.parametrize("cls", [Tiger, AdamW])
def test_a_checkpoint(tmp_path, capsys, cls):
    path = tmp_path / "checkpoint.pt"
    save(path, names=True, cls=cls)
    assert main(["health", str(path), "--json"]) == 0
    scalars = json.loads(capsys.readouterr().out)
    assert {k.partition("/")[0] for k in scalars} == {"words.weight"}
    for name, ids in EXPECTED.items():
        assert scalars[f"words.weight/{name}"] == len(ids)
    assert main(["health", str(path), "--fail-on-bad"]) == 3
    assert "saturated rows: 3, 41, 700" in capsys.readouterr().out


def test_a_safetensors_checkpoint(tmp_path, capsys):
    safetensors = pytest.importorskip("safetensors.torch")
    model, opt = save(tmp_path / "c.pt", names=True)
    state = opt.state_dict()
    tensors = {f"model.{k}": v.contiguous() for k, v in model.state_dict().items()}
    for number, values in state["state"].items():
        tensors |= {f"optimizer.state.{number}.{k}": v.clone() for k, v in values.items()}
    path = tmp_path / "c.safetensors"
    groups = json.dumps(state["param_groups"])
    safetensors.save_file(tensors, path, metadata={"param_groups": groups})
    assert main(["health", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["words.weight/saturated_rows"] == 3


def test_a_checkpoint_without_names_is_refused_where_buffers_stand_between(tmp_path, capsys):
    save(tmp_path / "c.pt", names=False)
    assert main(["health", str(tmp_path / "c.pt")]) == 2
    assert "named_parameters" in capsys.readouterr().err


def test_unreadable_checkpoints(tmp_path, capsys):
    assert main(["health", str(tmp_path / "none.pt")]) == 2
    torch.save({"model": {}}, tmp_path / "half.pt")
    assert main(["health", str(tmp_path / "half.pt")]) == 2
    assert "optimizer" in capsys.readouterr().err
    (tmp_path / "noise.pt").write_bytes(b"noise" * 100)
    assert main(["health", str(tmp_path / "noise.pt")]) == 2


@pytest.mark.parametrize("device", ["meta", "cuda"])
@pytest.mark.parametrize("shape", [(5000, 16), (50, 100, 16)], ids=str)
def test_the_default_device_and_dtype_do_not_matter(device, shape):
    opt = optimizer_of(planted().reshape(shape))
    p = opt.param_groups[0]["params"][0]
    opt.state[p]["last_step"] = torch.arange(5000, dtype=torch.int32).reshape(shape[:-1])
    expected = health_report(opt)
    try:
        torch.set_default_device(device)
        torch.set_default_dtype(torch.float64)
        report = health_report(opt)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert report.to_dict() == expected.to_dict()
    table = report.tables["words"]
    assert flags(table) == EXPECTED
    assert {getattr(table, name).device.type for name in EXPECTED} == {"cpu"}


def test_another_kind_of_optimizer_is_read_as_far_as_it_goes_or_refused():
    embedding = nn.Embedding.from_pretrained(torch.eye(60, 16), freeze=False)
    named = torch.optim.AdamW([("embedding", embedding.weight)], lr=0.01, weight_decay=DECAY)
    nameless = torch.optim.AdamW([nn.Parameter(torch.randn(60, 16))])
    with pytest.raises(ValueError, match=r"1 parameters of this torch\.optim\.adamw\.AdamW"):
        health_report(nameless)
    assert health_report(named).tables["embedding"].zero_rows.tolist() == list(range(16, 60))
    without_tables = torch.optim.AdamW([("out", nn.Parameter(torch.randn(60, 16)))])
    assert health_report(without_tables).tables == {}
    assert health_report(Tiger([nn.Parameter(torch.randn(60, 16))])).tables == {}


@pytest.mark.parametrize("wrong", [nn.Linear(2, 2), [nn.Parameter(torch.zeros(2))], None])
def test_what_is_no_optimizer_is_refused(wrong):
    with pytest.raises(TypeError, match="takes an optimizer"):
        health_report(wrong)


def test_a_report_changes_nothing():
    embedding = nn.Embedding(60, 4, sparse=True)
    idle = nn.Parameter(torch.randn(300, 2))
    opt = Tiger([*embedding.parameters(), idle], lr=torch.tensor(0.1), lazy="exact")
    embedding(torch.arange(9)).sum().backward()
    opt.step()
    embedding(torch.arange(7)).sum().backward()
    p = embedding.weight
    versions = [t._version for t in (p, p.grad, idle, *opt.state[p].values())]
    before, random = copy.deepcopy(opt.state_dict()), torch.get_rng_state()
    assert len(health_report(opt).tables) == 2
    assert versions == [t._version for t in (p, p.grad, idle, *opt.state[p].values())]
    assert torch.equal(random, torch.get_rng_state()) and idle not in opt.state
    for key, value in before["state"][0].items():
        assert torch.equal(value, opt.state_dict()["state"][0][key])
    assert before["param_groups"] == opt.state_dict()["param_groups"]


def test_names_reach_a_terminal_escaped(tmp_path):
    name = "emb\x1b[31m\u202e\udcff\n\u200b\x9b"
    report = health_report(Tiger([(name, nn.Parameter(planted(1000)))]))
    assert r"emb\x1b[31m\u202e\udcff\n\u200b\x9b" in str(report)
    assert all(c.isprintable() or c == "\n" for c in str(report))
    assert f"{name}/rows" in report.to_dict() and list(report.tables) == [name]
    assert printable("Größe 表 a b") == "Größe 表 a b"
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "health.png")
    HealthReport({"a_$_$b{": report.tables[name]}).plot(tmp_path / "health.png")


def test_a_long_name_is_cut():
    p = [nn.Parameter(planted(1000)) for _ in "ab"]
    report = health_report(Tiger([("a" * 10**6 + "_embedding", p[0]), ("embedding", p[1])]))
    assert len(str(report)) < 5000 and "_embedding" in str(report)
    assert max(map(len, report.to_dict())) > 10**6
