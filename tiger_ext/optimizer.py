# SPDX-License-Identifier: Apache-2.0
"""The engine behind Tiger, Lion and AdamW.

One class does everything that does not depend on the algorithm: validation, state, the road of a
gradient to the kernels, state dicts. A step goes

    step() -> _step_eager(): every group is added to one native Step (csrc/eager.cpp), which checks
              and allocates -> prepare() sorts the rows -> apply() writes.

Parameters that no native kernel can take run on ``tiger_ext.reference`` in the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from tiger_ext import _native, reference
from tiger_ext.options import ALGORITHMS, algorithm_of, check_option, complete_group

__all__ = ["MixedOptimizer"]

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass
class _ReferenceUpdate:
    """One parameter's share of a step on the reference; checked, not yet written."""

    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    group: dict[str, Any]

    def check(self) -> None:
        """Check parameter and gradient; the state may still be missing."""
        p, g = self.param, self.grad
        if p.layout != torch.strided:
            raise RuntimeError(f"the parameter has layout {p.layout}, expected torch.strided")
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
        """Check that the state fits the parameter."""
        p = self.param
        for name, s in self.state.items():
            if name != "step" and s.shape != p.shape:
                raise RuntimeError(
                    f"the state {name} has shape {list(s.shape)}, the parameter has shape "
                    f"{list(p.shape)}"
                )

    def apply(self, grad_scale: float) -> None:
        g = self.grad
        if "step" in self.state:
            self.state["step"] += 1
        if g.layout == torch.strided:
            self._update(..., g, grad_scale)
        elif g._nnz() > 0:
            rows, sums = reference.sum_duplicates(
                g._indices(),
                g._values(),
                self.param.shape,
                reference.arithmetic_dtype(self.param),
            )
            self._update(tuple(rows), sums, grad_scale)

    def _update(self, where: Any, grad: Tensor, grad_scale: float) -> None:
        group, state = self.group, self.state
        dtype = reference.arithmetic_dtype(self.param)
        factor = (-1.0 if group["maximize"] else 1.0) / grad_scale
        args = dict(lr=_learning_rate(group), weight_decay=group["weight_decay"])
        betas = group["betas"]
        param = self.param[where].to(dtype)
        grad = grad.to(dtype) * factor
        new: dict[str, Tensor | None] = {}
        if group["algorithm"] == "adamw":
            exp_avg = state["exp_avg"][where].to(dtype) if betas[0] > 0 else None
            new_param, new["exp_avg"], new["exp_avg_sq"] = reference.adamw(
                param,
                grad,
                exp_avg,
                state["exp_avg_sq"][where].to(dtype),
                int(state["step"]),
                beta1=betas[0],
                beta2=betas[1],
                eps=group["eps"],
                **args,
            )
        else:
            new_param, new["exp_avg"] = reference.sign_momentum(
                param,
                grad,
                state["exp_avg"][where].to(dtype),
                beta1=betas[0],
                beta2=betas[-1],
                **args,
            )
        self.param[where] = new_param.to(self.param.dtype)
        for name, value in new.items():
            if value is not None:
                state[name][where] = value.to(state[name].dtype)


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
            RuntimeError: a gradient's device, shape, dtype or layout does not fit; or
                ``fused=True`` and there is no native kernel. In every case nothing was written.
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
        if found_inf is not None and found_inf.device.type == "cpu" and float(found_inf) != 0.0:
            return
        native = None
        on_reference: list[_ReferenceUpdate] = []
        created: list[tuple[Tensor, str]] = []
        try:
            if _native.C is not None:
                native = _native.C.Step(self._faults(), grad_scale, found_inf)
            for index, group in enumerate(self.param_groups):
                if native is None or group["fused"] is False:
                    rest: Iterable[int] = range(len(group["params"]))
                else:
                    rest = self._add_to_native(native, index, group, created)
                    if rest and group["fused"]:
                        raise RuntimeError(self._why_not_native(index, rest[0]))
                if rest:
                    self._add_to_reference(on_reference, index, group, rest, created)
            if native is not None:
                native.prepare()
            if (native is not None and native.cancelled()) or (
                on_reference and found_inf is not None and float(found_inf) != 0.0
            ):
                self._discard(created)
                return
        except BaseException as error:
            self._discard(created)
            if _native.C is not None and isinstance(error, _native.C.UpdateError):
                kind, index, position, message = error.args
                exception = IndexError if kind == "index" else RuntimeError
                raise exception(f"{self._label(index, position)}: {message}") from None
            raise
        if native is not None:
            native.apply()
        if on_reference:
            scale = 1.0 if grad_scale is None else float(grad_scale)
            for update in on_reference:
                update.apply(scale)

    def _faults(self) -> Any:
        """Return the place where a GPU reports bad row indices; not part of any state dict."""
        faults = self.__dict__.get("_device_faults")
        if faults is None:
            faults = self.__dict__["_device_faults"] = _native.C.Faults()  # type: ignore[union-attr]
        return faults

    def _discard(self, created: list[tuple[Tensor, str]]) -> None:
        """Remove the state that a step created which then did not happen."""
        for p, name in created:
            self.state[p].pop(name, None)
            if not self.state[p]:
                del self.state[p]

    def _add_to_native(
        self, native: Any, index: int, group: dict[str, Any], created: list[tuple[Tensor, str]]
    ) -> list[int]:
        """Add a group to the native step; return the positions that have no native kernel."""
        kinds = _native.C.RuleKind  # type: ignore[union-attr]
        betas = group["betas"]
        beta1 = betas[0]
        if group["algorithm"] == "adamw":
            kind = kinds.ADAMW if beta1 > 0 else kinds.ADAMW_WITHOUT_MOMENT1
            eps = group["eps"]
        else:
            kind, eps = kinds.SIGN_MOMENTUM, 0.0
        params = group["params"]
        hyper = (_learning_rate(group), beta1, betas[-1], eps, group["weight_decay"])
        args = (params, self.state, index, kind, *hyper, group["maximize"])
        without_state, rest = native.add_group(*args, None)
        if without_state:
            for position in without_state:
                self._init_state(params[position], group, created)
            native.add_group(*args, without_state)
        return rest

    def _add_to_reference(
        self,
        updates: list[_ReferenceUpdate],
        index: int,
        group: dict[str, Any],
        positions: Iterable[int],
        created: list[tuple[Tensor, str]],
    ) -> None:
        for position in positions:
            p = group["params"][position]
            if p.grad is None:
                continue
            update = _ReferenceUpdate(p, p.grad, {}, group)
            try:
                update.check()
                update.state = self._init_state(p, group, created)
                update.check_state()
            except (RuntimeError, IndexError) as error:
                raise type(error)(f"{self._label(index, position)}: {error}") from None
            updates.append(update)

    def _init_state(
        self, p: Tensor, group: dict[str, Any], created: list[tuple[Tensor, str]]
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
        large_table = _is_large_table(p)
        if large_table and not state:
            _advise_huge_pages(p, in_use=True)
        for name, dtype in wanted.items():
            if name in state:
                continue
            if p.device.type == "cuda" and _is_capturing():
                raise RuntimeError(
                    f"{type(self).__name__}.step is being captured in a CUDA graph, but a "
                    "parameter has no state yet, which every replay would reset: take one step "
                    "before the capture"
                )
            created.append((p, name))
            if name == "step":
                state[name] = torch.zeros((), dtype=dtype, device=_clock_device(p))
                continue
            state[name] = torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format)
            if large_table:
                _advise_huge_pages(state[name], in_use=False)
            state[name].zero_()
        return state

    # ------------------------------------------------------------------------------- messages

    def _label(self, index: int, position: int) -> str:
        names = self.param_groups[index].get("param_names")
        where = f"group {index}, position {position}"
        parameter = f"parameter {names[position]!r} ({where})" if names else f"parameter ({where})"
        return f"{type(self).__name__}.step: {parameter}"

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
            params = (p for g in self.param_groups for p in g["params"])
            for i, p in zip(ids, params, strict=True):
                for name, value in loaded["state"].get(i, {}).items():
                    if name == "step":
                        self.state[p][name] = torch.as_tensor(value).to(
                            _clock_device(p), torch.int64, copy=True
                        )
                    elif isinstance(value, Tensor):
                        self.state[p][name] = value.detach().to(p.device, copy=True)

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
        for group in self.param_groups:
            algorithm = algorithm_of(group.setdefault("algorithm", self._algorithm))
            for name, value in algorithm.defaults.items():
                group.setdefault(name, value)


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _clock_device(p: Tensor) -> torch.device:
    """Return where AdamW counts the steps of ``p``: beside it on a GPU, else on the CPU."""
    return p.device if p.device.type == "cuda" else torch.device("cpu")


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
