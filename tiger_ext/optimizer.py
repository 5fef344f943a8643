# SPDX-License-Identifier: Apache-2.0
"""The engine behind Tiger, Lion and AdamW.

One class does everything that does not depend on the algorithm: validation, state, the road of a
gradient to the kernels, state dicts. A step goes

    step() -> _step_eager(): every group is added to one native Step (csrc/eager.cpp), which checks
              and allocates -> prepare() sorts the rows -> apply() writes.

Parameters that no native kernel can take run on ``tiger_ext.reference`` in the same step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from tiger_ext import _native, reference
from tiger_ext.history import History
from tiger_ext.options import (
    ALGORITHMS,
    DIRECTION_SCALES,
    algorithm_of,
    check_lazy,
    check_option,
    complete_group,
)
from tiger_ext.tracking import TrackingHandle, UsedRows

__all__ = ["MixedOptimizer"]

_Groups = list[tuple[int, dict[str, Any]]]  # with their indices
_INT32 = torch.int32
_MOMENTS = ("exp_avg", "exp_avg_sq")
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Part:
    """What a step does with a group: all of it, or of an accumulation window one of two parts.

    In a window, every micro-step *adds* its gradient to the momentum, and the last one then *moves*
    the parameters: the rows that any of the window's micro-steps touched.
    """

    adds: bool = True
    moves: bool = True
    window: int = 0  # counted from 1; 0: no accumulation
    micro_steps: int = 1


@dataclass
class _ReferenceUpdate:
    """One parameter's share of a step on the reference; checked, not yet written."""

    param: Tensor
    grad: Tensor | None
    state: dict[str, Any]
    group: dict[str, Any]
    part: _Part
    mask: Tensor | None

    def check(self) -> None:
        """Check parameter and gradient; the state may still be missing."""
        p, g = self.param, self.grad
        if p.layout != torch.strided:
            raise RuntimeError(f"the parameter has layout {p.layout}, expected torch.strided")
        if g is None:
            return
        if p.dtype not in _FLOATS or g.dtype not in _FLOATS:
            raise RuntimeError(
                f"the parameter has dtype {p.dtype} and the gradient {g.dtype}, expected one of "
                "float32, float64, bfloat16, float16"
            )
        if g.layout not in (torch.strided, torch.sparse_coo):
            raise RuntimeError(
                f"the gradient has layout {g.layout}, expected torch.strided or torch.sparse_coo"
            )
        if g.device != p.device or g.shape != p.shape:
            raise RuntimeError(
                f"the gradient has shape {list(g.shape)} on device {g.device}, the parameter has "
                f"shape {list(p.shape)} on device {p.device}"
            )
        if g.layout == torch.sparse_coo and g.device.type != "meta":
            reference.check_indices(g._indices(), p.shape)

    def check_state(self) -> None:
        """Check that the state fits the parameter, and the gradient's values if they matter."""
        p = self.param
        for name, s in self.state.items():
            if name in _MOMENTS and s.shape != p.shape:
                raise RuntimeError(
                    f"the state {name} has shape {list(s.shape)}, the parameter has shape "
                    f"{list(p.shape)}"
                )
        if self.grad is not None and self.group["nonfinite"] == "raise" and not p.is_meta:
            grad = self._units()[1]
            if not bool(torch.isfinite(grad).all()):
                raise FloatingPointError("the gradient has a NaN or Inf")

    def apply(self, grad_scale: float) -> None:
        where, grad = self._units()
        group, state, part = self.group, self.state, self.part
        if part.adds and _is_lazy(group):
            _catch_up_on_reference(self.param, state, group, state["last_step"], where)
        param = self._read(self.param, where)
        decays = torch.ones((param.shape[0],), dtype=torch.bool, device=param.device)
        if part.window:
            in_window = self._read(state["window"], where).reshape(-1) == part.window
            decays = ~in_window
            if not part.adds:  # all rows for which the window is open
                where = self._select(where, in_window)
                param, decays = param[in_window], decays[in_window]
                grad = torch.zeros_like(param)
        if part.adds and group["nonfinite"] in ("skip", "shrink"):
            finite = reference.per_unit(torch.isfinite(grad)).all(1)
            if group["nonfinite"] == "shrink":
                shrunk = reference.shrink(
                    param[~finite], ratio=group["shrink_ratio"], to=group.get("shrink_to", 0.0)
                )
                self._write(self.param, self._select(where, ~finite), shrunk)
            if where is None and not bool(finite):
                return
            where = self._select(where, finite)
            param, grad, decays = param[finite], grad[finite], decays[finite]
        if "step" in state:
            state["step"] += 1
        if part.window and part.adds:
            self._write(state["window"], where, torch.full_like(decays, part.window, dtype=_INT32))
        self._update(where, param, grad / grad_scale, decays)
        if _is_lazy(group):
            now = _history(group).steps + (1 if part.moves else 0)
            state["last_step"][... if where is None else where] = now

    def _update(self, where: Any, param: Tensor, grad: Tensor, decays: Tensor) -> None:
        group, state, part = self.group, self.state, self.part
        if group["maximize"]:
            grad = -grad
        args = dict(lr=_learning_rate(group), weight_decay=group["weight_decay"])
        betas = group["betas"]
        new: dict[str, Tensor | None] = {}
        if group["algorithm"] == "adamw":
            new_param, new["exp_avg"], new["exp_avg_sq"] = reference.adamw(
                param,
                grad,
                self._read(state["exp_avg"], where) if betas[0] > 0 else None,
                self._read(state["exp_avg_sq"], where),
                int(state["step"]),
                beta1=betas[0],
                beta2=betas[1],
                eps=group["eps"],
                **args,
            )
        else:
            beta1: float | Tensor = betas[0]
            beta2: float | Tensor = betas[-1]
            if part.window:
                each = decays.reshape(-1, *[1] * (param.dim() - 1))
                beta1 = beta2 = torch.ones_like(each, dtype=param.dtype).masked_fill(each, betas[0])
            new_param, new["exp_avg"] = reference.sign_momentum(
                param,
                grad,
                self._read(state["exp_avg"], where),
                beta1=beta1,
                beta2=beta2,
                weight1=(1 - betas[0]) / part.micro_steps,
                weight2=(1 - betas[-1]) / part.micro_steps,
                kind=group["direction"],
                kappa=_direction_scale(group),
                rms_floor=None if group["scale"] is None else group["rms_floor"],
                **args,
            )
        if part.moves:
            self._write(self.param, where, new_param)
        for name, value in new.items():
            if value is not None:
                self._write(state[name], where, value)

    # A parameter is updated in units: its touched rows, or the whole of it as the only one.

    def _units(self) -> tuple[tuple[Tensor, ...] | None, Tensor]:
        """Return where the units are (None: the whole) and their gradients ``[units, ...]``."""
        p, g = self.param, self.grad
        dtype = reference.arithmetic_dtype(p)
        window = self.state.get("window")
        row_dims = 0 if window is None else window.dim()
        if g is not None and g.layout == torch.sparse_coo:
            rows, sums = reference.sum_duplicates(g._indices(), g._values(), p.shape, dtype)
            return tuple(rows), sums
        if g is None:
            g = torch.zeros((), dtype=dtype, device=p.device).expand(p.shape)
            touched = torch.ones(p.shape[:row_dims], dtype=torch.bool, device=p.device)
        elif _is_row_lazy(p, self.group):
            row_dims = max(row_dims, 1)
            if self.mask is not None:
                touched = self.mask.bool()
            else:
                touched = reference.per_unit(g != 0).any(1)
            if row_dims > 1:
                touched = touched.reshape(-1, *[1] * (row_dims - 1)).expand(p.shape[:row_dims])
        else:
            if self.group.get("scale") == "rms_rows" and p.dim() > 0:
                row_dims = max(row_dims, 1)
            touched = torch.ones(p.shape[:row_dims], dtype=torch.bool, device=p.device)
        if row_dims == 0:
            return None, g.to(dtype).unsqueeze(0)
        where = touched.nonzero(as_tuple=True)
        return where, g[where].to(dtype)

    def _read(self, tensor: Tensor, where: tuple[Tensor, ...] | None) -> Tensor:
        units = tensor.unsqueeze(0) if where is None else tensor[where]
        return (
            units.to(reference.arithmetic_dtype(self.param)) if units.is_floating_point() else units
        )

    @staticmethod
    def _write(tensor: Tensor, where: tuple[Tensor, ...] | None, units: Tensor) -> None:
        if where is not None:
            tensor[where] = units.to(tensor.dtype)
        elif len(units):
            tensor.copy_(units[0])

    @staticmethod
    def _select(where: tuple[Tensor, ...] | None, chosen: Tensor) -> tuple[Tensor, ...] | None:
        return None if where is None else tuple(index[chosen] for index in where)


