# SPDX-License-Identifier: Apache-2.0
from cases import RULES

WITHOUT = "import sys; sys.modules['tiger_ext._C'] = None\n"


def test_warns_once_with_reason_and_remedy(run_python):
    result = run_python(
        WITHOUT
        + """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import tiger_ext
    import torch
    for _ in range(2):
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        tiger_ext.Tiger([p]).step()
mine = [w for w in caught if "tiger_ext" in str(w.message)]
assert len(mine) == 1, mine
assert mine[0].category is RuntimeWarning
print(mine[0].message)
"""
    )
    assert "tiger_ext._C" in result.stdout
    assert "pip install" in result.stdout
    assert "reference" in result.stdout


def test_native_is_not_required_by_default(run_python):
    run_python(WITHOUT + "import tiger_ext", TIGER_EXT_REQUIRE_NATIVE="0")


def test_require_native_makes_it_an_error(run_python):
    result = run_python(WITHOUT + "import tiger_ext", check=False, TIGER_EXT_REQUIRE_NATIVE="1")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError") and "TIGER_EXT_REQUIRE_NATIVE" in last
    assert "pip install" in last


def test_require_native_is_silent_when_all_is_well(run_python):
    result = run_python(
        "import warnings; warnings.simplefilter('error'); import tiger_ext",
        TIGER_EXT_REQUIRE_NATIVE="1",
    )
    assert result.stderr == ""


def test_optimizers_run_on_the_reference(run_python):
    # One process for all of it: starting one takes longer than the tests.
    run_python(
        WITHOUT
        + """
import warnings
warnings.simplefilter("ignore")
import torch
from cases import RULES, dense_grad, parameter, sparse_grad, unchecked_sparse
from oracle import unchanged, verified

for rule in RULES:  # every rule, dense and sparse
    params = [parameter(9, 4), parameter(20, 3, dtype=torch.bfloat16), parameter()]
    opt = rule(params, maximize=True)
    for step in range(3):
        params[0].grad = dense_grad(params[0])
        params[1].grad = sparse_grad(params[1], 40) if step else dense_grad(params[1])
        params[2].grad = dense_grad(params[2])
        with verified(opt):
            opt.step()

for rule in RULES:  # a bad row index
    first, last = parameter(9, 4), parameter(20, 3)
    opt = rule([("first", first), ("last", last)])
    first.grad = torch.randn(9, 4)
    for index in (20, -1):
        last.grad = unchecked_sparse([[3, index]], torch.randn(2, 3), (20, 3))
        with unchanged(opt):
            try:
                opt.step()
            except IndexError as error:
                assert "'last'" in str(error) and str(index) in str(error), error
                assert "20" in str(error)
            else:
                raise SystemExit("accepted a bad row index")

for rule in RULES:  # fused=True is refused with reason and remedy
    try:
        rule([parameter(3)], fused=True)
    except RuntimeError as error:
        assert "fused=True" in str(error) and "tiger_ext._C" in str(error), error
        assert "pip install" in str(error)
    else:
        raise SystemExit("accepted fused=True")
    rule([parameter(3)], fused=False)
"""
    )


def test_a_state_dict_moves_between_native_and_reference(run_python, tmp_path):
    program = """
import warnings
warnings.simplefilter("ignore")
import torch
from cases import RULES
from oracle import verified
path = {path!r}
for k, rule in enumerate(RULES):
    p = torch.nn.Parameter(torch.linspace(-1, 1, 12).reshape(4, 3))
    opt = rule([p], momentum_dtype=torch.float32)
    p.grad = torch.ones(4, 3)
    if {write}:
        opt.step()
        torch.save((opt.state_dict(), p.detach()), path + str(k))
    else:
        state, value = torch.load(path + str(k), weights_only=True)
        opt.load_state_dict(state)
        with torch.no_grad():
            p.copy_(value)
        with verified(opt):
            opt.step()
"""
    path = str(tmp_path / "state")
    run_python(program.format(path=path, write=True))
    run_python(WITHOUT + program.format(path=path, write=False))
    assert len(list(tmp_path.iterdir())) == len(RULES)


def test_fused_that_is_set_later_says_what_is_missing(run_python):
    run_python(
        WITHOUT
        + """
import torch, tiger_ext
p, q = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
opt = tiger_ext.Tiger([p, q])
opt.param_groups[0]["fused"] = True
for p.grad in (None, torch.ones(3)):
    q.grad = torch.ones(3)
    try:
        opt.step()
    except RuntimeError as error:
        assert "fused=True, but" in str(error) and "tiger_ext._C" in str(error), error
    else:
        raise SystemExit("accepted")
"""
    )
