# SPDX-License-Identifier: Apache-2.0
"""Fast sign-momentum optimizers for PyTorch, safe on sparse embeddings."""

from importlib.metadata import PackageNotFoundError, version

from tiger_ext import checkpoint, nn
from tiger_ext.adamw import AdamW
from tiger_ext.clip import clip_grad_norm_, clip_grad_value_
from tiger_ext.groups import param_groups
from tiger_ext.health import health_report
from tiger_ext.lion import Lion
from tiger_ext.tables import empty_table
from tiger_ext.tiger import Tiger

__all__ = [
    "AdamW",
    "Lion",
    "Tiger",
    "__version__",
    "checkpoint",
    "clip_grad_norm_",
    "clip_grad_value_",
    "empty_table",
    "health_report",
    "nn",
    "param_groups",
]

try:
    __version__ = version("tiger-ext")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+source"