def _history(group: dict[str, Any]) -> History:
    """Return the history of a group in a lazy mode; it begins when it is first asked for."""
    history: History = group.setdefault("history", History())
    return history


def _catch_up_on_reference(
    p: Tensor,
    state: Mapping[str, Any],
    group: dict[str, Any],
    last_step: Tensor,
    where: tuple[Tensor, ...] | None,
) -> None:
    """Bring rows, all or those at ``where``, up to date with the group's steps so far."""
    history = _history(group)
    since = torch.where(last_step < 0, -1 - last_step, last_step)
    behind = since < history.steps
    if where is not None:
        chosen = torch.zeros_like(behind)
        chosen[where] = True
        behind &= chosen
    rows = behind.nonzero(as_tuple=True) if behind.dim() else (behind.reshape(1).nonzero()[:, 0],)
    if len(rows[0]) == 0:
        return
    if behind.dim() == 0:  # the whole parameter is one row
        p, last_step, since = p.unsqueeze(0), last_step.reshape(1), since.reshape(1)
    names = [name for name in _MOMENTS if name in state]
    stored = [state[name].unsqueeze(0) if behind.dim() == 0 else state[name] for name in names]
    arithmetic = reference.arithmetic_dtype(p)
    missed = history.missed(since[rows].long())
    each = (-1, *[1] * (p.dim() - len(rows)))
    betas = dict(zip(_MOMENTS, missed.betas, strict=True))
    if group["algorithm"] != "adamw":
        betas["exp_avg"] = missed.betas[1]
    param, moments = reference.catch_up(
        p[rows].to(arithmetic),
        [s[rows].to(arithmetic) for s in stored],
        decay=missed.decay.to(arithmetic).reshape(each),
        drift=missed.drift.to(arithmetic).reshape(each) if group["lazy"] == "exact" else None,
        factors=[betas[name].reshape(each) for name in names],
        floors=[reference.smallest(s.dtype, arithmetic) for s in stored],
    )
    p[rows] = param.to(p.dtype)
    for s, moment in zip(stored, moments, strict=True):
        s[rows] = moment.to(s.dtype)
    now = history.steps
    last_step[rows] = torch.where(last_step[rows] < 0, -1 - now, now).to(last_step.dtype)


def _is_row_lazy(p: Tensor, group: Mapping[str, Any]) -> bool:
    """Return whether a strided gradient of ``p`` updates only the rows it touches."""
    return group["rows"] is not None and p.dim() >= 2


def _direction_scale(group: Mapping[str, Any]) -> float:
    scale = group["direction_scale"]
    return DIRECTION_SCALES[group["direction"]] if scale is None else scale


