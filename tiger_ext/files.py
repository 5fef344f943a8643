# SPDX-License-Identifier: Apache-2.0
"""Files that appear under their name once they are whole."""

from __future__ import annotations

import os
import secrets

__all__ = ["unfinished_path"]


def unfinished_path(path: str | os.PathLike[str]) -> str:
    """Return where to write a file until it is whole: beside ``path``, a name that nobody has."""
    folder, name = os.path.split(os.fspath(path))
    return os.path.join(folder, f".{name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
