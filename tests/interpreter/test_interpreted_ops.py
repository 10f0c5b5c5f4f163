"""The Triton kernels in Triton's interpreter, against the reference: ``TRITON_INTERPRET=1 pytest tests/interpreter``.

The interpreter's tiles are 16 wide (``mendfast.kernels.configs.INTERPRETER``), so that shapes of a few dozen already
take several tiles, several splits of a reduction, and masks at every edge. It multiplies in float32 whatever the
precision: how a GPU's matrix units round is for the tests in tests/gpu.
"""

import os

import pytest
import torch

pytest.importorskip("triton")
from op_cases import EDITOR_CASES, EditorCase, double, editor_case, error, poisoned, tolerance  # noqa: E402, F401
from test_kl_divergence import case as kl_case  # noqa: E402
from test_kl_divergence import check as kl_check  # noqa: E402
from test_lowrank_linear import case as lowrank_case  # noqa: E402
from test_lowrank_linear import check as lowrank_check  # noqa: E402
from test_token_nll import case as nll_case  # noqa: E402
from test_token_nll import check as nll_check  # noqa: E402

from mendfast import MendConfig, ops, reference  # noqa: E402
from mendfast.kernels import _library, _products, configs, tune  # noqa: E402
from mendfast.kernels import editor_mlp as editor_kernel  # noqa: E402
from mendfast.network import EditorNetwork  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1",
        reason="the interpreter's lane: TRITON_INTERPRET=1 pytest tests/interpreter",
    ),
    # lanes beyond a row's end hold -inf, and the interpreter's numpy says so where a GPU doesn't
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def _the_kernels_own_products(monkeypatch):
    """In "ieee", which a GPU leaves to its library."""
    monkeypatch.setitem(editor_kernel.LIBRARY_ROWS, "ieee", 64)


@pytest.mark.parametrize("name", EDITOR_CASES)
def test_editor_mlp(name):
    editor_case(name).check(ops.editor_mlp, backend="triton")


@pytest.mark.parametrize("name", ["plain", "u only", "no residual", "bfloat16 rows", "not shared"])
def test_editor_mlp_of_many_rows(name, monkeypatch):
    """The path with library products and one fused kernel."""
    monkeypatch.setitem(editor_kernel.LIBRARY_ROWS, "ieee", 36)
    editor_case(name).check(ops.editor_mlp, backend="triton")


def test_editor_mlp_of_mixed_dtypes():
    case = editor_case("plain", blocks=1)
    case.delta = case.delta.detach().bfloat16().requires_grad_()
    case.grads = case.grads[0], case.grads[1].bfloat16()
    case.check(ops.editor_mlp, backend="triton")


def test_editor_mlp_of_views():
    case = editor_case("plain", blocks=1, rows_need_grad=False)
    expected, grads = case.run(ops.editor_mlp, backend="triton")
    case.u = torch.stack([case.u] * 2, 2)[..., 1]
    case.delta = torch.cat([case.delta, case.delta], 1)[:, :18]
    case.blocks = [b._replace(U=b.U.detach().T.contiguous().T.requires_grad_()) for b in case.blocks]
    out, again = case.run(ops.editor_mlp, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip((*expected, *grads), (*out, *again), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_running_stats(dtype):
    """Unequal chunks and splits, a mask, a mean far larger than the deviations."""
    rows = (torch.randn(90, 35) + 1000).to(dtype)
    mask = torch.rand(90) > 0.3
    rows[~mask] = torch.nan
    count, mean, m2 = torch.zeros((), dtype=torch.int64), torch.zeros(35), torch.zeros(35)
    for at in (slice(0, 50), slice(50, 90)):
        ops.running_stats_(count, mean, m2, rows[at], mask[at], backend="triton")
    kept = rows[mask].double()
    assert count == len(kept)
    assert torch.allclose(mean.double(), kept.mean(0), rtol=1e-6)
    assert torch.allclose((m2 / (count - 1)).double(), kept.var(0), rtol=2e-3)
    before = mean.clone(), m2.clone()
    with pytest.raises(ValueError, match="none of the 90 rows"):
        ops.running_stats_(count, mean, m2, rows, torch.zeros(90, dtype=torch.bool), backend="triton")
    assert torch.equal(before[0], mean) and torch.equal(before[1], m2)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lowrank_linear(batched, dtype):
    lowrank_check(lowrank_case(batched, (2, 19, 5, 37, 21), dtype, dtype), 37, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 137), (1, 1, 2)])
def test_token_nll(shape, dtype):
    nll_check(*nll_case(*shape, dtype=dtype), backend="triton")


def test_token_nll_of_a_shifted_view():
    logits, labels = nll_case(2, 4, 67)
    nll_check(logits.detach()[:, :-1].requires_grad_(), labels[:, 1:], backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 137), (1, 1, 2)])
def test_kl_divergence(shape, dtype):
    kl_check(*kl_case(*shape, dtype=dtype), backend="triton")


def test_vocabularies_with_impossible_tokens():
    logits = torch.randn(1, 2, 70)
    logits[..., 64:] = -torch.inf
    labels = torch.tensor([[3, 60]])
    exact = reference.token_nll(logits.double(), labels)
    assert error(ops.token_nll(logits, labels, backend="triton"), exact) < 1e-6
    out = ops.kl_divergence(logits, logits.clone(), torch.ones(1, 2), backend="triton")
    assert out.isfinite().all() and out.abs().max() < 1e-6


