# SPDX-License-Identifier: Apache-2.0
"""``python -m tiger_ext``: the report, the self-test and its exit status."""

import re
from dataclasses import replace

import pytest

from tiger_ext import __main__ as report
from tiger_ext import _native, reference


def test_report(capsys):
    assert report.main([]) == 0
    out = capsys.readouterr().out
    assert re.search(r"torch: +2\.", out)
    assert f"cpu, sparse COO gradients:    native ({_native.C.cpu_isa()})" in out
    assert re.search(r"cpu, self-test: +passed", out)


def test_a_wrong_rule_fails_the_self_test(capsys, monkeypatch):
    right = reference.sign_momentum
    monkeypatch.setattr(
        reference, "sign_momentum", lambda *a: right(*a[:-1], replace(a[-1], weight_decay=0.0))
    )
    assert report.main([]) == 1
    assert re.search(
        r"cpu, self-test: +FAILED: AssertionError: Tiger on cpu", capsys.readouterr().out
    )


def test_unknown_arguments_are_refused(capsys):
    with pytest.raises(SystemExit) as exit_:
        report.main(["--nonsense"])
    assert exit_.value.code == 2
    assert "--nonsense" in capsys.readouterr().err


def test_as_a_module(run_python):
    result = run_python("import runpy; runpy.run_module('tiger_ext', run_name='__main__')")
    assert "passed" in result.stdout