def _learning_rate(group: Mapping[str, Any]) -> float | Tensor:
    """Return the group's lr as a float, or as it is where reading it would synchronise."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.device.type == "cpu":
        return float(lr)
    return lr


class MixedOptimizer(torch.optim.Optimizer):
    """Base of Tiger, Lion and AdamW; a group may name any of the three as its ``algorithm``.

    Not constructed directly. Behaves as ``torch.optim.Optimizer`` except that

    * gradients may be strided or ``torch.sparse_coo``, changing from step to step;
    * ``step`` is all or nothing: it checks and allocates before it writes, and a step that raises
      leaves parameters, state and counters as they were;
    * ``load_state_dict`` keeps each state tensor's own dtype and copies it.
    """

    _algorithm: ClassVar[str]
    # GradScaler then sets `grad_scale` and `found_inf` on the optimizer instead of unscaling first.
    _step_supports_amp_scaling = True

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        """Check ``defaults`` and add the parameter groups."""
        algorithm = ALGORITHMS[self._algorithm]
        for name in algorithm.defaults:
            check_option(name, defaults[name], algorithm)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, with any of the three algorithms.

        Args:
            param_group: ``params`` and any options of the group's ``algorithm``. An omitted option
                takes this optimizer's value if the group uses this optimizer's algorithm, else the
                algorithm's own default.

        Raises:
            ValueError: an option has an illegal value, or a parameter is complex.
            TypeError: a key is unknown or not an option of the group's algorithm.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        group = complete_group(param_group, self.defaults, self._algorithm)
        params = group["params"]
        if isinstance(params, Tensor):
            params = group["params"] = [params]
        elif not isinstance(params, set):  # which the base class refuses
            params = group["params"] = list(params)
        for p in params:
            tensor = p[1] if isinstance(p, tuple) else p
            if isinstance(tensor, Tensor) and tensor.is_complex():
                raise ValueError(f"complex parameters are not supported, got dtype {tensor.dtype}")
        if group["fused"] and _native.unavailable:
            raise RuntimeError(f"fused=True, but {_native.unavailable}")
        super().add_param_group(group)
        # The base class added the defaults of this optimizer's own algorithm.
        own = algorithm_of(group["algorithm"]).defaults
        for name in self.defaults:
            if name not in own:
                del group[name]

    # ------------------------------------------------------------------------------------ step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one optimization step.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            IndexError: a sparse gradient has a row index outside its parameter.
            FloatingPointError: a gradient has a NaN or Inf and its group ``nonfinite="raise"``.
            ValueError: a group's options have been changed to what its lazy mode does not allow.
            RuntimeError: a gradient's device, shape, dtype or layout does not fit; ``fused=True``
                and there is no native kernel; or ``rows="tracked"`` and no module of the parameter
                is tracked. In every case nothing was written.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            _step_outside_graph(self)
        else:
            self._step_eager()
        return loss

    def _step_eager(self) -> None:
        if _is_capturing() and not all(group["capturable"] for group in self.param_groups):
            raise RuntimeError(
                f"{type(self).__name__}.step is being captured in a CUDA graph, but not every "
                "parameter group has capturable=True"
            )
        # GradScaler's tensors. On a GPU they are read there, by the kernels.
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is not None:
            windowed = any(group.get("accumulation_steps", 1) > 1 for group in self.param_groups)
            # The windows' clock is on the host.
            if windowed or found_inf.device.type == "cpu":
                if float(found_inf) != 0.0:
                    self._forget_used_rows()
                    return
                found_inf = None
        lazy = [
            (i, group) for i, group in enumerate(self.param_groups) if group["lazy"] != "frozen"
        ]
        undo: list[tuple[Tensor, str, Any]] = []
        windows: list[_WindowRows] = []
        try:
            self._place_histories(lazy)
            passes = [self._prepare_pass(True, grad_scale, found_inf, undo, windows)]
            if any(_closes_window(group) for group in self.param_groups):
                passes.append(self._prepare_pass(False, grad_scale, found_inf, undo, windows))
            cancelled = [each.cancelled(found_inf) for each in passes]
            if any(cancelled):
                self._restore(undo)
                self._forget_used_rows()
                return
            self._prepare_advance(lazy, passes[-1].native)
        except BaseException as error:
            self._restore(undo)
            if _native.C is not None and isinstance(error, _native.C.UpdateError):
                raise self._translated(error) from None
            raise
        for each in passes:
            for place in each.before:
                self._catch_up(*place)
            each.apply(grad_scale)
        if lazy:
            unread = found_inf if None in cancelled else None
            self._advance_histories(lazy, passes[-1].native, unread)
            self._note_current_tables(certain=unread is None)
        self._advance_windows(windows)
        self._forget_used_rows()

    def _prepare_pass(
        self,
        adds: bool,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        undo: list[tuple[Tensor, str, Any]],
        windows: list[_WindowRows],
    ) -> _Pass:
        """Check and allocate what this step does, or what closing its windows does."""
        this = _Pass(None, [], [])
        if _native.C is not None:
            this.native = _native.C.Step(self._faults(), grad_scale, found_inf)
        for index, group in enumerate(self.param_groups):
            if not adds and not _closes_window(group):
                continue
            if adds and _is_lazy(group):
                check_lazy(group)
                _history(group).check_room()
            part = _part_of(group, adds)
            rows = self._masks(index, group) if adds else {w.param: w.rows for w in windows}
            if this.native is None or group["fused"] is False:
                rest: Iterable[int] = range(len(group["params"]))
            else:
                rest = self._add_to_native(this, index, group, part, rows, undo)
                if rest and group["fused"]:
                    raise RuntimeError(self._why_not_native(index, rest[0]))
            if rest:
                self._add_to_reference(this, index, group, rest, part, rows, undo)
            if adds and part.window:
                windows += _window_rows(group, self.state)
        if this.native is not None:
            this.native.prepare()
        return this

    def _advance_windows(self, windows: list[_WindowRows]) -> None:
        closing = {id(group) for group in self.param_groups if _closes_window(group)}
        for window in windows:
            state = self.state[window.param]
            if id(window.group) not in closing:
                state["window_rows"] = window.rows
            else:
                state.pop("window_rows", None)
        for group in self.param_groups:
            if group.get("accumulation_steps", 1) == 1:
                continue
            closes = id(group) in closing
            # Both from the first micro-step on: distributed checkpointing fills what a fresh
            # optimizer has after one.
            group["windows"] = group.get("windows", 0) + closes
            group["micro_steps"] = 0 if closes else group.get("micro_steps", 0) + 1

    # -------------------------------------------------------------------------------- tracking

    def track(self, module: nn.Module, parameter: Tensor | None = None) -> TrackingHandle:
        """Tell the optimizer which rows ``module`` looks up, by a forward pre-hook.

        For groups with ``rows="tracked"`` the hook notes the ids of every call in training mode
        with gradients enabled. The next step then updates these rows, also where their gradient is
        exactly zero, and no others.

        For groups with ``lazy="decay"`` or ``"exact"`` it brings these rows up to date before they
        are read, in every mode. The cost depends on the number of ids alone.

        Args:
            module: an ``nn.Embedding``, ``nn.EmbeddingBag``, or any module whose first argument is
                an integer tensor of row ids, of any shape.
            parameter: the table; default ``module.weight``.

        Returns:
            A handle; ``remove()`` ends the tracking. A deep copy of the module is not tracked.

        Raises:
            ValueError: the parameter is not one of this optimizer's.
            TypeError: the module has no ``weight`` and ``parameter`` was not given.
        """
        table = getattr(module, "weight", None) if parameter is None else parameter
        if not isinstance(table, Tensor):
            raise TypeError(
                f"{type(module).__name__} has no tensor `weight`: pass the table as `parameter`"
            )
        for index, group in enumerate(self.param_groups):
            for position, p in enumerate(group["params"]):
                if p is table:
                    rows = len(p) if p.dim() else 1
                    used = UsedRows(self._name(index, position), rows, index)
                    used.current = _is_lazy(group) and not _history(group).started
                    used = self._used_rows().setdefault(p, used)
                    return TrackingHandle(module, used, _Reader(self, p))
        raise ValueError(
            f"the {list(table.shape)} parameter of {type(module).__name__} is not one of this "
            f"{type(self).__name__}'s"
        )

    def _used_rows(self) -> dict[Tensor, UsedRows]:
        """Return what tracked modules have recorded; not part of any state dict."""
        return self.__dict__.setdefault("_tracked", {})

    def _forget_used_rows(self) -> None:
        """Begin the next step's record; also after a step that GradScaler cancelled."""
        for used in self._used_rows().values():
            used.clear()

    def _masks(self, index: int, group: dict[str, Any]) -> dict[Tensor, Tensor]:
        """Return the mask ``[rows]`` of the used rows of each tracked parameter."""
        masks: dict[Tensor, Tensor] = {}
        if group["rows"] != "tracked":
            return masks
        for position, p in enumerate(group["params"]):
            if p.grad is None or p.grad.layout != torch.strided or not _is_row_lazy(p, group):
                continue
            used = self._used_rows().get(p)
            if used is None or not used.modules:
                raise RuntimeError(
                    f"{self._label(index, position)}: rows='tracked', but no module of the "
                    "parameter is tracked; call optimizer.track(module)"
                )
            masks[p] = used.mask(p.device)
        return masks

    # ------------------------------------------------------------------------------ lazy modes

    @torch.inference_mode(False)
    @torch.no_grad()
    def flush(self, progress: bool | None = None) -> None:
        """Bring every row of the groups in a lazy mode up to date, as before evaluation or export.

        After it the parameters are what training with every row at every step would have made of
        them (``lazy="exact"``), and the history of the hyperparameters begins anew. Rows of an open
        accumulation window keep the gradients that they have gathered.

        Args:
            progress: whether to show a progress bar on stderr. None: on a terminal, if it takes
                long and tqdm is installed.

        Raises:
            IndexError: a GPU has found a bad row index in an earlier gradient.
            ValueError: a GPU has found ``lr * weight_decay >= 1`` in an earlier step.
            RuntimeError: replays of a captured graph changed the learning rate more often than
                there was room for.
        """
        if _native.C is not None:
            try:
                _native.C.Step(self._faults(), None, None)
            except _native.C.UpdateError as error:
                raise self._translated(error) from None
        groups = [g for g in self.param_groups if _is_lazy(g) and _history(g).started]
        rows = sum(len(p) if p.dim() else 1 for g in groups for p in g["params"])
        with _Progress(rows, progress) as bar:
            for index, group in enumerate(self.param_groups):
                if not any(group is g for g in groups):
                    continue
                for position, p in enumerate(group["params"]):
                    if self._has_clock(p, group):
                        self._catch_up(index, position, self.state[p]["last_step"], advance=bar)
                _history(group).forget()
        for used in self._used_rows().values():
            group = self.param_groups[used.group]
            used.current = _is_lazy(group) and not _history(group).replayed

    def _has_clock(self, p: Tensor, group: dict[str, Any]) -> bool:
        """Create the state of a trainable parameter that has none yet; its rows age as well."""
        if p.requires_grad and "last_step" not in self.state.get(p, {}):
            self._init_state(p, group, [])
        return "last_step" in self.state.get(p, {})

    def _catch_up(
        self,
        index: int,
        position: int,
        last_step: Tensor,
        ids: Tensor | None = None,
        advance: Callable[[int], Any] | None = None,
    ) -> None:
        """Bring a parameter's rows, all or those of ``ids``, up to the group's present step."""
        group = self.param_groups[index]
        p = group["params"][position]
        state = self.state[p]
        rows = last_step.numel()
        if p.numel() == 0 or p.is_meta:
            return
        if _native.C is not None and group["fused"] is not False:
            history = _history(group)
            history.place(p.device, many=group["capturable"])
            rule = _native_rule(group, _Part())
            states = [state[name] for name in _MOMENTS if name in state]
            chunk = rows if ids is not None else max(_FLUSH_ELEMENTS * rows // p.numel(), 1)
            for begin in range(0, rows, chunk):
                end = min(begin + chunk, rows)
                try:
                    there = _native.C.catch_up(
                        p, states, last_step, rule, history.native(), ids, begin, end
                    )
                except _native.C.UpdateError as error:
                    raise self._translated(error, index, position) from None
                if not there:
                    break
                if advance is not None:
                    advance(end - begin)
            else:
                return
        where: tuple[Tensor, ...] | None = None
        if ids is not None:
            ids = ids.reshape(-1).to(p.device, torch.int64)
            bad = ids[(ids < 0) | (ids >= rows)]
            if len(bad) > 0:
                raise IndexError(
                    f"{self._name(index, position)}: id {int(bad[0])} is out of range for {rows} "
                    "rows"
                )
            where = torch.unravel_index(ids, last_step.shape)
        _catch_up_on_reference(p, state, group, last_step, where)
        if advance is not None:
            advance(rows)

    def _catch_up_ids(self, p: Tensor, ids: Tensor) -> None:
        """Bring the rows that a tracked module is about to read up to date."""
        used = self._used_rows().get(p)
        if used is not None and used.current and not _is_capturing():
            return
        for index, group in enumerate(self.param_groups):
            if not _is_lazy(group):
                continue
            for position, q in enumerate(group["params"]):
                if q is not p or not (_history(group).started or _is_capturing()):
                    continue
                if self._has_clock(p, group):
                    last_step = self.state[p]["last_step"]
                    # Ids are indices of the first dimension.
                    rows = None if last_step.dim() != 1 else ids
                    self._catch_up(index, position, last_step, rows)

    def _place_histories(self, lazy: _Groups) -> None:
        """Put the histories of lazy groups where the kernels of their parameters read them."""
        for _, group in lazy:
            if _native.C is None:
                continue
            history, many = _history(group), group["capturable"]
            if not history.placed and group["fused"] is not False:
                for device in {p.device for p in group["params"] if not p.is_meta}:
                    history.place(device, many=many)
            history.reserve(many=many)

    def _prepare_advance(self, lazy: _Groups, native: Any) -> None:
        """Tell the native step which histories and counters on GPUs will take it."""
        steps, counters = [], []
        for index, group in lazy:
            if not _takes_a_step(group) or not _history(group).on_devices:
                continue
            history, betas = _history(group).native(), group["betas"]
            weight_decay = float(group["weight_decay"])
            lr = _learning_rate(group)
            steps.append((history, index, lr, weight_decay, betas[0], betas[-1]))
            counters += self._idle_counters(group)
        if steps:
            native.will_advance(steps, counters)

    def _advance_histories(self, lazy: _Groups, native: Any, found_inf: Tensor | None) -> None:
        """Count the step, unless ``found_inf``, which the host has not read, cancels it."""
        if native is not None:
            native.advance()
        for _, group in lazy:
            if not _takes_a_step(group):
                continue
            history, lr = _history(group), _learning_rate(group)
            if history.on_devices:
                if found_inf is not None or isinstance(lr, Tensor) or _is_capturing():
                    history.fall_behind(for_good=_is_capturing())
                    continue
            elif found_inf is not None and float(found_inf) != 0.0:
                continue
            else:
                for counter in self._idle_counters(group):
                    counter += 1
            history.advance(float(lr), float(group["weight_decay"]), group["betas"])

    def _note_current_tables(self, certain: bool) -> None:
        """Note which tracked tables have been updated as a whole, and need not be looked at.

        ``certain``: the step was not cancelled, as the host knows.
        """
        for p, used in self._used_rows().items():
            group = self.param_groups[used.group]
            if not _is_lazy(group):
                continue
            whole = (
                p.grad is not None
                and p.grad.layout == torch.strided
                and not _is_row_lazy(p, group)
                and group["nonfinite"] in ("propagate", "raise")
                and group.get("accumulation_steps", 1) == 1
                and not _is_capturing()
                and not _history(group).replayed
            )
            used.current = whole and (certain or used.current)

    def _idle_counters(self, group: dict[str, Any]) -> list[Tensor]:
        """Return AdamW's counters of parameters without a gradient: every step counts."""
        if group["algorithm"] != "adamw":
            return []
        idle = (self.state.get(p, {}).get("step") for p in group["params"] if p.grad is None)
        return [counter for counter in idle if counter is not None]

    def _translated(
        self, error: Exception, index: int | None = None, position: int = 0
    ) -> Exception:
        kind, group, place, message = error.args
        name = self._label(group, place) if index is None else self._name(index, position)
        kinds = {"index": IndexError, "nonfinite": FloatingPointError, "value": ValueError}
        exception = kinds.get(kind, RuntimeError)
        return exception(f"{name}: {message}")

    # ---------------------------------------------------------------------------- step: details

    def _faults(self) -> Any:
        """Return the place where a GPU reports bad row indices; not part of any state dict."""
        faults = self.__dict__.get("_device_faults")
        if faults is None:
            faults = self.__dict__["_device_faults"] = _native.C.Faults()  # type: ignore[union-attr]
        return faults

    def _restore(self, undo: list[tuple[Tensor, str, Any]]) -> None:
        """Put back the state that a step changed which then did not happen."""
        for p, name, old in reversed(undo):
            if old is not None:
                self.state[p][name] = old
                continue
            self.state[p].pop(name, None)
            if not self.state[p]:
                del self.state[p]

    def _add_to_native(
        self,
        this: _Pass,
        index: int,
        group: dict[str, Any],
        part: _Part,
        rows: dict[Tensor, Tensor],
        undo: list[tuple[Tensor, str, Any]],
    ) -> list[int]:
        """Add a group to the native step; return the positions that have no native kernel."""
        params = group["params"]
        rule = _native_rule(group, part)
        history = _history(group) if _is_lazy(group) else None
        own = None if history is None else history.native()
        args = (params, self.state, index, rule, _learning_rate(group), rows, own)
        without_state, rest, lagging = this.native.add_group(*args, None)
        if without_state:
            for position in without_state:
                self._checked_init_state(index, position, group, undo, this)
                if history is not None:
                    history.place(params[position].device, many=group["capturable"])
            lagging += this.native.add_group(*args, without_state)[2]
        for position in lagging:
            p = params[position]
            this.before.append((index, position, self.state[p]["last_step"]))
        return rest

    def _add_to_reference(
        self,
        this: _Pass,
        index: int,
        group: dict[str, Any],
        positions: Iterable[int],
        part: _Part,
        rows: dict[Tensor, Tensor],
        undo: list[tuple[Tensor, str, Any]],
    ) -> None:
        for position in positions:
            p = group["params"][position]
            if part.adds and p.grad is None:
                continue
            if not part.adds and "window" not in self.state.get(p, {}):
                continue
            mask = rows.get(p) if part.adds else None
            update = _ReferenceUpdate(p, p.grad if part.adds else None, {}, group, part, mask)
            try:
                update.check()
                update.state = self.state[p]
                if part.adds:
                    self._checked_init_state(index, position, group, undo, this)
                update.check_state()
            except (RuntimeError, IndexError, FloatingPointError) as error:
                raise type(error)(f"{self._label(index, position)}: {error}") from None
            if not p.is_meta:
                this.on_reference.append(update)

    def _checked_init_state(
        self,
        index: int,
        position: int,
        group: dict[str, Any],
        undo: list[tuple[Tensor, str, Any]],
        this: _Pass,
    ) -> None:
        p = group["params"][position]
        old = self.state[p].get("last_step") if p in self.state else None
        try:
            state = self._init_state(p, group, undo)
        except _WindowError as error:
            raise RuntimeError(f"{self._label(index, position)}: {error}") from None
        if old is not None and state.get("last_step") is not old:
            this.before.append((index, position, old))  # the rows are divided anew

    def _init_state(
        self, p: Tensor, group: dict[str, Any], undo: list[tuple[Tensor, str, Any]]
    ) -> dict[str, Any]:
        """Create what is missing of a parameter's state, zero, in the parameter's memory format."""
        wanted: dict[str, torch.dtype] = {}
        momentum_dtype = group["momentum_dtype"] or p.dtype
        if group["algorithm"] != "adamw" or group["betas"][0] > 0:
            wanted["exp_avg"] = momentum_dtype
        if group["algorithm"] == "adamw":
            # 1 - beta2 is too small a step for a narrower type than the parameter's own.
            wanted["exp_avg_sq"] = torch.promote_types(momentum_dtype, p.dtype)
            wanted["step"] = torch.int64
        state = self.state[p]
        fresh = not state
        large_table = _is_large_table(p)
        if large_table and not state:
            _advise_huge_pages(p, in_use=True)
        for name, dtype in wanted.items():
            if name in state:
                continue
            self._will_create(p, name, undo)
            if name == "step":
                # In a lazy mode every step of the group counts.
                done = _history(group).now(p.device) if _is_lazy(group) else 0
                state[name] = torch.zeros((), dtype=dtype, device=_clock_device(p)) + done
                continue
            state[name] = torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format)
            if large_table:
                _advise_huge_pages(state[name], in_use=False)
            state[name].zero_()
        if group.get("accumulation_steps", 1) > 1:
            self._init_window(p, group, undo)
        if _is_lazy(group):
            self._init_last_step(p, group, undo, fresh)
        return state

    def _will_create(self, p: Tensor, name: str, undo: list[tuple[Tensor, str, Any]]) -> None:
        """Note how to take back that a state is created or replaced."""
        if p.device.type == "cuda" and _is_capturing():
            raise RuntimeError(
                f"{type(self).__name__}.step is being captured in a CUDA graph, but a parameter "
                f"has no state {name!r} yet, or one for gradients of another kind, which every "
                "replay would reset: take one step before the capture"
            )
        undo.append((p, name, self.state[p].get(name)))

    def _init_last_step(
        self, p: Tensor, group: dict[str, Any], undo: list[tuple[Tensor, str, Any]], fresh: bool
    ) -> None:
        """Create ``last_step``: up to which step each row, or the whole parameter, is current."""
        state = self.state[p]
        old, window, g = state.get("last_step"), state.get("window"), p.grad
        if g is not None and g.layout == torch.sparse_coo:
            dims = g.sparse_dim()
        elif window is not None and window.dim() > 0:
            dims = window.dim()
        elif old is not None and (old.dim() > 0 or p.dim() < 2):
            dims = old.dim()
        else:
            dims = 1 if p.dim() >= 2 else 0
        if old is not None and old.shape == p.shape[:dims]:
            return
        history = _history(group)
        self._will_create(p, "last_step", undo)
        now = history.now(p.device)
        if old is None:
            # State of an optimizer without clocks is taken to be current.
            start = -1 - history.begin if fresh else now
            zeros = torch.zeros(p.shape[:dims], dtype=_INT32, device=p.device)
            state["last_step"] = zeros.add_(start)
            return
        # All rows will have caught up.
        touched = old >= 0
        if dims < old.dim():
            touched = touched.flatten(dims).any(-1)
        touched = touched.reshape(*touched.shape, *[1] * (dims - touched.dim()))
        touched = touched.expand(p.shape[:dims])
        state["last_step"] = torch.where(touched, now, -1 - now).to(_INT32)

    def _init_window(
        self, p: Tensor, group: dict[str, Any], undo: list[tuple[Tensor, str, Any]]
    ) -> None:
        """Create ``window``: which window each row, or the whole parameter, was last part of."""
        state = self.state[p]
        old = state.get("window")
        shape = p.shape[: _window_dims(p, group)]
        strided = p.grad is not None and p.grad.layout == torch.strided
        if old is not None and (old.shape == shape or (strided and old.dim() > 0)):
            return
        in_window = group.get("micro_steps", 0) > 0
        if old is not None and old.dim() > 0 and in_window:
            raise _WindowError(
                f"the gradient's sparse_dim changed from {old.dim()} to {len(shape)} within an "
                "accumulation window"
            )
        self._will_create(p, "window", undo)
        state["window"] = torch.zeros(shape, dtype=_INT32, device=p.device)
        if old is not None and in_window:
            state["window"].copy_(old.expand(shape))
            # Not the gradient's rows alone belong to the window.
            undo.append((p, "window_rows", state.get("window_rows")))
            state["window_rows"] = _unlisted(p)

    # ------------------------------------------------------------------------------- messages

    def _name(self, index: int, position: int) -> str:
        names = self.param_groups[index].get("param_names")
        where = f"group {index}, position {position}"
        return f"parameter {names[position]!r} ({where})" if names else f"parameter ({where})"

    def _label(self, index: int, position: int) -> str:
        return f"{type(self).__name__}.step: {self._name(index, position)}"

    def _why_not_native(self, index: int, position: int) -> str:
        p = self.param_groups[index]["params"][position]
        if p.device.type == "cuda" and not _native.C.build_info()["cuda"]:  # type: ignore[union-attr]
            return (
                f"{self._label(index, position)}: fused=True, but this build of tiger_ext has no "
                "CUDA kernels (it was compiled against a CPU torch or without a CUDA toolkit)"
            )
        return (
            f"{self._label(index, position)}: fused=True, but there is no native kernel for a "
            f"{type(p).__name__} of dtype {p.dtype} on {p.device} with a gradient of dtype "
            f"{p.grad.dtype} and layout {p.grad.layout}"
        )

    # ------------------------------------------------------------------------- saving, loading

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a dict; see ``torch.optim.Optimizer.state_dict``.

        The history of a lazy mode becomes a string of numbers. No flush is needed before.
        """

        def save_histories(_: Any, state_dict: dict[str, Any]) -> None:
            for group in state_dict["param_groups"]:
                if isinstance(group.get("history"), History):
                    group["history"] = group["history"].text()

        hook = self.register_state_dict_post_hook(save_histories, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, keeping each state tensor's own dtype.

        ``torch.optim.Optimizer`` casts state to the parameter's dtype, which would round float32
        momenta of bfloat16 parameters, and shares the tensors with ``state_dict``. Here every state
        tensor is copied, to the parameter's device; ``step`` counters stay int64.
        """
        loaded: dict[str, Any] = {}

        def remember(_: Any, final: dict[str, Any]) -> None:
            loaded.update(final)

        def restore(_: Any) -> None:
            ids = (i for g in loaded["param_groups"] for i in g["params"])
            params = ((g, p) for g in self.param_groups for p in g["params"])
            for i, (group, p) in zip(ids, params, strict=True):
                for name, value in loaded["state"].get(i, {}).items():
                    if name == "step":
                        self.state[p][name] = torch.as_tensor(value).to(
                            _clock_device(p), torch.int64, copy=True
                        )
                    elif isinstance(value, Tensor):
                        self.state[p][name] = value.detach().to(p.device, copy=True)
                window = self.state.get(p, {}).get("window")
                if window is not None and window.dim() > 0 and group.get("micro_steps", 0) > 0:
                    # Distributed checkpointing drops the list, which a fresh optimizer lacks.
                    self.state[p].setdefault("window_rows", _unlisted(p))

        # Registered last, the first hook sees the dict that all other hooks have made; registered
        # first, the second one lets the others see the final state.
        before = self.register_load_state_dict_pre_hook(remember)
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle or state dict; older ones get the newer options' defaults."""
        super().__setstate__(state)
        for used in self._used_rows().values():
            used.current = False
        for group in self.param_groups:
            algorithm = algorithm_of(group.setdefault("algorithm", self._algorithm))
            for name, value in algorithm.defaults.items():
                group.setdefault(name, value)
            if "history" in group:
                group["history"] = History.of(group["history"])


