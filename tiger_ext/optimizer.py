# SPDX-License-Identifier: Apache-2.0
"""What torch asks of an optimizer: groups, steps, tracking, state dicts.

The work is done elsewhere: ``step`` takes one step over all groups, ``lazy`` brings rows up to
date, ``state`` creates what a parameter has. docs/design.md follows a gradient through them.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import ParamsT

from tiger_ext import _native, lazy
from tiger_ext.group_step import GroupStep, is_capturing
from tiger_ext.history import History
from tiger_ext.options import ALGORITHMS, algorithm_of, check_option, complete_group
from tiger_ext.state import StateChanges, clock_device, unlisted
from tiger_ext.step import Step
from tiger_ext.tracking import TrackingHandle, UsedRows

__all__ = ["MixedOptimizer"]


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
                and there is no native kernel; ``rows="tracked"`` and no module of the parameter is
                tracked; or a CUDA graph is being captured whose replays could not do what the step
                does (docs/cuda.md). In every case nothing was written.
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

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """As torch's, which runs the hooks and notes the step for the profiler.

        It costs as much as the step of a small tensor, so it is left out where there is neither.
        """
        observed = torch.optim.Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or _is_recorded() or _has_hooks(self):
                return observed(self, *args, **kwargs)
            out = func(self, *args, **kwargs)
            if _has_hooks(self):  # the closure has registered one
                for hook in itertools.chain(
                    self._optimizer_step_post_hooks.values(),
                    torch_optimizer._global_optimizer_post_hooks.values(),
                ):
                    hook(self, (self, *args), kwargs)
            return out

        return step

    def _step_eager(self) -> None:
        grad_mode = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            # GradScaler's tensors. On a GPU they are read there, by the kernels.
            self._step_with(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        finally:
            torch._C._set_grad_enabled(grad_mode)

    def _step_with(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        tracked = self._used_rows()
        Step(
            type(self).__name__,
            self.param_groups,
            self.state,
            tracked,
            self._faults(),
            grad_scale,
            found_inf,
        ).take()
        # The next step's record begins; also after a step that GradScaler cancelled.
        for used in tracked.values():
            used.clear()

    def _lazy_groups(self) -> list[GroupStep]:
        """Return the groups whose rows may be behind."""
        groups = enumerate(self.param_groups)
        return [GroupStep(index, group) for index, group in groups if group["lazy"] != "frozen"]

    def _faults(self) -> Any:
        """Return the place where a GPU reports bad row indices; not part of any state dict."""
        faults = self.__dict__.get("_device_faults")
        if faults is None and _native.C is not None:
            faults = self.__dict__["_device_faults"] = _native.C.Faults()
        return faults

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
        for index, options in enumerate(self.param_groups):
            for position, p in enumerate(options["params"]):
                if p is table:
                    group = GroupStep(index, options)
                    rows = len(p) if p.dim() else 1
                    used = UsedRows(group.name(position), rows, group.index)
                    used.current = group.history is not None and not group.history.started
                    used = self._used_rows().setdefault(p, used)
                    return TrackingHandle(module, used, _Reader(self, p))
        raise ValueError(
            f"the {list(table.shape)} parameter of {type(module).__name__} is not one of this "
            f"{type(self).__name__}'s"
        )

    def _used_rows(self) -> dict[Tensor, UsedRows]:
        """Return what tracked modules have recorded; not part of any state dict."""
        return self.__dict__.setdefault("_tracked", {})

    def _catch_up_ids(self, p: Tensor, ids: Tensor) -> None:
        """Bring the rows that a tracked module is about to read up to date."""
        used = self._used_rows().get(p)
        if used is None or not used.current or is_capturing():
            lazy.catch_up_ids(p, ids, self._lazy_groups(), self._changes())

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
                there was room for; or a CUDA graph is being captured.
        """
        if is_capturing():
            raise RuntimeError(
                f"{type(self).__name__}.flush is being captured in a CUDA graph, but the history "
                "that it begins anew is also on the host: call it before or after"
            )
        if _native.C is not None:
            try:
                _native.C.Step(self._faults(), None, None)
            except _native.C.UpdateError as error:
                raise _native.translated(error, self._label) from None
        lazy.flush(self._lazy_groups(), self._changes(), progress)
        for used in self._used_rows().values():
            history = GroupStep(used.group, self.param_groups[used.group]).history
            used.current = history is not None and not history.replayed

    def _changes(self) -> StateChanges:
        return StateChanges(self.state, f"a read of {type(self).__name__}'s rows")

    def _label(self, index: int, position: int) -> str:
        group = GroupStep(index, self.param_groups[index])
        return f"{type(self).__name__}.step: {group.name(position)}"

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
                            clock_device(p), torch.int64, copy=True
                        )
                    elif isinstance(value, Tensor):
                        self.state[p][name] = value.detach().to(p.device, copy=True)
                window = self.state.get(p, {}).get("window")
                if window is not None and window.dim() > 0 and group.get("micro_steps", 0) > 0:
                    # Distributed checkpointing drops the list, which a fresh optimizer lacks.
                    self.state[p].setdefault("window_rows", unlisted(p))

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


def _is_recorded() -> bool:
    """Return whether a profiler or another observer listens."""
    return _native.C is None or _native.C.is_recorded()


def _has_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether anything is to be called before or after a step."""
    return bool(
        torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
    )


@torch.compiler.disable
def _step_outside_graph(optimizer: MixedOptimizer) -> None:
    optimizer._step_eager()


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
