# SPDX-License-Identifier: Apache-2.0
"""Malformed and damaged checkpoints: one sentence and exit status 2, soon."""

import copy
import io
import json
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
from types import SimpleNamespace

import mutations
import pytest
import torch

from tiger_ext.__main__ import main
from tiger_ext.archive import load_checked
from tiger_ext.checkpoint import checkpoint_health

KINDS = ("zip", "deflated", "legacy")


@pytest.fixture(scope="module")
def saved():
    torch.manual_seed(0)
    return mutations.checkpoint()


@pytest.fixture
def health(tmp_path, capsys):
    """Return what the command says of a checkpoint: (status, its output or the sentence)."""

    def run(saved, how="zip"):
        path = tmp_path if saved is None else tmp_path / "c.pt"
        if isinstance(saved, os.PathLike):
            path = saved
        elif saved is not None:
            path.write_bytes(saved if isinstance(saved, bytes) else mutations.written(saved, how))
        with warnings.catch_warnings(record=True) as warned:
            status = main(["health", str(path)])
        assert warned == []
        out, err = capsys.readouterr()
        if status == 0:
            assert err == ""
            return status, out
        assert status == 2 and out == "" and err.count("\n") == 1
        assert err.startswith(f"{path}: ") and err[:-1].isprintable() and len(err) < 800
        return status, err.removeprefix(f"{path}: ")[:-1]

    return run


def edited(saved, edit):
    """Return a copy after ``edit`` of the checkpoint, its first group, that parameter's state."""
    saved = copy.deepcopy(saved)
    edit(saved, saved["optimizer"]["param_groups"][0], saved["optimizer"]["state"][0])
    return saved


def group(**options):
    return lambda b, g, s: g.update(options)


def state(**values):
    return lambda b, g, s: s.update(values)


def table(value):
    return lambda b, g, s: (s.clear(), b["model"].update({"emb.weight": value}))


