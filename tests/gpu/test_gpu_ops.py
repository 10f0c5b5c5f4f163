"""The Triton kernels on a GPU, at real sizes: ``pytest tests/gpu -m gpu``. tests/gpu/sanitize.sh checks memory."""

import pytest
import torch
from op_cases import EditorCase, double, editor_case, error, poisoned, tolerance  # noqa: F401
from test_kl_divergence import case as kl_case
from test_kl_divergence import check as kl_check
from test_lowrank_linear import case as lowrank_case
from test_lowrank_linear import check as lowrank_check
from test_token_nll import case as nll_case
from test_token_nll import check as nll_check

from mendfast import ops
from mendfast.types import PRECISIONS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; PyTorch sees none here"),
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["plain", "one row", "u only", "no residual", "not shared", "bfloat16 rows"])
def test_editor_mlp(name, precision):
    editor_case(name, device="cuda").check(ops.editor_mlp, precision=precision, backend="triton")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("n_rows", [20, 60, 700, 2000])
def test_editor_mlp_at_real_sizes(n_rows, precision):
    """Few rows by the kernels of the package, many by the library."""
    case = EditorCase(n_rows, 1024, 4096, 1920, 3, device="cuda")
    case.check(ops.editor_mlp, precision=precision, backend="triton")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_bits_every_time(precision):
    case = EditorCase(60, 1024, 4096, 1920, 3, device="cuda")
    out, grads = case.run(ops.editor_mlp, precision=precision, backend="triton")
    for _ in range(5):
        again, grads_again = case.run(ops.editor_mlp, precision=precision, backend="triton")
        assert all(torch.equal(a, b) for a, b in zip((*out, *grads), (*again, *grads_again), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_running_stats(dtype):
    rows = (torch.randn(5000, 4096, device="cuda") + 100).to(dtype)
    mask = torch.rand(5000, device="cuda") > 0.3
    states = []
    for _ in range(2):
        count = torch.zeros((), dtype=torch.int64, device="cuda")
        mean, m2 = torch.zeros(4096, device="cuda"), torch.zeros(4096, device="cuda")
        for chunk, keep in zip(rows.split(1500), mask.split(1500), strict=True):
            ops.running_stats_(count, mean, m2, chunk, keep, backend="triton")
        states.append((count, mean, m2))
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    kept = rows[mask].double()
    assert count == len(kept)
    assert torch.allclose(mean.double(), kept.mean(0), rtol=1e-6)
    assert torch.allclose((m2 / (count - 1)).double(), kept.var(0), rtol=1e-3)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lowrank_linear(batched, dtype):
    lowrank_check(lowrank_case(batched, (4, 130, 20, 1024, 4096), dtype, dtype, "cuda"), 4096, backend="triton")


@pytest.mark.parametrize("batched", [True, False])
def test_lowrank_linear_s_peak(batched):
    """No tensor of m x n: the peak stays at a few times what comes in and goes out."""
    y, x, u, delta, alpha = lowrank_case(batched, (2, 64, 20, 8192, 8192), device="cuda")
    ops.lowrank_linear(y, x, u, delta, alpha, backend="triton").sum().backward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ops.lowrank_linear(y, x, u, delta, alpha, backend="triton").sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 8192 * 8192 * 4 / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [50257, 151936])
def test_losses_over_large_vocabularies(vocabulary, dtype):
    nll_check(*nll_case(4, 25, vocabulary, dtype, "cuda"), backend="triton")
    kl_check(*kl_case(4, 25, vocabulary, dtype, "cuda"), backend="triton")


def test_compiled_without_a_graph_break():
    case = editor_case("plain", device="cuda")
    function = torch.compile(ops.editor_mlp, fullgraph=True)
    case.check(lambda *args, **kwargs: function(*args, **kwargs), backend="triton")


def test_values_are_looked_at_when_asked():
    case = editor_case("plain", device="cuda")
    with ops.checking(), pytest.raises(ValueError, match="0 to 2"):
        ops.editor_mlp(case.u, case.delta, case.stats, case.blocks, case.mode + 3)
