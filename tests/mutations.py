# SPDX-License-Identifier: Apache-2.0
"""Saved checkpoints spoilt in random ways, each told by its number."""

import copy
import io
import random
import zipfile
from typing import Any

import torch

from tiger_ext import AdamW


def checkpoint() -> dict[str, Any]:
    """Return a small checkpoint with everything that the health report looks at."""
    model = torch.nn.ModuleDict(
        {"emb": torch.nn.Embedding(20, 4, sparse=True), "out": torch.nn.Linear(4, 2)}
    )
    groups = [
        {"params": list(model["emb"].named_parameters(prefix="emb"))},
        {"params": list(model["out"].named_parameters(prefix="out")), "rows": "nonzero"},
    ]
    optimizer = AdamW(groups, lr=torch.tensor(0.01), lazy="decay", weight_decay=0.1)
    model["out"](model["emb"](torch.arange(5))).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}


def _values(r: random.Random) -> Any:
    """Return something that does not belong where it will be put."""
    table = torch.zeros(20, 4)
    itself: list[Any] = []
    itself.append(itself)
    return r.choice(
        [
            *(None, True, 0, -1, 5, 2**31, 2**63, -(2**700), 0.5, -0.0, 1e308, 1e-320, 3j),
            *(
                float("nan"),
                float("inf"),
                "",
                "x",
                "inf 0",
                "nan nan",
                "5",
                "1 9",
                "9 1 x",
                "-1 -1",
            ),
            *("\x1b[31m", "emb\udcff", "emb.weight" * 99, b"emb", bytearray(b"emb")),
            *([], [[]], [None], [[0]], [0, 0], (0, 1), ["emb.weight"], {}, {"params": 5}, {0: {}}),
            *({1, 2}, torch.Size([2]), torch.float16, torch.device("cpu"), torch.strided, itself),
            *(table, table[:7], table[0], table.T, table[0, 0], table.int(), table.bool()),
            *(table.double(), table.bfloat16(), table.to(torch.complex64), table.to("meta")),
            *(table.to_sparse(), table.to_sparse_csr(), table.expand(9, 20, 4), table[:0]),
            *(torch.zeros(1).expand(10**11, 4), torch.zeros(1, dtype=torch.int32).expand(10**11)),
            *(torch.full((20, 4), torch.nan), torch.full((20,), 2**31 - 1, dtype=torch.int32)),
            *(torch.arange(20), torch.full((20,), -(2**63)), torch.tensor(2**63 - 1)),
            *(torch.empty(10**6, 0), torch.empty(0, 10**6), table.as_strided((20, 4), (1, 1))),
            torch.zeros(8, 4, dtype=torch.uint8).view(torch.float8_e4m3fn),
            torch.zeros(8, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
            torch.view_as_complex(torch.ones(20, 2)).conj().imag,
        ]
    )


def spoil_structure(saved: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return a copy of a checkpoint with one to three of its parts replaced, left out or moved."""
    r = random.Random(seed)
    saved = copy.deepcopy(saved)
    for _ in range(r.choice([1, 1, 2, 3])):
        places: list[tuple[Any, Any]] = []
        containers, seen = [saved], set()
        for container in containers:
            if id(container) in seen:
                continue
            seen.add(id(container))
            for key in list(container) if isinstance(container, dict) else range(len(container)):
                places.append((container, key))
                if isinstance(container[key], (dict, list)):
                    containers.append(container[key])
        if not places:
            break
        container, key = r.choice(places)
        act = r.randrange(8)
        if act < 5:
            container[key] = _values(r)
        elif act == 5:
            del container[key]
        elif act == 6:
            other, there = r.choice(places)
            try:
                container[key] = other[there]
            except (KeyError, IndexError):  # left out before
                continue
        elif isinstance(container, dict):
            try:
                container[_values(r)] = container.pop(key)
            except TypeError:  # not hashable
                continue
        else:
            container.append(_values(r))
    return saved


def written(saved: Any, how: str) -> bytes:
    """Return the bytes of a file: "zip" as torch.save writes it, "deflated", or "legacy"."""
    file = io.BytesIO()
    torch.save(saved, file, _use_new_zipfile_serialization=how != "legacy")
    return deflated(file.getvalue()) if how == "deflated" else file.getvalue()


def deflated(data: bytes) -> bytes:
    """Return the same archive with compressed members."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as old,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return file.getvalue()


def spoil_bytes(data: bytes, seed: int) -> bytes:
    """Return a copy of a file with some bytes changed, cut, repeated, swapped or inserted."""
    r = random.Random(seed)
    spoilt = bytearray(data)
    for _ in range(r.choice([1, 1, 2, 4])):
        begin = r.randrange(len(spoilt) + 1)
        # Directories and pickles are few of the bytes.
        marks = [i for m in (b"PK", b"X", b"q", b"R.", b"K") if (i := spoilt.find(m, begin)) >= 0]
        if marks and r.random() < 0.6:
            begin = r.choice(marks) + r.randrange(30)
        end = min(begin + r.choice([1, 1, 2, 4, 8, 50, 1000]), len(spoilt))
        act = r.randrange(8)
        if act < 2:
            spoilt[begin:end] = r.randbytes(max(end - begin, 0))
        elif act == 2:
            for i in range(begin, end):
                spoilt[i] ^= 1 << r.randrange(8)
        elif act == 3:
            del spoilt[begin:end]
        elif act == 4:
            del spoilt[begin:]
        elif act == 5:
            spoilt[begin:begin] = spoilt[begin:end]
        elif act == 6:
            there = r.randrange(len(spoilt) + 1)
            spoilt[begin:end] = spoilt[there : there + max(end - begin, 0)]
        else:
            spoilt[begin:end] = r.choice([b"\x00", b"\xff"]) * max(end - begin, 0)
    return bytes(spoilt)
