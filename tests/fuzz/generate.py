# SPDX-License-Identifier: Apache-2.0
"""Random programs. One seed, one program."""

from __future__ import annotations

import random
from typing import Any

from fuzz.program import DEFAULTS, Code, Grad, GroupSpec, Op, Param, Program

_SHAPES = [
    *[(4, 3), (6, 2), (5, 1), (1, 4), (3, 2, 2), (7,), (2,), ()] * 4,
    *[(0, 3), (3, 0), (0,), (40, 33), (9, 65)] * 2,
    (300, 5),
]
_DTYPES = ["f32"] * 5 + ["f64", "bf16", "bf16", "f16"]
_LAYOUTS = ["contiguous"] * 4 + ["transposed", "every second"]
_NARROW = [None, None, Code("torch.float32"), Code("torch.bfloat16"), Code("torch.float16")]
# Operations and how frequent they are.
KINDS = {
    "step": 30,
    "read": 8,
    "flush": 3,
    "set": 5,
    "freeze": 4,
    "load": 3,
    "copy": 3,
    "schedule": 1,
    "toggle": 1,
    "add": 1,
    "edit": 1,
    "clear": 1,
    "health": 1,
    "close": 1,
}


class Generator:
    """Makes one program; what operations need to know of it is kept."""

    def __init__(self, seed: int, kinds: dict[str, int] = KINDS, deltas: bool = True) -> None:
        self.kinds = kinds
        self.deltas = deltas
        self.random = random.Random(seed)
        # Half of all programs have none of it.
        self.small = random.Random(f"small state {seed}")
        if self.small.random() < 0.5:
            self.small = None
        self.params: list[tuple[Param, dict[str, Any]]] = []
        self.fixed: dict[str, str] = {}  # the only kind of gradient that a parameter gets

    def program(self) -> Program:
        rng = self.random
        cls = rng.choice(["Tiger", "Tiger", "Lion", "AdamW"])
        groups = [self.group(cls) for _ in range(rng.choice([1, 1, 2, 3]))]
        kinds, weights = list(self.kinds), list(self.kinds.values())
        many = rng.choice([4, 8, 14, 25])
        ops = [self.op(rng.choices(kinds, weights)[0], cls) for _ in range(many)]
        if self.small is not None and self.deltas:
            for i in reversed(range(len(ops))):
                if self.small.random() < 0.2:
                    ops.insert(i, Op("delta"))
        return Program(cls, groups, [*ops, Op("flush")])

    def group(self, cls: str) -> GroupSpec:
        rng = self.random
        own = cls.lower()
        algorithm = rng.choice([own, own, *DEFAULTS])
        options = self.options(algorithm)
        # An option of its own algorithm that a group omits is the class's default.
        kept = {k: v for k, v in options.items() if rng.random() < 0.97 or k == "lazy"}
        if algorithm != own:
            kept = {"algorithm": algorithm, **kept}
        complete = {**DEFAULTS[algorithm], **kept}
        params = []
        for _ in range(rng.choice([1, 1, 2, 3])):
            name = "abcdefghijklmnopqrstuvwxyz"[len(self.params)]
            p = Param(name, rng.choice(_SHAPES), rng.randrange(1000))
            p.dtype, p.layout = rng.choice(_DTYPES), rng.choice(_LAYOUTS)
            if complete.get("stochastic_rounding") and self.small.random() < 0.6:
                p.dtype = self.small.choice(["bf16", "f16"])
            params.append(p)
            self.params.append((p, complete))
            judged = complete["nonfinite"] in ("skip", "shrink") or complete.get("scale")
            if complete.get("accumulation_steps", 1) > 1 and judged:
                self.fixed[name] = rng.choice(["dense", "sparse"]) if p.shape else "dense"
        return GroupSpec(params, kept)

    def options(self, algorithm: str) -> dict[str, Any]:
        rng = self.random
        sign = algorithm != "adamw"
        lazy = rng.choice(["frozen", "decay", "exact", "exact"] if sign else ["frozen", "decay"])
        first = rng.choice([0.5, 0.9, 0.965] + ([] if lazy == "exact" else [0.0]))
        betas = (first,) if algorithm == "tiger" else (first, rng.choice([0.6, 0.95, 0.99]))
        lr = rng.choice([0.01, 0.02, 0.1, 0.3])
        options: dict[str, Any] = dict(
            lazy=lazy,
            lr=Code(f"torch.tensor({lr})") if rng.random() < 0.2 else lr,
            betas=betas,
            weight_decay=rng.choice([0.0, 0.1, 0.5]),
            rows=rng.choice([None, None, None, "nonzero", "tracked"]),
            nonfinite=rng.choice(["propagate", "propagate", "skip", "shrink", "raise"]),
            shrink_ratio=rng.choice([0.99, 0.5]),
            momentum_dtype=rng.choice(_NARROW),
            maximize=rng.random() < 0.2,
        )
        if algorithm == "adamw":
            options["eps"] = rng.choice([1e-8, 1e-4])
        elif lazy != "exact" and rng.random() < 0.4:
            options["direction"] = rng.choice(["clip", "power", "atan"])
            options["direction_scale"] = rng.choice([None, 0.5, 3.0])
        if sign and lazy == "frozen" and rng.random() < 0.4:
            options["scale"] = rng.choice(["rms", "rms_rows"])
            options["rms_floor"] = rng.choice([0.0, 1e-3, 0.5])
            if options["scale"] == "rms_rows" and options["nonfinite"] in ("skip", "shrink"):
                options["nonfinite"] = "raise"
        if algorithm == "tiger" and rng.random() < 0.3:
            options["accumulation_steps"] = rng.choice([2, 3])
        if options["nonfinite"] == "shrink" and rng.random() < 0.3:
            options["shrink_to"] = 1.0
        self.small_state(algorithm, options)
        return options

    def small_state(self, algorithm: str, options: dict[str, Any]) -> None:
        """Add what stores state in few bytes, drawn apart from all else."""
        if (rng := self.small) is None:
            return
        if rng.random() < 0.35:
            options["momentum_dtype"] = Code("torch.int8")
        if rng.random() < 0.5:
            options["stochastic_rounding"] = True
        if rng.random() < 0.2:
            options["rounding_seed"] = rng.choice([0, 5, 2**63 - 1])
        if algorithm == "adamw" and rng.random() < 0.5:
            options["second_moment"] = "row"

    # -------------------------------------------------------------------------- operations

    def op(self, kind: str, cls: str) -> Op:
        rng = self.random
        name = rng.choice(self.params)[0].name
        group = rng.randrange(3)
        if kind == "step":
            return self.step()
        if kind == "read":
            ids = [rng.randrange(300) for _ in range(rng.choice([1, 2, 5]))]
            return Op("read", dict(name=name, ids=ids, training=rng.random() < 0.7))
        if kind == "set":
            return Op("set", dict(group=group, **self.setting()))
        if kind == "freeze":
            return Op("freeze", dict(name=name, frozen=rng.random() < 0.5))
        if kind == "load":
            return Op("load", dict(file=rng.random() < 0.5, bare=rng.random() < 0.4))
        if kind == "copy":
            return Op("copy", dict(pickle=rng.random() < 0.5))
        if kind == "toggle":
            return Op("toggle", dict(group=group, lazy=rng.choice(["frozen", "decay", "exact"])))
        if kind in ("edit", "clear"):
            return Op(kind, dict(name=name))
        if kind == "add" and len(self.params) < 20:
            return Op("add", dict(spec=self.group(cls)))
        return Op("flush" if kind == "add" else kind)

    def setting(self) -> dict[str, Any]:
        rng = self.random
        values: dict[str, list[Any]] = dict(
            lr=[0.005, 0.05, 0.2],
            weight_decay=[0.0, 0.05, 0.4],
            betas=[(0.8, 0.9), (0.4, 0.97), (0.95, 0.7)],
            eps=[1e-6, 1e-3],
            maximize=[True, False],
            rows=[None, "nonzero"],
            shrink_ratio=[0.9, 0.0],
            direction_scale=[0.7, 2.0],
        )
        key = rng.choice(["lr", "lr", "lr", *values])
        if self.small is not None and self.small.random() < 0.2:
            values = dict(
                momentum_dtype=[Code("torch.int8"), Code("torch.float32")],
                second_moment=["element", "row"],
                stochastic_rounding=[True, False],
            )
            key = self.small.choice([*values])
            return dict(key=key, value=self.small.choice(values[key]))
        return dict(key=key, value=rng.choice(values[key]))

    def step(self) -> Op:
        rng = self.random
        grads = {}
        for p, options in self.params:
            kind = rng.choice(["none", "dense", "dense", "sparse", "sparse", "sparse"])
            if kind != "none":
                kind = self.fixed.get(p.name, kind if p.shape else "dense")
                grads[p.name] = self.grad(kind, p, options)
        op = Op("step", {}, grads)
        luck = rng.random()
        if luck < 0.15:
            fault = rng.choice(["index", "index", "shape", "dtype", "lazy", "read"])
            op.options["fault"] = f"{fault} {rng.choice(self.params)[0].name}"
            for grad in grads.values():  # one fault at a time
                grad.options.pop("bad", None)
        elif luck < 0.27:
            op.options["amp"] = (rng.choice([1.0, 4.0, 0.5]), rng.choice([0.0, 0.0, 1.0]))
        elif luck < 0.33:
            op.options["clip"] = rng.choice([0.5, 2.0, 100.0])
        return op

    def grad(self, kind: str, p: Param, options: dict[str, Any]) -> Grad:
        rng = self.random
        out: dict[str, Any] = dict(seed=rng.randrange(1000))
        if (dtype := rng.choice([p.dtype, p.dtype, "f32"])) != "f32":
            out["dtype"] = dtype
        if kind == "sparse":
            out["dims"] = rng.choice([1, 1, 1, rng.randint(1, len(p.shape))])
            # Strided gradients by rows want rows of the first dimension in the same window.
            by_rows = options["rows"] or options.get("scale") == "rms_rows"
            if self.fixed.get(p.name) or (by_rows and options.get("accumulation_steps", 1) > 1):
                out["dims"] = 1
            out["nnz"] = rng.choice([0, 1, 2, 3, 6, 700 if len(self.params) < 4 else 9])
            if rng.random() < 0.3:
                out["coalesced"] = True
            elif rng.random() < 0.1:
                out["expanded"] = True
            if rng.random() < 0.5:
                out["below"] = 3
        else:
            if (layout := rng.choice([*_LAYOUTS, "expanded"])) != "contiguous":
                out["layout"] = layout
            if options["rows"] == "nonzero" or rng.random() < 0.2:
                out["zero_rows"] = sorted(rng.sample(range(6), rng.choice([1, 2, 4])))
        odds = 0.02 if options["nonfinite"] == "propagate" else 0.15
        if rng.random() < odds and not (
            options["nonfinite"] == "propagate" and options.get("scale")
        ):
            out["bad"] = rng.choice(["nan", "inf", "-inf"])
        return Grad(kind, out)


def generate(seed: int, without: tuple[str, ...] = ()) -> Program:
    """Return the program of a seed, ``without`` some kinds of operations."""
    kinds = {k: n for k, n in KINDS.items() if k not in without}
    return Generator(seed, kinds, deltas="delta" not in without).program()