ZEROS = torch.zeros(20, 4)
ITSELF: list = []
ITSELF.append(ITSELF)
MALFORMED = {
    "a list": (lambda b, g, s: None, "the checkpoint is a list, expected a dict with 'model'"),
    "no model": (lambda b, g, s: b.pop("model"), "the checkpoint has no 'model'"),
    "a model that is a tensor": (
        lambda b, g, s: b.update(model=ZEROS),
        "'model' of the checkpoint is a strided tensor of float32 on cpu, expected a mapping",
    ),
    "no optimizer": (lambda b, g, s: b.pop("optimizer"), "no 'optimizer', expected a mapping"),
    "no groups": (lambda b, g, s: b["optimizer"].pop("param_groups"), "has no 'param_groups'"),
    "groups in a dict": (
        lambda b, g, s: b["optimizer"].update(param_groups={}),
        "'param_groups' of its 'optimizer' is a dict, expected a list",
    ),
    "a state that is a list": (lambda b, g, s: b["optimizer"].update(state=[]), "'state' of its"),
    "a group that is a number": (
        lambda b, g, s: b["optimizer"]["param_groups"].append(7),
        "group 2 of its 'optimizer' is 7 (int), expected a dict with 'params'",
    ),
    "no params": (lambda b, g, s: g.pop("params"), "group 0 of its 'optimizer' has no 'params'"),
    "params 3": (group(params=3), "'params' of group 0 of its 'optimizer' is 3 (int)"),
    "params [[1]]": (group(params=[[1]]), "is a list, expected a number or a name"),
    "params twice": (group(params=[1]), "in 'params' of group 1 of its 'optimizer' is 1 for the"),
    "names 5": (group(param_names=5), "'param_names' of group 0 of its 'optimizer' is 5 (int)"),
    "names [[1]]": (group(param_names=[[1]]), "is a list, expected a string"),
    "too many names": (group(param_names=["a", "b"]), "has 2 names, expected 1"),
    "a name that the model lacks": (group(param_names=["a\x1b"]), r"has no tensor 'a\x1b'"),
    "a model with numbers for names": (
        lambda b, g, s: (
            [group.pop("param_names") for group in b["optimizer"]["param_groups"]],
            b["model"].update({5: b["model"].pop("emb.weight")}),
        ),
        "a name in its 'model' is 5 (int), expected a string",
    ),
    "a state 5": (
        lambda b, g, s: b["optimizer"]["state"].update({0: 5}),
        "the state of the parameter 'emb.weight' in its 'optimizer' is 5 (int), expected a dict",
    ),
    "exp_avg 5": (state(exp_avg=5), "the state exp_avg of the parameter 'emb.weight'"),
    "exp_avg of another shape": (state(exp_avg=ZEROS[:7]), "exp_avg of shape [7, 4] for the"),
    "exp_avg nested": (
        state(exp_avg=torch.nested.as_nested_tensor([ZEROS, ZEROS])),
        "expected a dense tensor",
    ),
    "last_step 5": (state(last_step=5), "is 5 (int), expected a dense tensor on the CPU"),
    "last_step sparse": (state(last_step=ZEROS[:, 0].to_sparse()), "is a sparse_coo tensor of"),
    "last_step of floats": (state(last_step=ZEROS[:, 0]), "of float32 on cpu, expected int32 or"),
    "last_step of 7 rows": (state(last_step=torch.ones(7).int()), "has 7 entries, which fit no"),
    "last_step in the future": (
        state(last_step=torch.arange(20)),
        "goes from 0 to 19, but its group has taken 1 steps: expected -2 to 1",
    ),
    "weight_decay None": (
        group(weight_decay=None),
        "'weight_decay' of group 0 of its 'optimizer' is None (NoneType), expected a finite number",
    ),
    "weight_decay nan": (group(weight_decay=float("nan")), "is nan (float), expected a finite"),
    "weight_decay inf": (group(weight_decay=float("inf")), "is inf (float), expected a finite"),
    "weight_decay -1": (group(weight_decay=-1), "is -1 (int), expected a finite number >= 0"),
    "weight_decay too large": (group(weight_decay=2**1500), "(int), expected a finite number"),
    "lr 'x'": (group(lr="x"), "'lr' of group 0 of its 'optimizer' is 'x' (str)"),
    "lr of two": (group(lr=torch.ones(2)), "'lr' of group 0 of its 'optimizer' is a strided"),
    "lr complex": (
        group(lr=torch.tensor(1j)),
        "'lr' of group 0 of its 'optimizer' is a strided tensor of complex64",
    ),
    "lr meta": (group(lr=torch.ones((), device="meta")), "float32 on meta, expected a finite"),
    "rows 5": (group(rows=5), "'rows' of group 0 of its 'optimizer' is 5 (int), expected a string"),
    "scale a tensor": (group(scale=ZEROS), "'scale' of group 0 of its 'optimizer' is a strided"),
    "history ''": (group(history=""), "'history' of group 0 of its 'optimizer' is '' (str)"),
    "history 'inf 0'": (group(history="inf 0"), "is 'inf 0' (str), expected numbers, of which"),
    "history 'nan nan'": (group(history="nan nan"), "is 'nan nan' (str), expected numbers"),
    "history '1 2'": (group(history="1 2"), "is '1 2' (str), expected numbers, of which"),
    "history '1.5 1'": (group(history="1.5 1"), "is '1.5 1' (str), expected numbers"),
    "history '3e9 0'": (group(history="3e9 0"), "is '3e9 0' (str), expected numbers"),
    "history 5": (group(history=5), "is 5 (int), expected numbers, of which"),
    "history (x, y)": (group(history=("x", "y")), "is a tuple, expected numbers"),
    "history of lists": (group(history=[[1], ITSELF]), "is a list, expected numbers"),
    "a sparse table": (table(ZEROS.to_sparse()), "the model's 'emb.weight' is a sparse_coo tensor"),
    "a compressed table": (
        table(ZEROS.to_sparse_csr()),
        "the model's 'emb.weight' is a sparse_csr",
    ),
    "a meta table": (table(ZEROS.to("meta")), "the model's 'emb.weight' is a strided tensor of"),
    "a table that is none": (table([1]), "its 'model' has no tensor 'emb.weight'"),
    "a table of half bytes": (
        table(torch.zeros(20, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)),
        "float4_e2m1fn_x2 on cpu, expected a type that converts to float32",
    ),
    "an expanded table": (
        table(torch.zeros(1).expand(10**11, 4)),
        "has shape [100000000000, 4] and strides [0, 0], with which the parameters read",
    ),
    "an expanded last_step": (
        state(last_step=torch.zeros(1, dtype=torch.int32).expand(10**11)),
        "the state last_step of the parameter 'emb.weight' in its 'optimizer' has shape [100",
    ),
    "overlapping rows": (
        table(torch.zeros(40).as_strided((20, 4), (1, 1))),
        "has shape [20, 4] and strides [1, 1], with which the parameters read 320 bytes of the 160",
    ),
    "a table under two names": (
        lambda b, g, s: (
            b["model"].update({"again": b["model"]["emb.weight"]}),
            g.update(params=[0, 9], param_names=["emb.weight", "again"]),
        ),
        "with which the parameters read 640 bytes of the 320 that are there",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_malformed_is_named(health, saved, name):
    edit, sentence = MALFORMED[name]
    spoilt = [1] if name == "a list" else edited(saved, edit)
    assert sentence in health(spoilt)[1]
    if "nested" not in name:
        assert sentence in health(spoilt, "deflated")[1]


@pytest.mark.filterwarnings("ignore")
def test_quantized_tables_are_refused(health, saved):
    quantized = torch.quantize_per_tensor(ZEROS, 0.1, 0, torch.quint8)
    spoilt = mutations.written(edited(saved, table(quantized)), "zip")
    assert "expected a dense tensor" in health(spoilt)[1]


@pytest.mark.parametrize(
    "edit",
    [
        lambda b, g, s: b.update(sparse=ZEROS.to_sparse(), itself=ITSELF, meta=ZEROS.to("meta")),
        lambda b, g, s: b["model"].update(mask=torch.zeros(1).expand(10**11)),
        lambda b, g, s: b["optimizer"]["state"].update({"more": 5, 7: None}),
        lambda b, g, s: (s.update(note=3, steps_missed=[1]), g.update(name=ZEROS)),
        lambda b, g, s: g.update(history=tuple(map(float, g["history"].split()))),
        lambda b, g, s: (g.pop("history"), s.update(last_step=torch.arange(20))),
        lambda b, g, s: (g.pop("lr"), g.pop("weight_decay")),
        lambda b, g, s: (g.update(lr=torch.tensor([0.1])), s.pop("exp_avg")),
        lambda b, g, s: b["optimizer"]["state"].clear(),
        lambda b, g, s: b["model"].update({"emb.weight": torch.zeros(4, 20).T}),
        lambda b, g, s: (
            g.pop("param_names"),
            b["optimizer"]["param_groups"][1].pop("param_names"),
        ),
    ],
)
def test_what_does_no_harm_is_read(health, saved, edit):
    status, out = health(edited(saved, edit))
    assert status == 0 and "emb.weight  " in out


def test_numbers_too_large_for_floats(health, saved, tmp_path, capsys):
    huge = torch.empty(0).as_strided((0,) + (2**62,) * 18, (1,) * 19)
    assert str(2**1116) in health(edited(saved, table(huge)))[1]
    assert main(["health", str(tmp_path / "c.pt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["emb.weight/dim"] == 2**1116


def test_names_are_escaped_and_json_keeps_them(health, saved, tmp_path, capsys):
    name = "emb\x1b]0;x\x07\u202e\udcff"
    spoilt = edited(saved, group(param_names=[name]))
    spoilt["model"][name] = spoilt["model"].pop("emb.weight")
    assert r"emb\x1b]0;x\x07\u202e\udcff" in health(spoilt)[1]
    assert main(["health", str(tmp_path / "c.pt"), "--json"]) == 0
    assert f"{name}/rows" in json.loads(capsys.readouterr().out)
    del spoilt["model"][name]
    assert r"has no tensor 'emb\x1b]0;x\x07\u202e\udcff'" in health(spoilt)[1]


def test_other_terminals_than_utf8(saved, tmp_path, run_python):
    torch.save(saved, tmp_path / "c.pt")
    program = f"""
import runpy, sys
sys.argv = ["tiger_ext", "health", {str(tmp_path / "c.pt")!r}]
runpy.run_module("tiger_ext", run_name="__main__")
"""
    result = run_python(program, PYTHONIOENCODING="ascii")
    assert result.stderr == "" and "emb.weight" in result.stdout


# --------------------------------------------------------------------------------------- files


def test_what_is_no_file_of_torch_is_said(health, tmp_path, monkeypatch):
    assert "No such file" in health(tmp_path / "missing.pt")[1]
    assert health(None)[1] == "is a directory, expected a file"
    assert health(b"")[1] == "is empty, expected what torch.save writes"
    assert "no file of torch.save" in health(b"noise" * 100)[1]
    assert "damaged zip archive" in health(b"PK\x03\x04" + b"noise" * 100)[1]
    os.mkfifo(tmp_path / "pipe")
    assert health(tmp_path / "pipe")[1] == "is a pipe or device, expected a file"
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("storages"))
    assert "no file of torch.save" in health(file.getvalue())[1]

    def closed(path, mode):
        raise PermissionError(13, "Permission denied", path)

    # Root may read anything.
    monkeypatch.setattr("tiger_ext.archive.open", closed, raising=False)
    assert "PermissionError: [Errno 13] Permission denied" in health(b"any")[1]


def test_what_weights_only_refuses_is_said(health, tmp_path):
    sentence = health({"model": SimpleNamespace()})[1]
    assert sentence == (
        "cannot be read: it holds a types.SimpleNamespace, which "
        "torch.load(weights_only=True) refuses"
    )
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "scripted.pt")
    status, sentence = health(tmp_path / "scripted.pt")
    assert status == 2


def test_safetensors_files(health, saved, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "c.safetensors"

    def sentence(tensors, groups):
        metadata = {} if groups is None else {"param_groups": groups}
        safetensors.save_file(tensors, path, metadata=metadata)
        return health(path)[1]

    good = {"model.emb.weight": ZEROS}
    assert "no tensor in it is called 'model.<name>'" in sentence({"emb": ZEROS}, "[]")
    assert "no 'param_groups'" in sentence(good, None)
    assert "are no JSON" in sentence(good, "[")
    assert "are no JSON" in sentence(good, "[" * 10**6)
    assert "'param_groups' of its 'optimizer' is a dict" in sentence(good, "{}")
    assert "expected a number" in sentence({**good, "optimizer.state.x.exp_avg": ZEROS + 1}, "[]")
    path.write_bytes(path.read_bytes()[:-9])
    assert "cannot be read" in health(path)[1]
    path.unlink()
    os.mkfifo(path)
    assert "is a pipe or device" in health(path)[1]


# ------------------------------------------------------------------------------------ archives


def packed(members, how=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def members_of(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def directory_entry(data, name):
    """Return where the directory's entry of a member is, and where its header."""
    at = data.rindex(name.encode()) - 46
    assert data[at : at + 4] == b"PK\x01\x02"
    return at, struct.unpack_from("<I", data, at + 42)[0]


def test_compressed_and_older_files_give_the_same_report(health, saved):
    expected = health(saved)
    assert expected[0] == 0
    assert health(saved, "deflated") == expected
    assert health(saved, "legacy") == expected
    half = members_of(mutations.written(saved, "zip"))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for i, (name, data) in enumerate(half.items()):
            archive.writestr(name, data, zipfile.ZIP_DEFLATED if i % 2 else zipfile.ZIP_STORED)
    assert health(file.getvalue()) == expected
    try:
        torch.serialization.set_crc32_options(False)
        assert health(saved) == expected
    finally:
        torch.serialization.set_crc32_options(True)


def test_only_what_is_not_compressed_is_mapped(saved, tmp_path, monkeypatch):
    seen = []
    load = torch.load
    monkeypatch.setattr(
        torch, "load", lambda *a, **options: seen.append(options["mmap"]) or load(*a, **options)
    )
    for how in KINDS:
        (tmp_path / "c.pt").write_bytes(mutations.written(saved, how))
        assert torch.equal(
            load_checked(str(tmp_path / "c.pt"))["model"]["emb.weight"],
            saved["model"]["emb.weight"],
        )
    assert seen == [True, False, False]


def test_whatever_torch_saves_passes_the_check(tmp_path):
    many = {
        **{"bytes": b"a\xff", "array": bytearray(b"a\xff"), "set": {1, 2}, "complex": 1j},
        **{"dtype": torch.float16, "device": torch.device("cpu"), "size": torch.Size([3])},
        **{"sparse": ZEROS.to_sparse(), "csr": ZEROS.to_sparse_csr(), "empty": torch.empty(0)},
        **{"parameter": torch.nn.Parameter(ZEROS), "expanded": ZEROS[0].expand(99, 4)},
        **{"long": 2**300, "view": ZEROS[3:, 1], "meta": ZEROS.to("meta"), "bool": ZEROS.bool()},
        **{"float8": ZEROS.to(torch.float8_e4m3fn), "uint16": torch.ones(3, dtype=torch.uint16)},
        "conjugate": torch.view_as_complex(torch.ones(3, 2)).conj(),
    }
    many["parameter"].note = "attributes are saved, too"
    torch.save(many, tmp_path / "many.pt")
    assert list(load_checked(str(tmp_path / "many.pt"))) == list(many)


def test_tensor_data_that_were_cut_are_refused(health, saved):
    members = members_of(mutations.written(saved, "zip"))
    cut = {name: data[:8] if "/data/" in name else data for name, data in members.items()}
    for how in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        sentence = health(packed(cut, how))[1]
        assert sentence == (
            "is damaged: its member 'archive/data/0' has 8 bytes, expected the 320 of a tensor"
        )
    missing = {name: data for name, data in members.items() if "/data/0" not in name}
    assert "has no member 'archive/data/0', in which 320 bytes" in health(packed(missing))[1]


@pytest.mark.parametrize("how", KINDS)
def test_truncated_files_are_refused(health, saved, how):
    data = mutations.written(saved, how)
    for length in (1, 3, 4, 60, len(data) // 4, len(data) // 2, len(data) - 30, len(data) - 1):
        assert health(data[:length])[0] == 2
    assert health(data)[0] == 0


def test_a_directory_that_is_wrong_is_refused(health, saved):
    data = mutations.written(saved, "zip")
    first, at_first = directory_entry(data, "archive/data/0")
    second, at_second = directory_entry(data, "archive/data/1")

    def with_field(entry, offset, form, value):
        spoilt = bytearray(data)
        struct.pack_into(form, spoilt, entry + offset, value)
        return health(bytes(spoilt))[1]

    # Members that share their bytes, or have none.
    assert "is to begin at byte" in with_field(second, 42, "<I", at_first)
    assert "there is no header of its member" in with_field(second, 42, "<I", at_second + 1)
    # Sizes, in the directory only: read mapped, the table would go on in what follows.
    assert "is stored in 16 bytes, but is to have 320" in with_field(first, 20, "<I", 16)
    spoilt = bytearray(data)
    for entry in (first, second):
        struct.pack_into("<II", spoilt, entry + 20, 100_000, 100_000)
    assert "is damaged" in health(bytes(spoilt))[1]
    assert "compressed by method 8" not in with_field(first, 10, "<H", 8)
    assert "compressed by method 12" in with_field(first, 10, "<H", 12)
    assert "is encrypted" in with_field(first, 8, "<H", 1)
    # The directory says "2" where the header says "1".
    renamed = data[: second + 46] + b"archive/data/x" + data[second + 46 + 14 :]
    assert "where the file has b'archive/data/1" in health(renamed)[1]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_of_one_name_are_refused(health, saved):
    members = members_of(mutations.written(saved, "zip"))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in [*members.items(), ("archive/DATA/0", bytes(320))]:
            archive.writestr(name, data)
    assert health(file.getvalue())[1] == "is damaged: it has two members 'archive/DATA/0'"


def test_compressed_data_are_compared_with_their_checksum(health, saved):
    data = bytearray(mutations.written(saved, "deflated"))
    entry, header = directory_entry(bytes(data), "archive/data/0")
    for place in (entry + 16, header + 14):
        data[place] ^= 1
    assert "Bad CRC-32 for file 'archive/data/0'" in health(bytes(data))[1]


def test_older_files_with_other_data_are_refused(health, saved):
    data = mutations.written(saved, "legacy")
    assert "expected" in health(data + b"more")[1]
    at = data.rindex(struct.pack("<q", 80) + saved["model"]["emb.weight"].numpy().tobytes())
    spoilt = data[:at] + struct.pack("<q", 79) + data[at + 8 :]
    assert "announces 79 elements, expected 80" in health(spoilt)[1]


# ------------------------------------------------------------------- what would take for ever


def number(value):
    return pickle.dumps(value, 2)[2:-1]


def with_pickle(body, **members):
    names = {"a/data.pkl": b"\x80\x02" + body + b".", "a/version": b"3"}
    return names | {f"a/data/{key}": data for key, data in members.items()}


def call(module, name, *args):
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(args) + b"tR"


EXPANDED = call(
    "torch._utils",
    "_rebuild_tensor_v2",
    b"(" + number("storage") + b"ctorch\nLongStorage\n" + number("0") + number("cpu") + b"K\x01tQ",
    number(0),
    b"(" + number(1) + number(10**11) + b"t",
    b"(" + number(0) + number(0) + b"t",
    b"\x89",
    b"}",
)
HOSTILE = {
    "an array of 10**12": with_pickle(call("__builtin__", "bytearray", number(10**12))),
    "the same in disguise": with_pickle(
        call(
            "torch._tensor",
            "_rebuild_from_type_v2",
            b"c__builtin__\nbytearray\n",
            b"c__builtin__\nset\n",
            b"(" + number(10**12) + b"t",
            b"}",
        )
    ),
    "a tensor of 10**12": with_pickle(call("torch", "Tensor", number(10**12))),
    "one without reading it": with_pickle(
        call("torch", "FloatTensor", call("torch", "Size", b"(" + number(10**12) + b"t"))
    ),
    "sets of a set": with_pickle(
        b"]q\x00(" + number(7) * 5000 + b"e(" + call("__builtin__", "set", b"h\x00") * 5000 + b"l"
    ),
    "a sparse tensor with an index that repeats": with_pickle(
        call(
            "torch._utils",
            "_rebuild_sparse_tensor",
            call("torch.serialization", "_get_layout", number("torch.sparse_coo")),
            b"(" + EXPANDED + EXPANDED + b"(" + number(9) + b"t\x89t",
        ),
        **{"0": bytes(8)},
    ),
    "idna": with_pickle(call("_codecs", "encode", number("é" * 10**6), number("idna"))),
    "an array by its opcode": with_pickle(b"\x96" + struct.pack("<Q", 2**36)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_pickles_that_ask_for_anything_are_refused(health, name, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *a, **o: pytest.fail("it came to torch.load"))
    sentence = health(packed(HOSTILE[name]))[1]
    if name == "an array by its opcode":
        assert sentence == "is damaged: its pickle has opcodes that torch.load does not take"
    else:
        assert sentence.startswith("is refused: its pickle calls '")


def test_the_number_of_a_memo_takes_no_memory(health):
    # 64 GiB in CPython's unpickler
    assert "is a list, expected a dict" in health(packed(with_pickle(b"]r\xff\xff\xff\xff")))[1]


def test_a_pickle_that_deflates_to_nothing_is_refused(health):
    body = b"](" + b"}" * (1 << 25) + b"e"
    assert "unpacks to 33554" in health(packed(with_pickle(body), zipfile.ZIP_DEFLATED))[1]


def test_more_tensors_than_memory_are_refused(health, saved, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 16)
    assert "unpack to 1" in health(saved, "deflated")[1]
    assert health(saved)[0] == 0


def test_deep_nesting_is_read(health):
    nested = with_pickle(b"]" * 10**5 + b"a" * (10**5 - 1))
    assert "is a list, expected a dict" in health(packed(nested))[1]


def test_long_histories_are_not_parsed(health, saved, monkeypatch):
    from tiger_ext import checkpoint

    long = edited(saved, lambda b, g, s: g.update(history=g["history"] + " 0" * 5_000_000))
    seen = []
    report_on = checkpoint.report_on
    monkeypatch.setattr(
        checkpoint, "report_on", lambda tables: seen.extend(tables) or report_on(tables)
    )
    assert health(long) == health(saved)
    assert [t.group["history"] for t in seen[:1]] == ["1 0"]


@pytest.mark.parametrize("what", ["table", "last_step"])
def test_a_tensor_of_100_billion_rows_ends(saved, tmp_path, run_python, what):
    """In a process of its own, which ends."""
    endless = torch.zeros(1, dtype=torch.int32).expand(10**11)
    edit = table(torch.zeros(1).expand(10**11, 4))
    torch.save(
        edited(saved, edit if what == "table" else state(last_step=endless)), tmp_path / "c.pt"
    )
    assert (tmp_path / "c.pt").stat().st_size < 10_000
    program = f"""
import resource, signal
signal.alarm(100)
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
from tiger_ext.__main__ import main
assert main(["health", {str(tmp_path / "c.pt")!r}]) == 2
"""
    assert "share no elements" in run_python(program).stderr


# ------------------------------------------------------------------ other protocols, no memory


def saved_with(saved, path, protocol, zipped):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(saved, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", range(6))
def test_pickle_protocols_are_read_or_named(health, saved, tmp_path, protocol, zipped):
    path = saved_with(saved, tmp_path / "other.pt", protocol, zipped)
    status, text = health(path)
    if protocol in (2, 3):  # which torch.load reads
        assert (status, text) == health(saved)
    elif protocol > 3:
        assert text.startswith(f"cannot be read: it was saved with pickle_protocol={protocol}, ")
        assert text.endswith("save it anew with torch.save's own, 2")
    else:
        assert text.startswith("is damaged, or was saved with pickle_protocol=0 or 1: its pickle")


def test_a_lack_of_memory_is_passed_on(saved, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise MemoryError("none left")

    path = tmp_path / "c.pt"
    path.write_bytes(mutations.written(saved, "zip"))
    for owner, name in ((torch, "load"), (pickle._Unpickler, "load")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(MemoryError, match="none left"):
                checkpoint_health(path)
    assert "emb.weight" in checkpoint_health(path).tables


def test_a_length_in_an_old_pickle_takes_no_memory(saved, tmp_path, run_python):
    data = mutations.written(saved, "legacy")
    (tmp_path / "c.pt").write_bytes(data[:15] + b"X\xff\xff\xff\xff" + data[15:])
    program = f"""
import resource
from tiger_ext.__main__ import main
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), used + (1 << 30)))
assert main(["health", {str(tmp_path / "c.pt")!r}]) == 2
"""
    assert "is damaged" in run_python(program).stderr


# -------------------------------------------------------------------------------------- by chance


@pytest.mark.parametrize("how", KINDS)
def test_files_with_bytes_changed_at_random(health, saved, how):
    data = mutations.written(saved, how)
    results = [health(mutations.spoil_bytes(data, seed))[0] for seed in range(150)]
    assert {0, 2} == set(results)


@pytest.mark.parametrize("how", ["zip", "legacy"])
def test_checkpoints_with_parts_changed_at_random(health, saved, how):
    results = []
    for seed in range(250):
        try:
            data = mutations.written(mutations.spoil_structure(saved, seed), how)
        except Exception:  # it cannot be saved in that format
            assert how == "legacy"
            continue
        results.append(health(data)[0])
    assert {0, 2} == set(results) and len(results) > 150