class _Reader:
    """What a tracked module does before it reads rows of ``p``."""

    def __init__(self, optimizer: MixedOptimizer, p: Tensor) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._p = p

    @torch.inference_mode(False)  # state that is created here outlives it
    @torch.no_grad()
    def __call__(self, ids: Tensor) -> bool:
        """Bring the rows up to date; return whether the next step must know of them."""
        optimizer = self._optimizer()
        if optimizer is None:
            return False
        optimizer._catch_up_ids(self._p, ids)
        return any(
            (group["rows"] == "tracked" or group["lazy"] == "frozen")
            and any(q is self._p for q in group["params"])
            for group in optimizer.param_groups
        )


class _Progress:
    """A progress bar over rows, if one is wanted."""

    def __init__(self, rows: int, wanted: bool | None) -> None:
        self._bar: Any = None
        if wanted is False:
            return
        try:
            from tqdm import tqdm
        except ImportError:
            if wanted:
                raise
            return
        self._bar = tqdm(
            total=rows,
            desc="flush",
            unit="row",
            unit_scale=True,
            delay=0 if wanted else 2,
            disable=False if wanted else None,
        )

    def __enter__(self) -> Callable[[int], Any]:
        return self._bar.update if self._bar is not None else lambda rows: None

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()


class _WindowError(RuntimeError):
    pass


