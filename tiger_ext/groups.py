# SPDX-License-Identifier: Apache-2.0
"""Parameter groups of Tiger's published recipe."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tiger_ext.options import ALGORITHMS, algorithm_of

__all__ = ["param_groups"]

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)


def param_groups(
    model: nn.Module,
    lr: float | Tensor = 1e-3,
    weight_decay: float = 0.01,
    *,
    embedding_algorithm: str | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Return the parameter groups of Tiger's published recipe, for ``Tiger`` or ``Lion``.

    ========================  =====================  ============  =====================
    parameters                ``lr``                 weight decay  ``scale``
    ========================  =====================  ============  =====================
    of embeddings             ``lr``                 yes           "rms_rows" (each row)
    biases; gains and biases  ``lr / 2``             none          None
    of normalisation layers
    all others                ``lr``                 yes           "rms" (whole tensor)
    ========================  =====================  ============  =====================

    With ``scale`` the learning rate is relative to the root mean square of the parameter. Gains of
    normalisation layers get ``shrink_to=1.0``, for ``nonfinite="shrink"``. Modules are recognised
    by type: ``nn.Embedding``, ``nn.EmbeddingBag``, torch's normalisation layers, and their
    subclasses; a bias is what has "bias" in the last component of its name. Each parameter appears
    once. A weight that an embedding shares with another module, and that of
    ``tiger_ext.nn.TiedEmbedding``, counts as one of "all others": its gradient is dense. Empty
    groups are left out; parameters that do not require gradients are left out too.

    Args:
        model: the model.
        lr: relative learning rate; a number or a 0-dim tensor.
        weight_decay: decoupled weight decay.
        embedding_algorithm: "tiger", "lion" or "adamw" for the embeddings; None: the optimizer's
            own. "adamw" takes its own default ``lr`` and ``weight_decay``, because a relative
            learning rate means nothing to it: set others on the first group returned.
        **options: further options for all groups that have them, such as ``betas`` or
            ``nonfinite="shrink"``. They win over the recipe's. Of the embeddings' own algorithm,
            options that it does not have and ``betas`` of another length are left to its defaults.

    Returns:
        Groups with ``params``, ``param_names``, ``lr``, ``weight_decay``, ``scale``, to be given to
        the optimizer's constructor.

    Raises:
        ValueError: ``embedding_algorithm`` is unknown.

    Source: Su 2023, "Tiger: a tiny optimizer", kexue.fm/archives/9512.
    """
    if embedding_algorithm is not None:
        algorithm_of(embedding_algorithm)
    users: dict[Tensor, list[tuple[nn.Module, str, str]]] = {}
    for prefix, module in model.named_modules():
        for name, p in module.named_parameters(prefix, recurse=False):
            users.setdefault(p, []).append((module, name, name.rpartition(".")[2]))

    kinds: dict[str, dict[str, Any]] = {
        "embeddings": dict(lr=lr, weight_decay=weight_decay, scale="rms_rows"),
        "others": dict(lr=lr, weight_decay=weight_decay, scale="rms"),
        "biases": dict(lr=0.5 * lr, weight_decay=0.0, scale=None),
        "gains": dict(lr=0.5 * lr, weight_decay=0.0, scale=None, shrink_to=1.0),
    }
    if embedding_algorithm is not None:
        kinds["embeddings"]["algorithm"] = embedding_algorithm
        if embedding_algorithm == "adamw":
            kinds["embeddings"] = {"algorithm": "adamw"}
    groups = {kind: dict(hyper, params=[], param_names=[]) for kind, hyper in kinds.items()}
    for p, places in users.items():
        if p.requires_grad:
            group = groups[_kind(places)]
            group["params"].append(p)
            group["param_names"].append(places[0][1])
    for group in groups.values():
        own = ALGORITHMS[group["algorithm"]] if "algorithm" in group else None
        for name, value in options.items():
            fits = own is None or name in own.defaults
            if own is not None and name == "betas":
                fits = len(value) == own.beta_count
            if fits:
                group[name] = value
    return [group for group in groups.values() if group["params"]]


def _kind(places: list[tuple[nn.Module, str, str]]) -> str:
    modules = [module for module, _, _ in places]
    if all(isinstance(module, _EMBEDDINGS) for module in modules):
        return "embeddings"
    if any("bias" in name for _, _, name in places):
        return "biases"
    if any(isinstance(module, _NORMS) for module in modules):
        return "gains"
    return "others"