@pytest.mark.parametrize("at", [0, 33, 69])
def test_not_a_number_in_any_split_is_not_a_loss(at):
    logits, mask = torch.randn(1, 2, 70), torch.ones(1, 2)
    base = logits.clone()
    logits[0, 1, at] = torch.nan
    if at:  # a split that holds nothing else
        logits[0, 1, at - at % 32 : at] = -torch.inf
    labels = torch.tensor([[5, 6]])
    assert ops.token_nll_rows(logits[0], labels[0], backend="triton").isnan().tolist() == [False, True]
    for pair in ((base, logits), (logits, base)):
        assert ops.kl_divergence(*pair, mask, backend="triton").isnan().all()
        rows = ops.kl_divergence_rows(pair[0][0], pair[1][0], backend="triton")
        assert rows.isnan().tolist() == [False, True]


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("shape", [(3, 7, 0, 13, 9), (3, 0, 4, 13, 9), (0, 7, 4, 13, 9)])
def test_lowrank_linear_without_terms_or_rows(batched, shape):
    arguments = lowrank_case(batched, shape)
    out = ops.lowrank_linear(*arguments, backend="triton")
    assert torch.equal(out, arguments[0])
    grads = torch.autograd.grad(out, arguments, torch.ones_like(out))
    assert (grads[0] == 1).all() and all((g == 0).all() for g in grads[1:])


@pytest.mark.parametrize("shape", [(0, 3, 7), (2, 0, 7)])
def test_losses_without_rows(shape):
    logits, base = torch.randn(shape, requires_grad=True), torch.randn(shape)
    labels, mask = torch.zeros(shape[:2], dtype=torch.int64), torch.ones(shape[:2])
    out = ops.token_nll(logits, labels, backend="triton") + ops.kl_divergence(base, logits, mask, backend="triton")
    out.sum().backward()
    assert (out == 0).all() and logits.grad.shape == shape


def test_many_rows_are_on_the_axis_that_takes_them(monkeypatch):
    """A grid's second axis ends at 65,535 programs."""
    grids = []
    kernel = editor_kernel._editor_normalise_kernel
    monkeypatch.setattr(editor_kernel, "_editor_normalise_kernel", _Recorded(kernel, grids))
    x = torch.randn(70, 45)
    out = torch.empty_like(x)
    editor_kernel.normalise(x, x[:, :0], [], (out, out[:, :0]))
    assert torch.equal(out, x) and [len(grid) for grid in grids] == [1]


class _Recorded:
    def __init__(self, kernel, grids):
        self.kernel, self.grids = kernel, grids

    def __getitem__(self, grid):
        self.grids.append(grid)
        return self.kernel[grid]


@pytest.mark.parametrize("gather", [None, lambda own: own])
def test_statistics_of_several_processes(gather):
    """Those are merged in float64, which the Triton kernels don't serve."""
    net = EditorNetwork(5, 4, 2, MendConfig(rank=3))
    u, delta = torch.randn(9, 5), torch.randn(9, 4)
    net.observe(u, delta, gather)
    assert torch.allclose(net.u_std, u.std(0), rtol=1e-5) and net.count == 9


def test_float64_goes_to_what_serves_it():
    case = editor_case("plain", rows=torch.float64)
    case.check(ops.editor_mlp)
    nll_check(*nll_case(2, 3, 37, dtype=torch.float64))
    kl_check(*kl_case(2, 3, 37, dtype=torch.float64))
    y, x, u, delta, alpha = (double(t) for t in lowrank_case())
    assert error(ops.lowrank_linear(y, x, u, delta, alpha), reference.lowrank_linear(y, x, u, delta, alpha)) < 1e-12


def test_float64_is_refused():
    case = editor_case("plain", rows=torch.float64)
    with pytest.raises(TypeError, match="backend='aten'"):
        ops.editor_mlp(case.u, case.delta, case.stats, case.blocks, case.mode, backend="triton")
    with pytest.raises(TypeError, match="float64"):
        ops.token_nll(torch.randn(1, 1, 3).double(), torch.zeros(1, 1, dtype=torch.int64), backend="triton")


@pytest.mark.parametrize("kernel", tune.PRODUCTS + tune.SWEEPS)
def test_the_tuner_s_workloads_run_their_kernel(kernel, monkeypatch):
    looked_up = []
    lookup = configs.lookup
    monkeypatch.setattr(configs, "lookup", lambda name, *rest: looked_up.append(name) or lookup(name, *rest))
    monkeypatch.setattr(tune, "LOGITS", (1, 2, 40))
    tune.workload(kernel, "ieee", 6, 5, 4, 7, torch.device("cpu"))()
    assert kernel in looked_up


@pytest.mark.parametrize("wanted", [1, 2, 7, 1000])
@pytest.mark.parametrize("widths", [(4096, 16384), (5, 0), (0, 5), (1, 1), (100, 3)])
def test_splits_cover_the_reduction_once(wanted, widths):
    splits0, chunk0, splits1, chunk1 = _products.split_reduction(wanted, widths, 32)
    for splits, chunk, width in ((splits0, chunk0, widths[0]), (splits1, chunk1, widths[1])):
        assert chunk % 32 == 0 and splits * chunk >= width and (splits - 1) * chunk < max(width, 1)
    assert splits0 + splits1 <= max(wanted, (widths[0] > 0) + (widths[1] > 0))


def test_three_products_have_float32_s_accuracy(monkeypatch):
    a, b = torch.randn(40, 300), torch.randn(300, 30)
    high, low = _library.split(a)
    assert torch.equal(high + low, a) and (high.view(torch.int32) & 8191 == 0).all()
    assert low.abs().max() <= a.abs().max() * 2**-10
    for piece in (512, 128, 300, 7):
        monkeypatch.setattr(_library, "PIECE", piece)
        assert error(_library.three_products(a, b), a.double() @ b.double()) < tolerance(torch.float32, 300)
    assert error(_library.matmul(a.T.contiguous().T, b, "ieee"), a.double() @ b.double()) < 1e-6
