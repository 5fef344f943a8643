# SPDX-License-Identifier: Apache-2.0
"""The hooks by which modules are tracked: what they are called with, and what they read."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

from tiger_ext.tracking import EMBEDDINGS, UsedRows

__all__ = ["TrackingHandle", "find_table"]

# Of modules whose first argument is a tensor of floats, though they have a `weight`.
_FORWARDS_OF_FLOATS = {
    getattr(nn, name).forward
    for name in (
        *("Linear", "Bilinear", "LayerNorm", "RMSNorm", "GroupNorm", "PReLU"),
        *(f"{kind}{n}d" for n in (1, 2, 3) for kind in ("Conv", "ConvTranspose")),
        *(f"{kind}{n}d" for n in (1, 2, 3) for kind in ("BatchNorm", "InstanceNorm")),
    )
}


class _Read(Protocol):
    """Called before a module reads rows; returns whether the next step must know of them."""

    def __call__(self, ids: Tensor, replica: bool) -> bool: ...


class _Hook:
    """A forward pre-hook. Copies of it, in a copied or pickled model, do nothing.

    Args:
        used: of the table.
        read: brings rows up to date.
        attribute: under which the module holds the table; None: it does not, or that is unknown.
        replicas: what to do in the replicas that nn.DataParallel makes: nothing if a hook of the
            nn.DataParallel has seen the ids before.
    """

    def __init__(
        self,
        used: UsedRows | None = None,
        read: _Read | None = None,
        attribute: str | None = None,
        replicas: bool = True,
    ) -> None:
        self._used = None if used is None else weakref.ref(used)
        self._read = read
        self._attribute = attribute
        self._replicas = replicas
        # By type: a module that shares the hooks of another, as copies do, may be of another one.
        self._first: dict[type, str | None] = {}

    def end(self) -> None:
        """Do nothing any more, also where a copy of the module has kept the hook."""
        self._used = self._read = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # An exported program reads the rows as they are; `flush` comes before.
        if not torch.compiler.is_exporting():
            self._look(module, args, kwargs)

    @torch.compiler.disable
    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        used = self._used and self._used()
        if not used or self._read is None or _is_traced():
            return
        replica = module.__dict__.get("_is_replica", False)
        if replica and not self._replicas:
            return
        records = module.training and torch.is_grad_enabled()
        ids = self._ids_of(module, args, kwargs)
        with _outside_transforms() if _is_transformed() else nullcontext():
            plain = _plain_ids(ids, type(module).__name__)
            if plain is None or plain.is_meta or used.table.is_meta:
                return
            if not self._reads(module, used):
                return
            used.check_size()
            plain = plain.to(used.table.device)
            if self._read(plain, replica) and records:
                padding = module.padding_idx if isinstance(module, EMBEDDINGS) else None
                used.record(plain, padding)

    def _ids_of(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the argument that `forward` calls its first."""
        if args:
            return args[0]
        kind = type(module)
        if kind not in self._first:
            self._first[kind] = _first_parameter(module)
        name = self._first[kind]
        if name is None and len(kwargs) == 1:
            return next(iter(kwargs.values()))
        if name not in kwargs:
            raise TypeError(
                f"{kind.__name__} is tracked and must be called with a tensor of ids first, got "
                f"the keyword arguments {list(kwargs)}"
            )
        return kwargs[name]

    def _reads(self, module: nn.Module, used: UsedRows) -> bool:
        """Return whether the module reads the optimizer's parameter.

        Raises:
            RuntimeError: another parameter has taken its place.
        """
        held = None if self._attribute is None else module._parameters.get(self._attribute)
        table = used.table
        if held is None or held is table:
            return True
        if isinstance(held, nn.Parameter):
            raise RuntimeError(
                f"{type(module).__name__} is tracked for {used.name}, which is no longer its "
                f"`{self._attribute}`: the table was replaced. Give the new one to the optimizer "
                "(add_param_group) and call optimizer.track(module) anew; if the table was to "
                "change its size only (resize), its state must as well. torch.func.functional_call "
                "takes parameters detached"
            )
        # Put there for a call by torch.func.functional_call: the table, if it is its storage.
        plain = _unwrapped(held)
        return plain.shape == table.shape and plain.data_ptr() == table.data_ptr()

    @property
    def __name__(self) -> str:  # asked for by torch.jit.script alone
        raise AttributeError(
            "torch.jit.script cannot compile a tracked module: call remove() on the handle that "
            "optimizer.track returned (after optimizer.flush() in a lazy mode), script or copy the "
            "module, then track it again"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()


def _first_parameter(module: nn.Module) -> str | None:
    """Return the name of `forward`'s first parameter, None if it tells none."""
    while isinstance(module, nn.DataParallel):
        module = module.module
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):  # not a Python function
        parameters = []
    if parameters and parameters[0].kind == inspect.Parameter.POSITIONAL_OR_KEYWORD:
        return parameters[0].name
    return "input" if isinstance(module, EMBEDDINGS) else None


def _is_traced() -> bool:
    """Return whether a program is being recorded, which reads the rows as they are."""
    return torch._C._get_tracing_state() is not None or (
        torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    )


def _is_transformed() -> bool:
    """Return whether a transform of torch.func or a dispatch mode would see what is computed."""
    return (
        _functorch.peek_interpreter_stack() is not None or torch._C._len_torch_dispatch_stack() > 0
    )


@contextmanager
def _outside_transforms() -> Iterator[None]:
    with temporarily_clear_interpreter_stack(), _disable_current_modes():
        yield