@dataclass
class _Pass:
    """A native step and the updates on the reference beside it."""

    native: Any
    on_reference: list[_ReferenceUpdate]
    # Group, position and last_step of parameters whose rows must be brought up to date before.
    before: list[tuple[int, int, Tensor]]

    def cancelled(self, found_inf: Tensor | None) -> bool | None:
        """Return whether AMP cancels the step; None: only a device knows."""
        if found_inf is None:
            return False
        if self.on_reference:
            return float(found_inf) != 0.0
        return None if self.native is None else self.native.cancelled()

    def apply(self, grad_scale: Tensor | None) -> None:
        if self.native is not None:
            self.native.apply()
        scale = 1.0 if grad_scale is None or not self.on_reference else float(grad_scale)
        for update in self.on_reference:
            update.apply(scale)


@dataclass
class _WindowRows:
    """The rows that the gradients of the open window touched, ``[row_dims, entries]``."""

    param: Tensor
    group: dict[str, Any]
    rows: Tensor


def _unlisted(p: Tensor) -> Tensor:
    """Return what stands for "not listed: look at the state `window` of each row"."""
    return torch.empty((0, 0), dtype=torch.int64, device=p.device)


def _window_rows(group: dict[str, Any], states: Mapping[Tensor, Any]) -> list[_WindowRows]:
    """Return the rows of the open windows once this step's gradients have been added."""
    found = []
    for p in group["params"]:
        state = states.get(p)
        if not state or "window" not in state or state["window"].dim() == 0:
            continue
        rows = state.get("window_rows")
        g = p.grad
        if g is not None and g.layout == torch.sparse_coo:
            new = g._indices().detach().to(torch.int64)
            if rows is None:
                rows = new.clone()
            elif rows.shape[0] > 0:
                rows = torch.cat([rows, new], 1)
        elif g is not None:
            rows = _unlisted(p)
        if rows is not None:
            found.append(_WindowRows(p, group, rows))
    return found


