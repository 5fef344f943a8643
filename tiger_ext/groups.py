# SPDX-License-Identifier: Apache-2.0
"""Parameter groups of Tiger's published recipe."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn

from tiger_ext.options import (
    ALGORITHMS,
    AlgorithmName,
    algorithm_of,
    check_option,
    numbers_in,
    plain_option,
)
from tiger_ext.tracking import EMBEDDINGS

__all__ = ["param_groups"]

_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)

# Class names with the word "Norm" (LlamaRMSNorm, T5LayerNorm, LayerNorm2d, LayerNormAct), and the
# usual ones in any spelling (rms_norm, Layernorm, BatchNormalization); not "Normal", "Normalize".
_NORM_NAME = re.compile(
    r"Norm(?![a-z])"
    r"|(?i:(rms|layer|group|batch|instance|channel|scale|response)_?norm(ali[sz]ation)?)(?![a-z])"
)
# Of the optimizers that the groups are for.
_SIGN_OPTIONS = ALGORITHMS["tiger"].defaults.keys() | ALGORITHMS["lion"].defaults.keys()
# The `rms_floor` of tensors that are zero: the usual standard deviation of those that are not.
_INITIAL_SIZE = 0.02


def param_groups(
    model: nn.Module,
    lr: float | Tensor = 1e-3,
    weight_decay: float = 0.01,
    *,
    embedding_algorithm: AlgorithmName | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Return the parameter groups of Tiger's published recipe, for ``Tiger`` or ``Lion``.

    ========================  ========  ============  ===========  ============
    parameters                ``lr``    weight decay  ``scale``    ``shrink_to``
    ========================  ========  ============  ===========  ============
    of embeddings             ``lr``    yes           "rms_rows"
    biases                    ``lr/2``  none          None         0.0
    gains of normalisation    ``lr/2``  none          None         1.0
    layers
    all others                ``lr``    yes           "rms"
    ========================  ========  ============  ===========  ============

    With ``scale`` the learning rate is relative to the root mean square of the parameter, or of
    each row of an embedding. Groups without parameters are left out, and so are parameters that do
    not require gradients; each parameter appears once.

    What a parameter is:

    * Of an embedding: its module is an ``nn.Embedding`` or ``nn.EmbeddingBag``, or derives from
      one. A weight that an embedding shares with another module, and that of
      ``tiger_ext.nn.TiedEmbedding``, counts as one of "all others": its gradient is dense.
    * A bias: "bias" is in the last component of its name.
    * A gain: its module is or derives from one of torch's normalisation layers; or the name of its
      class, or of one that it derives from, has the word "Norm" in it (``LlamaRMSNorm``,
      ``T5LayerNorm``, ``FusedRMSNorm``, ``LayerNorm2d``, ``BatchNormalization``; not ``Normal``)
      and the parameter has no more than one dimension longer than 1.

    Tensors that are zero everywhere have no size that a learning rate could be relative to:

    * Gains counted from 1, as Gemma's (``1 + weight``), start there, and so do gains that switch a
      branch on in the course of training. They join the biases: 0, not 1, is what
      ``nonfinite="shrink"`` moves them to. A model that was loaded does not show what its gains
      are counted from: for such gains set ``shrink_to=0.0`` on their group.
    * Of the groups with ``scale`` (LoRA's B matrices, last layers initialised to zero) they make
      groups of their own with ``rms_floor=0.02``, the usual size of the matrices beside them. With
      the default of 1e-3 they would move by ``lr / 1000`` a step at first.

    Tensors without values of their own (on the meta device, DTensors and other wrapping
    subclasses) count as not zero.

    Args:
        model: the model.
        lr: relative learning rate; a number or a tensor of one element. Each group gets a tensor of
            its own, so that a scheduler changes each once.
        weight_decay: decoupled weight decay.
        embedding_algorithm: "tiger", "lion" or "adamw" for the embeddings; None: the optimizer's
            own. "adamw" takes its own default ``lr`` and ``weight_decay``, because a relative
            learning rate means nothing to it: set others on the first group returned.
        **options: further options for all groups that have them, such as ``betas`` or
            ``nonfinite="shrink"``. They win over the recipe's. Of the embeddings' own algorithm,
            options that it does not have and ``betas`` of another length are left to its defaults;
            options that it alone has (AdamW's ``eps``) go to its group alone.

    Returns:
        Groups to be given to the optimizer's constructor: embeddings, zero embeddings, all others,
        zero others, biases, gains. Each has ``params``, ``param_names``, ``lr``, ``weight_decay``,
        ``scale``, what the recipe says of ``shrink_to`` and ``rms_floor``, and of ``options`` what
        fits; the embeddings' also ``algorithm``, if ``embedding_algorithm`` was given. With "adamw"
        there is one group of embeddings, which has ``params``, ``param_names``, ``algorithm`` and
        of ``options`` what fits.

    Raises:
        ValueError: ``embedding_algorithm`` is unknown; ``lr`` is no finite number >= 0; or, with an
            ``embedding_algorithm``, ``betas`` are no sequence of numbers.

    Source: Su 2023, "Tiger: a tiny optimizer", kexue.fm/archives/9512.
    """
    embeddings = None if embedding_algorithm is None else algorithm_of(embedding_algorithm)
    lr = plain_option("lr", lr, ALGORITHMS["tiger"])
    if embeddings is not None and "betas" in options and not numbers_in(options["betas"]):
        check_option("betas", options["betas"], embeddings)
    users: dict[Tensor, list[tuple[nn.Module, str, str]]] = {}
    for prefix, module in model.named_modules():
        for name, p in module.named_parameters(prefix, recurse=False):
            users.setdefault(p, []).append((module, name, name.rpartition(".")[2]))

    kinds: dict[str, dict[str, Any]] = {
        "embeddings": dict(lr=lr, weight_decay=weight_decay, scale="rms_rows"),
        "zero embeddings": dict(
            lr=lr, weight_decay=weight_decay, scale="rms_rows", rms_floor=_INITIAL_SIZE
        ),
        "others": dict(lr=lr, weight_decay=weight_decay, scale="rms"),
        "zero others": dict(lr=lr, weight_decay=weight_decay, scale="rms", rms_floor=_INITIAL_SIZE),
        "biases": dict(lr=0.5 * lr, weight_decay=0.0, scale=None, shrink_to=0.0),
        "gains": dict(lr=0.5 * lr, weight_decay=0.0, scale=None, shrink_to=1.0),
    }
    if embeddings is not None:
        for kind in ("embeddings", "zero embeddings"):
            kinds[kind]["algorithm"] = embeddings.name
        if embeddings.name == "adamw":
            kinds["embeddings"] = {"algorithm": "adamw"}
            del kinds["zero embeddings"]
    groups = {kind: dict(hyper, params=[], param_names=[]) for kind, hyper in kinds.items()}
    for p, places in users.items():
        if p.requires_grad:
            kind = _kind(p, places)
            if kind == "gains" and _is_zero(p):
                kind = "biases"
            elif f"zero {kind}" in groups and _is_zero(p):
                kind = f"zero {kind}"
            groups[kind]["params"].append(p)
            groups[kind]["param_names"].append(places[0][1])
    for kind, group in groups.items():
        own = embeddings if "embeddings" in kind else None
        for name, value in options.items():
            if own is None:
                fits = (
                    embeddings is None or name not in embeddings.defaults or name in _SIGN_OPTIONS
                )
            elif name == "betas":
                fits = len(numbers_in(value)) == own.beta_count
            else:
                fits = name in own.defaults
            if fits:
                group[name] = copy.deepcopy(value)
        if isinstance(group.get("lr"), Tensor):
            group["lr"] = group["lr"].detach().clone()
    return [group for group in groups.values() if group["params"]]


def _kind(p: Tensor, places: list[tuple[nn.Module, str, str]]) -> str:
    modules = [module for module, _, _ in places]
    if all(isinstance(module, EMBEDDINGS) for module in modules):
        return "embeddings"
    if any("bias" in name for _, _, name in places):
        return "biases"
    if any(isinstance(module, _NORMS) for module in modules):
        return "gains"
    if any(map(_is_called_norm, modules)) and sum(n > 1 for n in p.shape) <= 1:
        return "gains"
    return "others"


def _is_called_norm(module: nn.Module) -> bool:
    return any(_NORM_NAME.search(cls.__name__) for cls in type(module).__mro__)


def _is_zero(p: Tensor) -> bool:
    """Return whether all elements are zero; False where there are none to look at."""
    if p.is_meta or type(p).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
        return False
    if nn.parameter.is_lazy(p) or p.numel() == 0:
        return False
    rows = p.detach() if p.dim() else p.detach().reshape(1)
    if bool(rows[0].any()):  # as good as always of those that are not zero
        return False
    return not any(bool(rows[k : k + 4096].any()) for k in range(0, len(rows), 4096))