def _unwrapped(tensor: Tensor) -> Tensor:
    """Return what is within the wrappers of torch.func: of a vmap, the tensors of all examples."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if torch._is_functional_tensor(tensor):
            torch._sync(tensor)
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def _plain_ids(ids: Any, module: str) -> Tensor | None:
    """Return ids as a strided int32 or int64 tensor, None if they have no values.

    Raises:
        TypeError: they are no ids.
    """
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex():
        if isinstance(ids, torch.fx.Proxy):
            return None
        got = f"{ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(
            f"{module} is tracked and must be called with a tensor of ids first, got {got}"
        )
    ids = _unwrapped(ids).detach()
    if ids.is_nested and (ids.layout == torch.jagged or ids.is_contiguous()):
        ids = ids.values()
    if torch._C._dispatch_keys(ids).has(torch._C.DispatchKey.Python):
        from torch._subclasses import FakeTensor
        from torch._subclasses.functional_tensor import FunctionalTensor

        if isinstance(ids, (FakeTensor, FunctionalTensor)):
            return None
        refused = type(ids).__name__
    elif ids.is_nested:
        refused = "a nested tensor that is not contiguous"
    elif ids.layout != torch.strided:
        refused = f"layout {ids.layout}"
    else:
        return ids if ids.dtype in (torch.int32, torch.int64) else ids.to(torch.int64)
    raise TypeError(
        f"{module} is tracked and must be called with a plain tensor of ids (strided, or nested "
        f"with layout torch.jagged), got {refused}"
    )


# -------------------------------------------------------------------------------------- handles


class TrackingHandle:
    """What ``optimizer.track`` returns; ``remove()`` ends the tracking. Also a context manager."""

    def __init__(self, module: nn.Module, used: UsedRows, read: _Read) -> None:
        """Register the hooks.

        Args:
            module: what is tracked, as `find_table` returned it.
            used: of the table; its ``modules`` counts this one until `remove`.
            read: called with the ids before the module reads their rows; returns whether the next
                step must know of them.
        """
        self._used: UsedRows | None = used
        self._hooks: list[tuple[_Hook, Any]] = []
        replicas = not isinstance(module, nn.DataParallel)
        for each in _readers(module, used.table):
            hook = _Hook(used, read, _attribute_of(each, used.table), replicas)
            self._hooks.append((hook, each.register_forward_pre_hook(hook, with_kwargs=True)))
        used.modules += 1
        _let_compiled_code_see_hooks()

    def remove(self) -> None:
        """Stop tracking. May be called twice."""
        if self._used is not None:
            for hook, registered in self._hooks:
                hook.end()
                registered.remove()
            self._used.modules -= 1
            self._used = None

    def __enter__(self) -> TrackingHandle:
        """Return the handle."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End the tracking."""
        self.remove()


def find_table(module: Any, parameter: Tensor | None) -> tuple[nn.Module, Tensor]:
    """Return the module to track, without what torch has wrapped around it, and its table.

    Args:
        module: what ``optimizer.track`` was given: an ``nn.Module``.
        parameter: the table; None: the module's ``weight``.

    Returns:
        The module within ``torch.compile`` and ``DistributedDataParallel``, and the table.

    Raises:
        TypeError: it is no module that looks rows up, or no table was given and it has none.
    """
    from torch._dynamo import OptimizedModule

    if not isinstance(module, nn.Module):
        raise TypeError(f"track expects an nn.Module, got {type(module).__name__}")
    while isinstance(module, (OptimizedModule, nn.parallel.DistributedDataParallel)):
        wrapped = module._orig_mod if isinstance(module, OptimizedModule) else module.module
        assert isinstance(wrapped, nn.Module)
        module = wrapped
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"{type(module).__name__} takes no hooks: track a module that contains it, with the "
            "table as `parameter`"
        )
    inner = module
    while isinstance(inner, nn.DataParallel):
        inner = inner.module
    if getattr(type(inner), "forward", None) in _FORWARDS_OF_FLOATS:
        raise TypeError(
            f"{type(inner).__name__} is called with a tensor of floats: only modules that look "
            "rows up by ids can be tracked"
        )
    table = getattr(inner, "weight", None) if parameter is None else parameter
    if not isinstance(table, Tensor):
        raise TypeError(
            f"{type(inner).__name__} has no tensor `weight`: pass the table as `parameter`"
        )
    return module, table


def _readers(module: nn.Module, table: Tensor) -> list[nn.Module]:
    """Return the module and those that a wrapper passes its ids to, which others may call too."""
    hidden = [each for each in vars(module).values() if isinstance(each, nn.Module)]
    readers: dict[int, nn.Module] = {}
    for each in (*module.modules(), *hidden):
        wraps = isinstance(each, nn.DataParallel) or each is module
        if wraps or (
            isinstance(each, EMBEDDINGS) and any(table is p for p in each._parameters.values())
        ):
            # Copies of a module share their hooks.
            readers.setdefault(id(each._forward_pre_hooks), each)
        if isinstance(each, nn.DataParallel):
            readers.setdefault(id(each.module._forward_pre_hooks), each.module)
    return list(readers.values())


def _attribute_of(module: nn.Module, table: Tensor) -> str | None:
    return next((name for name, p in module._parameters.items() if p is table), None)


def _let_compiled_code_see_hooks() -> None:
    """Have torch.compile compile anew where hooks come and go.

    It takes a module's hooks to stay as they were when it compiled the module, or another one of
    the same class, unless it is told to guard them.
    """
    from torch._dynamo import config, reset

    if getattr(config, "skip_nnmodule_hook_guards", False):
        config.skip_nnmodule_hook_guards = False
        reset()  # what was compiled without these guards
