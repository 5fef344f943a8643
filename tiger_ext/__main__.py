# SPDX-License-Identifier: Apache-2.0
"""``python -m tiger_ext``: what is installed, which backend each operation uses, and a self-test.

Exit status 0, or 1 if the self-test fails on any device.

``python -m tiger_ext health CHECKPOINT``: the health of a saved model's embedding tables. Exit
status 0; 2 if the checkpoint cannot be read or is malformed; with --fail-on-bad 3 if rows are
nonfinite or saturated.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import platform
import sys
import warnings

import torch

import tiger_ext
from tiger_ext import AdamW, Lion, Tiger, _native, checkpoint
from tiger_ext.checkpoint import CheckpointError, checkpoint_health
from tiger_ext.health_findings import printable

_OPERATIONS = ("dense gradients", "sparse COO gradients")


def _devices() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def _backend(device: str) -> str:
    if _native.C is not None and device == "cpu":
        return f"native ({_native.C.cpu_isa()})"
    if _native.C is not None and device == "cuda" and _native.C.build_info()["cuda"]:
        return "native (CUDA)"
    return "PyTorch reference"


def _environment() -> list[tuple[str, str]]:
    rows = [
        ("tiger_ext", tiger_ext.__version__),
        ("python", f"{platform.python_version()} on {platform.machine()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
    ]
    if _native.C is None:
        return [*rows, ("compiled module", f"missing: {_native.unavailable}")]
    info = _native.C.build_info()
    return [
        *rows,
        ("compiled module", f"built with torch {info['torch']}, compiler {info['compiler']}"),
        ("CUDA kernels", "compiled in" if info["cuda"] else "not in this build"),
        ("CPU kernels", f"{_native.C.cpu_isa()} (TIGER_EXT_CPU_ISA selects another set)"),
    ]


def self_test(device: str) -> None:
    """Take steps on ``device`` and compare with the float64 reference.

    Raises:
        AssertionError: a parameter or a state tensor differs.
    """
    rows, dim = 1000, 48
    for optimizer in (Tiger, Lion, AdamW):
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(rows, dim, generator=generator)
        tested, expected = (
            [torch.nn.Parameter(start.to(d, t, copy=True)) for _ in range(2)]
            for d, t in ((device, torch.float32), ("cpu", torch.float64))
        )
        steppers = (
            optimizer(tested, lr=0.01, weight_decay=0.1),
            optimizer(expected, lr=0.01, weight_decay=0.1, fused=False),
        )
        for _ in range(3):
            dense = torch.randn(rows, dim, generator=generator)
            ids = torch.randint(rows, (1, 3000), generator=generator)
            sparse = torch.sparse_coo_tensor(
                ids,
                torch.randn(3000, dim, generator=generator),
                (rows, dim),
                check_invariants=False,
            )
            for (p, q), stepper in zip((tested, expected), steppers, strict=True):
                p.grad = dense.to(p.device, p.dtype)
                q.grad = sparse.to(q.device, q.dtype)
                stepper.step()
        # Where a momentum is within rounding of zero, either sign is right: hence a share.
        for p, q in zip(tested, expected, strict=True):
            pairs = {"parameter": (p.detach(), q.detach())}
            for name in ("exp_avg", "exp_avg_sq"):
                if name in steppers[0].state[p]:
                    pairs[name] = (steppers[0].state[p][name], steppers[1].state[q][name])
            for name, (got, wanted) in pairs.items():
                wrong = ((got.cpu().double() - wanted).abs() > 1e-4).double().mean().item()
                if not wrong < 1e-3:
                    raise AssertionError(
                        f"{optimizer.__name__} on {device}: {wrong:.1%} of {name} is wrong"
                    )


def report() -> int:
    """Print what is installed and run the self-test; return the exit status."""
    for name, value in _environment():
        print(f"{name + ':':<17} {value}")
    print()
    failed = False
    for device in _devices():
        for operation in _OPERATIONS:
            print(f"{device + ', ' + operation + ':':<29} {_backend(device)}")
        try:
            self_test(device)
            print(f"{device + ', self-test:':<29} passed")
        except Exception as error:
            failed = True
            print(f"{device + ', self-test:':<29} FAILED: {type(error).__name__}: {error}")
    return int(failed)


def health(options: argparse.Namespace) -> int:
    """Print the health of a checkpoint; return the exit status."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how the file was written: nothing to do about it
            found = checkpoint_health(options.checkpoint)
    except CheckpointError as error:
        print(printable(str(error)), file=sys.stderr)
        return 2
    if options.json:
        # JSON has no infinity. An integer may be too large for a float.
        flat = {
            k: v if isinstance(v, int) or math.isfinite(v) else None
            for k, v in found.to_dict().items()
        }
        print(json.dumps(flat, indent=1))
    else:
        print(found)
    if options.plot is not None:
        try:
            found.plot(options.plot)
        except (ImportError, OSError, ValueError) as error:
            print(printable(f"--plot {options.plot}: {error}"), file=sys.stderr)
            return 2
    bad = any(len(t.nonfinite_rows) + len(t.saturated_rows) for t in found.tables.values())
    return 3 if options.fail_on_bad and bad else 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tiger_ext",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="")
    on_health = commands.add_parser(
        "health",
        help="report on the embedding tables of a checkpoint",
        description=checkpoint.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    on_health.add_argument("checkpoint", metavar="CHECKPOINT", help="file to read")
    on_health.add_argument("--json", action="store_true", help='print flat JSON, "table/field"')
    on_health.add_argument("--plot", metavar="PATH", help="draw the report, too (needs matplotlib)")
    on_health.add_argument(
        "--fail-on-bad",
        action="store_true",
        help="exit with status 3 if any table has nonfinite or saturated rows",
    )
    on_health.set_defaults(run=health)
    options = parser.parse_args(arguments)
    return options.run(options) if "run" in options else report()


if __name__ == "__main__":
    # The reports have signs that not every terminal's encoding has.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    # The reader may close the pipe early (`| head`); that is no failure of ours.
    try:
        sys.exit(main())
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
