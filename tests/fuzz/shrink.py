# SPDX-License-Identifier: Apache-2.0
"""Makes a failing program smaller while it fails in the same way."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

from fuzz.program import Op, Param, Program

Fails = Callable[[Program], bool]


def shrink_list(items: list[str], fails: Callable[[list[str]], bool], end: float) -> list[str]:
    """Return the items without those that the failure does not need; ``end``: when to stop."""
    size = len(items)
    while size >= 1:
        start = 0
        while start < len(items) and time.monotonic() < end:
            rest = items[:start] + items[start + size :]
            if fails(rest):
                items = rest
            else:
                start += size
        size //= 2
    return items


def shrink(program: Program, fails: Fails, seconds: float) -> Program:
    """Return a program that ``fails`` and of which no tried part can be taken away.

    Args:
        program: fails.
        fails: whether a program fails in the way that is looked for.
        seconds: when to stop with what there is.
    """
    end = time.monotonic() + seconds
    for name in _names(program):  # one parameter is most often enough
        if fails(smaller := _without(program, [n for n in _names(program) if n != name])):
            program = smaller
            break
    going = True
    while going:
        going = False
        for smaller in _smaller(program):
            if time.monotonic() > end:
                return program
            if fails(smaller):
                program, going = smaller, True
                break
    return program


def _smaller(program: Program) -> Iterator[Program]:
    """Yield smaller programs, what takes away most first."""
    count = len(program.ops)
    size = count
    while size >= 1:
        for start in range(0, count, size):
            yield _changed(program, lambda p, a=start, n=size: p.ops.__delitem__(slice(a, a + n)))
        size //= 2
    for i in range(len(program.groups)):
        if len(program.groups) > 1:
            yield _without_group(program, i)
    for name in _names(program):
        if len(_names(program)) > 1:
            yield _without(program, [name])
    for i, op in enumerate(program.ops):
        for name in op.grads:
            yield _changed(program, lambda p, i=i, n=name: p.ops[i].grads.pop(n))
        for key in ("fault", "amp", "clip"):
            if key in op.options:
                yield _changed(program, lambda p, i=i, k=key: p.ops[i].options.pop(k))
    for i, op in enumerate(program.ops):
        for name, grad in op.grads.items():
            for key in grad.options:
                if key != "seed":
                    yield _changed(
                        program, lambda p, i=i, n=name, k=key: p.ops[i].grads[n].options.pop(k)
                    )
            yield from _fewer_entries(program, i, name)
    for i, group in enumerate(_groups(program)):
        for key in group.options:
            if key not in ("algorithm", "lr", "weight_decay", "betas"):
                yield _changed(program, lambda p, i=i, k=key: _groups(p)[i].options.pop(k))
    for name in _names(program):
        yield from _simpler_parameter(program, name)


def _changed(program: Program, change: Callable[[Program], Any]) -> Program:
    smaller = copy.deepcopy(program)
    change(smaller)
    return smaller


def _groups(program: Program) -> list[Any]:
    return [*program.groups, *(op.options["spec"] for op in program.ops if op.kind == "add")]


def _names(program: Program) -> list[str]:
    return [p.name for group in _groups(program) for p in group.params]


def _without(program: Program, names: list[str]) -> Program:
    smaller = copy.deepcopy(program)
    for group in _groups(smaller):
        group.params = [p for p in group.params if p.name not in names]
    for op in smaller.ops:
        for name in names:
            op.grads.pop(name, None)
    for i in reversed(range(len(smaller.groups))):
        if not smaller.groups[i].params:
            smaller = _without_group(smaller, i)
    return smaller


def _without_group(program: Program, i: int) -> Program:
    """Take a group away; operations name the others by their new numbers."""
    smaller = copy.deepcopy(program)
    del smaller.groups[i]
    ops: list[Op] = []
    for op in smaller.ops:
        number = op.options.get("group")
        if number == i:
            continue
        if number is not None and number > i:
            op.options["group"] = number - 1
        ops.append(op)
    smaller.ops = ops
    return smaller


def _fewer_entries(program: Program, i: int, name: str) -> Iterator[Program]:
    options = program.ops[i].grads[name].options
    for nnz in (0, 1, 2):
        if options.get("nnz", 0) > nnz:
            yield _changed(
                program,
                lambda p, n=nnz: p.ops[i].grads[name].options.__setitem__("nnz", n),
            )


def _simpler_parameter(program: Program, name: str) -> Iterator[Program]:
    def find(p: Program) -> Param:
        return next(q for g in _groups(p) for q in g.params if q.name == name)

    old = find(program)
    simpler: list[tuple[str, Any]] = []
    if old.layout != "contiguous":
        simpler.append(("layout", "contiguous"))
    if old.dtype != "f32":
        simpler.append(("dtype", "f32"))
    for d, n in enumerate(old.shape):
        simpler += [("shape", (*old.shape[:d], m, *old.shape[d + 1 :])) for m in (1, 2, 3) if m < n]
    for attribute, value in simpler:
        yield _changed(program, lambda p, a=attribute, v=value: setattr(find(p), a, v))
