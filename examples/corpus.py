# SPDX-License-Identifier: Apache-2.0
"""Real text for the demo: the Python and C++ sources that ship inside the installed torch.

They are there wherever torch is, and their tokens follow a true power law. The text is tokenised
once; the tokens are kept in a cache file that is keyed by the files and by the tokeniser.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["Corpus", "default_cache", "load"]

SUFFIXES = (".py", ".h", ".hpp", ".cuh")
# Words and numbers, single signs, and the ends of lines that are not followed by an empty line.
TOKEN = re.compile(r"\w+|[^\w\s]|\n(?=[ \t]*\S)")
TOKENISER_VERSION = 1
FILE_START = "<file>"
# Of the files, not of the tokens: neighbouring text never straddles the split.
HELD_OUT_SHARE = VALIDATION_SHARE = 0.02


@dataclass
class Corpus:
    """All tokens in one row, the held-out files first, then validation, then training.

    Attributes:
        tokens: ``[count]``, int32 on the CPU. Ids are ranks: 0 is the most frequent token.
        splits: name -> (first, end) position in ``tokens``.
        vocabulary: number of distinct tokens.
        statistics: counts of files, tokens, distinct tokens and bigrams, and those seen once.
    """

    tokens: Tensor
    splits: dict[str, tuple[int, int]]
    vocabulary: int
    statistics: dict[str, int]


def default_cache() -> Path:
    """Return ``$XDG_CACHE_HOME/tiger_ext``, or ``~/.cache/tiger_ext``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tiger_ext"


def load(cache: Path, max_files: int | None = None) -> Corpus:
    """Return the tokenised sources of the installed torch.

    Args:
        cache: folder of the cache file; created if it does not exist.
        max_files: take only so many files, chosen by the hash of their names.
    """
    root = Path(torch.__file__).parent
    names = _source_files(root)[:max_files]
    path = cache / f"corpus-{_key(root, names)}.npz"
    if path.exists():
        with np.load(path) as stored:
            arrays = dict(stored)
    else:
        arrays = _tokenise(root, names)
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(unfinished, **arrays)
        unfinished.replace(path)  # another process never sees half a file
    first_validation, first_train = (int(x) for x in arrays["borders"])
    tokens = torch.from_numpy(arrays["tokens"])
    statistics = dict(zip(_STATISTICS, (int(x) for x in arrays["statistics"]), strict=True))
    return Corpus(
        tokens,
        {
            "held-out": (0, first_validation),
            "validation": (first_validation, first_train),
            "train": (first_train, len(tokens)),
        },
        statistics["distinct_tokens"],
        statistics,
    )


def _source_files(root: Path) -> list[str]:
    """Return the sources' names below ``root``, in the order of the names' hashes."""
    names = [
        Path(folder, name).relative_to(root).as_posix()
        for folder, _, files in os.walk(root)
        for name in files
        if name.endswith(SUFFIXES)
    ]
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def _key(root: Path, names: list[str]) -> str:
    """Return a digest of everything that the cached tokens depend on."""
    digest = hashlib.sha256(f"{torch.__version__} {TOKENISER_VERSION}\n".encode())
    for name in names:
        digest.update(f"{name} {(root / name).stat().st_size}\n".encode())
    return digest.hexdigest()[:16]


class _Numbering(dict[str, int]):
    """Numbers tokens in the order in which they are first asked for."""

    def __missing__(self, token: str) -> int:
        self[token] = number = len(self)
        return number


def _tokenise(root: Path, names: list[str]) -> dict[str, np.ndarray]:
    numbering = _Numbering()
    files = []
    for name in names:
        text = (root / name).read_text(encoding="utf-8", errors="replace")
        found = [FILE_START, *TOKEN.findall(text)]
        files.append(np.fromiter(map(numbering.__getitem__, found), np.int32, len(found)))
    tokens = np.concatenate(files)
    counts = np.bincount(tokens)
    rank = np.empty(len(counts), np.int32)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(counts), dtype=np.int32)
    tokens = rank[tokens]

    held_out = max(1, round(len(names) * HELD_OUT_SHARE))
    validation = max(1, round(len(names) * VALIDATION_SHARE))
    ends = np.cumsum([len(file) for file in files])
    bigrams = tokens[:-1].astype(np.int64) * len(counts) + tokens[1:]
    bigram_counts = np.unique(bigrams, return_counts=True)[1]
    statistics = {
        "files": len(names),
        "tokens": len(tokens),
        "distinct_tokens": len(counts),
        "tokens_seen_once": np.sum(counts == 1),
        "distinct_bigrams": len(bigram_counts),
        "bigrams_seen_once": np.sum(bigram_counts == 1),
    }
    return {
        "tokens": tokens,
        "borders": ends[[held_out - 1, held_out + validation - 1]],
        "statistics": np.array([statistics[name] for name in _STATISTICS]),
    }


_STATISTICS = (
    "files",
    "tokens",
    "distinct_tokens",
    "tokens_seen_once",
    "distinct_bigrams",
    "bigrams_seen_once",
)
