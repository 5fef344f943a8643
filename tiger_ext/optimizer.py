# SPDX-License-Identifier: Apache-2.0
"""What torch asks of an optimizer: groups, steps, tracking, state dicts.

The work is done elsewhere: ``step`` takes one step over all groups, ``lazy`` brings rows up to
date, ``state`` creates what a parameter has. docs/design.md follows a gradient through them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from tiger_ext import _native, lazy, observers
from tiger_ext.capture import is_capturing
from tiger_ext.clocks import Clocks, without_placeholders
from tiger_ext.finish import finish
from tiger_ext.group_step import GroupStep, group_steps
from tiger_ext.loading import Loaded, fill_in
from tiger_ext.moments import check_shapes
from tiger_ext.options import ALGORITHMS, algorithm_of, complete_group, plain_option
from tiger_ext.parameters import check_memory, check_tensors
from tiger_ext.reading import Reader
from tiger_ext.state_memory import check_shareable, init_state, share_state
from tiger_ext.step import Step
from tiger_ext.tracking import TrackedTables, UsedRows
from tiger_ext.tracking_hooks import TrackingHandle, find_table

__all__ = ["MixedOptimizer"]

_set_grad_enabled = torch._C._set_grad_enabled
_is_grad_enabled, _is_inference_mode = torch.is_grad_enabled, torch.is_inference_mode_enabled


class MixedOptimizer(torch.optim.Optimizer):
    """Base of Tiger, Lion and AdamW; a group may name any of the three as its ``algorithm``.

    Not constructed directly. Behaves as ``torch.optim.Optimizer`` except that

    * gradients may be strided or ``torch.sparse_coo``, changing from step to step;
    * ``step`` is all or nothing: it checks and allocates before it writes, and a step that raises
      leaves parameters, state and counters as they were;
    * ``load_state_dict`` keeps each state tensor's own dtype and copies it.
    """

    _algorithm: ClassVar[str]
    _step_name: ClassVar[str]
    # Within the constructor the memory of all groups is checked once, at the end.
    _constructing = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Note what messages call a step."""
        super().__init_subclass__(**kwargs)
        cls._step_name = f"{cls.__name__}.step"

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        """Check ``defaults`` and add the parameter groups."""
        algorithm = ALGORITHMS[self._algorithm]
        plain = {name: plain_option(name, defaults[name], algorithm) for name in algorithm.defaults}
        self._clocks = Clocks()
        self._begin_anew()
        self._constructing = True
        super().__init__(params, plain)
        del self._constructing
        check_memory(self.param_groups)
        self._begin_clocks()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, with any of the three algorithms.

        Args:
            param_group: ``params`` and any options of the group's ``algorithm``. An omitted option
                takes this optimizer's value if the group uses this optimizer's algorithm, else the
                algorithm's own default. Other keys ("name", "lr_scale") are kept.

        Raises:
            ValueError: an option has an illegal value; a parameter is complex or sparse, is listed
                twice, or shares memory with another one (those that require gradients).
            TypeError: a key is an option of other algorithms only, or nearly one of this algorithm.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        group = complete_group(without_placeholders(param_group), self.defaults, self._algorithm)
        params = group["params"]
        if isinstance(params, Tensor):
            params = group["params"] = [params]
        elif not isinstance(params, set):  # which the base class refuses
            params = group["params"] = list(params)
        check_tensors(group, len(self.param_groups))
        if group["fused"] and _native.unavailable:
            raise RuntimeError(f"fused=True, but {_native.unavailable}")
        if not self._constructing:
            check_memory([*self.param_groups, group])
        super().add_param_group(group)
        # The base class added the defaults of this optimizer's own algorithm.
        own = algorithm_of(group["algorithm"]).defaults
        for name in self.defaults:
            if name not in own:
                del group[name]
        if not self._constructing:
            self._begin_clocks()

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
            OverflowError: a group has taken 2**31 - 1 steps in a lazy mode, or as many windows.
            RuntimeError: device, shape, dtype or layout of a gradient or a state does not fit;
                ``fused=True`` and there is no native kernel; ``rows="tracked"`` and no module of an
                embedding's parameter is tracked; or a CUDA graph is being captured whose replays
                could not do what the step does (docs/cuda.md). In every case nothing was written.
        """
        loss = None
        try:
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            if torch.compiler.is_compiling():
                _step_outside_graph(self)
            else:
                self._step_eager()
        except BaseException:
            # GradScaler removes them only after a step that did not raise, and another step must
            # not be scaled by them.
            self.__dict__.pop("grad_scale", None)
            self.__dict__.pop("found_inf", None)
            raise
        return loss

    def close_window(self) -> None:
        """End the open accumulation windows early, without another gradient.

        Parameters of groups with ``accumulation_steps`` move by what has been gathered, each
        gradient divided by ``accumulation_steps`` as planned. Does nothing where no window is open.

        Raises:
            ValueError, RuntimeError, OverflowError: as ``step``; nothing was written.
        """
        with torch.inference_mode(False), torch.no_grad():
            self._step_with(None, None, Step.close_windows)

    profile_hook_step = staticmethod(observers.profile_hook_step)

    def _step_eager(self) -> None:
        if _is_inference_mode():  # state that is created here outlives it
            with torch.inference_mode(False):
                return self._step_eager()
        grad_mode = _is_grad_enabled()
        try:
            _set_grad_enabled(False)
            # GradScaler's: tensors, which on a GPU the kernels read there; plain numbers where no
            # parameter has a gradient.
            own = self.__dict__
            if "grad_scale" in own or "found_inf" in own:
                self._step_with(_tensor(own.get("grad_scale")), _tensor(own.get("found_inf")))
            else:
                self._step_with(None, None)
        finally:
            _set_grad_enabled(grad_mode)

    def _step_with(
        self,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        take: Callable[[Step], None] = Step.take,
    ) -> None:
        groups = self.param_groups
        take(
            Step(
                self._step_name,
                groups,
                self._clocks.of(groups, self.state),
                self.state,
                self._tracked,
                self._faults,
                grad_scale,
                found_inf,
            )
        )

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler may leave the division by its scale to the step: to the kernels."""
        return _native.C is not None and all(
            group["fused"] is not False and _native.has_kernels(group["params"][0].device.type)
            for group in self.param_groups
            if group["params"]
        )

    def _group_steps(self) -> list[GroupStep]:
        clocks = self._clocks.of(self.param_groups, self.state)
        return group_steps(self.param_groups, clocks)

    def _begin_clocks(self) -> None:
        for group in self._group_steps():
            group.put_placeholders()

    def _lazy_groups(self) -> list[GroupStep]:
        """Return the groups whose rows may be behind."""
        return [group for group in self._group_steps() if group.history is not None]

    def _begin_anew(self) -> None:
        """Create, unless it is there, what is not part of any copy or state dict."""
        if "_tracked" not in self.__dict__:
            self._tracked = TrackedTables()  # what tracked modules have recorded
            # The place where a GPU reports bad row indices.
            self._faults = None if _native.C is None else _native.C.Faults()

    # -------------------------------------------------------------------------------- tracking

    def track(self, module: nn.Module, parameter: Tensor | None = None) -> TrackingHandle:
        """Tell the optimizer which rows ``module`` looks up, by a forward pre-hook.

        For groups with ``rows="tracked"`` the hook notes the ids of every call in training mode
        with gradients enabled. The next step then updates these rows, also where their gradient is
        exactly zero, and no others.

        For groups with ``lazy="decay"`` or ``"exact"`` it brings these rows up to date before they
        are read, in every mode. The cost depends on the number of ids alone.

        The first call in a process has torch.compile guard the hooks of modules, and drops what it
        has compiled before.

        Args:
            module: an ``nn.Embedding``, ``nn.EmbeddingBag``, or any module whose first argument is
                an integer tensor of row ids, of any shape. Of a wrapper (a compiled module,
                ``nn.DataParallel``, a module that passes its ids on) the embedding within is
                tracked as well. The first argument is taken for ids whatever it means: if it is
                another integer tensor (lengths, positions), track the embedding within instead.
            parameter: the table; default ``module.weight``.

        Returns:
            A handle; ``remove()`` ends the tracking. A deep copy of the module is not tracked.

        Raises:
            ValueError: the parameter is not one of this optimizer's.
            TypeError: the module has no ``weight`` and ``parameter`` was not given, or it is known
                to take floats.
            RuntimeError: the parameter's state is of another size: one of them was resized.
        """
        module, table = find_table(module, parameter)
        for group in self._group_steps():
            for position, p in enumerate(group.params):
                if p is table:
                    group.clock.admit(group.params)  # it may have taken another one's place
                    used = UsedRows(group.name(position), p)
                    if getattr(module, "max_norm", None) is not None:
                        group.clock.warned.add(p)  # the module itself writes to the rows it reads
                    used.current = group.history is not None and not group.history.started
                    check_shapes(p, self.state.get(p, {}))
                    return TrackingHandle(module, self._tracked.add(used), Reader(self, p))
        raise ValueError(
            f"the {list(table.shape)} parameter of {type(module).__name__} is not one of this "
            f"{type(self).__name__}'s"
        )

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
            RuntimeError: a state is of another size than its parameter; replays of a captured graph
                changed the learning rate too often; or a CUDA graph is being captured.
        """
        if is_capturing():
            raise RuntimeError(
                f"{type(self).__name__}.flush is being captured in a CUDA graph, but the history "
                "that it begins anew is also on the host: call it before or after"
            )
        if _native.C is not None:
            try:
                _native.C.Step(self._faults, None, None)
            except _native.C.UpdateError as error:
                raise _native.translated(error, self._label) from None
        groups = self._lazy_groups()
        lazy.flush(groups, self.state, self._reading(), progress)
        for p, used in self._tracked.items():
            history = next((g.history for g in groups if p in g.clock.params), None)
            used.current = history is not None and not history.replayed and p.requires_grad

    def _reading(self) -> str:
        """Return what messages call a read."""
        return f"a read of {type(self).__name__}'s rows"

    def _label(self, index: int, position: int) -> str:
        return f"{type(self).__name__}.step: {self._group_steps()[index].name(position)}"

    # -------------------------------------------------------------------------- state, memory

    @torch.inference_mode(False)
    @torch.no_grad()
    def init_state(self) -> None:
        """Create now what the first steps would create; nothing moves, and no step is counted.

        Rows are those of the first dimension of parameters with two and more. Moments are zero
        pages that exist once they are written. Frozen parameters get no state, and what is there
        already stays.

        Raises:
            RuntimeError: a CUDA graph is being captured. Nothing has been created.
        """
        init_state(self._group_steps(), self.state, f"{type(self).__name__}.init_state")

    def share_memory(self) -> None:
        """Put the state into shared memory, created first where it is missing.

        Processes that get the parameters, which must be in shared memory or a mapped file
        themselves, and ``state_dict()`` may then step at once without locks, each with an optimizer
        of its own that takes the state by ``load_state_dict(..., assign=True)``. A row that two of
        them write at once gets one of the updates or a mixture of elements (docs/large_tables.md).

        Raises:
            ValueError: a group is in a lazy mode other than "frozen" or accumulates.
            RuntimeError: a CUDA graph is being captured.
        """
        groups = self._group_steps()
        check_shareable(groups)
        self.init_state()
        share_state(groups, self.state)

    # ------------------------------------------------------------------------- saving, loading

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a dict; see ``torch.optim.Optimizer.state_dict``.

        What is counted for groups in a lazy mode and for accumulation windows is in it as plain
        numbers and strings of numbers. No flush is needed before.
        """
        clocks = self._clocks.of(self.param_groups, self.state)
        for clock in clocks:
            clock.look_for_cleared(self.state)

        def save_clocks(_: Any, state_dict: dict[str, Any]) -> None:
            fill_in(state_dict, self.param_groups, clocks)

        hook = self.register_state_dict_post_hook(save_clocks, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any], *, assign: bool = False) -> None:
        """Load a state dict, keeping each state tensor's own dtype.

        ``torch.optim.Optimizer`` casts state to the parameter's dtype, which would round float32
        momenta of bfloat16 parameters, and shares the tensors with ``state_dict``. Here every state
        tensor is copied, to the parameter's device; ``step`` counters stay int64. Options are those
        of ``state_dict``, but a group in a lazy mode stays in it where the saved one was "frozen":
        its rows are taken to be current.

        Args:
            state_dict: what ``state_dict`` has returned.
            assign: whether to take the dict's tensors themselves, as ``nn.Module.load_state_dict``
                does: they are shared with whoever has them, or mapped from a file.

        Raises:
            ValueError: the dict does not fit: other groups or parameters, another algorithm's
                options or state, an illegal value, a tensor of another shape or kind of dtype, a
                clock that is ahead of its history; with ``assign``, what would have to be
                converted: another device, counters, scales or moments of rows of another dtype,
                counters that are not contiguous. It is checked wholly before anything changes.
        """
        if not isinstance(state_dict, dict):
            raise ValueError(f"load_state_dict expects a dict, got {type(state_dict).__name__}")
        loaded = Loaded(self.param_groups, assign=assign)

        def check(_: Any, final: dict[str, Any]) -> dict[str, Any]:
            return loaded.check(final)

        def restore(_: Any) -> None:
            loaded.restore(self.param_groups, self.state, self._clocks)
            for used in self._tracked.values():
                used.current = False

        # Registered last, the first hook sees the dict that all other hooks have made; registered
        # first, the second one lets the others see the final state.
        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        groups = self.param_groups
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            if self.param_groups is not groups:  # a signal's handler has raised meanwhile
                finish(lambda: restore(None))
            raise
        finally:
            before.remove()
            after.remove()

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles go on from."""
        return {**super().__getstate__(), "_clocks": self._clocks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle or state dict; older ones get the newer options' defaults."""
        self.__dict__.setdefault("_clocks", Clocks())
        self._begin_anew()
        super().__setstate__(state)
        for used in self._tracked.values():
            used.current = False
        for group in self.param_groups:
            algorithm = algorithm_of(group.setdefault("algorithm", self._algorithm))
            for name, value in algorithm.defaults.items():
                group.setdefault(name, value)


def _tensor(number: Any) -> Tensor | None:
    """Return a number as a tensor, tensors and None as they are."""
    return number if number is None or isinstance(number, Tensor) else torch.tensor(float(number))


@torch.compiler.disable
def _step_outside_graph(optimizer: MixedOptimizer) -> None:
    optimizer._step_eager()