def _window_dims(p: Tensor, group: Mapping[str, Any]) -> int:
    """Return how many leading dimensions make a row of this step's gradient; 0: it has none."""
    if p.grad is not None and p.grad.layout == torch.sparse_coo:
        return p.grad.sparse_dim()
    per_row = _is_row_lazy(p, group) or (group["scale"] == "rms_rows" and p.dim() > 0)
    return 1 if per_row else 0


def _is_lazy(group: Mapping[str, Any]) -> bool:
    return group["lazy"] != "frozen"


def _takes_a_step(group: Mapping[str, Any]) -> bool:
    """Return whether the history of a lazy group takes the present step."""
    return group.get("accumulation_steps", 1) == 1 or _closes_window(group)


def _closes_window(group: Mapping[str, Any]) -> bool:
    steps = group.get("accumulation_steps", 1)
    return steps > 1 and group.get("micro_steps", 0) + 1 >= steps


def _part_of(group: Mapping[str, Any], adds: bool) -> _Part:
    steps = group.get("accumulation_steps", 1)
    if steps == 1:
        return _Part()
    return _Part(adds, not adds, group.get("windows", 0) + 1, steps)


def _native_rule(group: Mapping[str, Any], part: _Part) -> Any:
    """Return the group's options as the native step takes them."""
    kinds = _native.C.RuleKind  # type: ignore[union-attr]
    betas = group["betas"]
    sign = group["algorithm"] != "adamw"
    if not sign:
        kind = kinds.ADAMW if betas[0] > 0 else kinds.ADAMW_WITHOUT_MOMENT1
    elif group["direction"] == "sign" and not part.window:
        kind = kinds.SIGN_MOMENTUM
    else:
        kind = kinds.MOMENTUM
    return _native.C.Rule(  # type: ignore[union-attr]
        kind,
        betas[0],
        betas[-1],
        0.0 if sign else group["eps"],
        group["weight_decay"],
        group["maximize"],
        group["rows"],
        group["nonfinite"],
        group["shrink_ratio"],
        group.get("shrink_to", 0.0),
        group["scale"] if sign else None,
        group["rms_floor"] if sign else 0.0,
        group["direction"] if sign else "sign",
        _direction_scale(group) if sign else 1.0,
        part.window,
        part.micro_steps,
        part.adds,
        group["lazy"],
    )


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _clock_device(p: Tensor) -> torch.device:
    """Return where AdamW counts the steps of ``p``: beside it on a GPU, else on the CPU."""
    return p.device if p.device.type == "cuda" else torch.device("cpu")


# How many elements `flush` brings up to date between two strokes of its progress bar.
_FLUSH_ELEMENTS = 1 << 26

# Below this size a table's page table fits the caches.
_LARGE_TABLE_BYTES = 32 << 20
# Moving a table that is in use to huge pages pays within some thousand steps up to this size.
_COLLAPSE_BYTES = 1 << 30


def _is_large_table(p: Tensor) -> bool:
    """Return whether the state of ``p`` will be visited at random rows and is large."""
    return (
        _native.C is not None
        and p.device.type == "cpu"
        and p.layout == torch.strided
        and p.grad is not None
        and p.grad.layout == torch.sparse_coo
        and p.nbytes >= _LARGE_TABLE_BYTES
    )


def _advise_huge_pages(tensor: Tensor, *, in_use: bool) -> None:
    storage = tensor.untyped_storage()
    if in_use and (tensor.is_shared() or storage.nbytes() > _COLLAPSE_BYTES):
        return
    _native.C.advise_huge_pages(storage.data_ptr(), storage.nbytes(), in_use)  # type: ignore[union-attr]


@torch.compiler.disable
def _step_outside_graph(optimizer: MixedOptimizer) -> None:
    optimizer._step_eager()
