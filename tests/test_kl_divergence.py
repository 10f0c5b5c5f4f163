import pytest
import torch
from op_cases import CPU, ON_CPU, at_threads, double, poisoned, tolerance  # noqa: F401

from mendfast import ops, reference

pytestmark = pytest.mark.usefixtures("poisoned")


def case(batch=3, length=5, vocabulary=37, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    base, logits = ((torch.randn(batch, length, vocabulary, generator=generator) * 2).to(dtype) for _ in range(2))
    mask = torch.rand(batch, length, generator=generator) > 0.3
    mask[0], mask[-1, -1] = False, True
    return base.to(device), logits.to(device).requires_grad_(), mask.to(device)


def check(base, logits, mask, **kwargs):
    out = ops.kl_divergence(base, logits, mask, **kwargs)
    weights = torch.arange(1, 1 + len(out), dtype=out.dtype, device=out.device)
    (grad,) = torch.autograd.grad(out, logits, weights)
    exact = double(logits)
    expected = reference.kl_divergence(double(base), exact, mask.cpu())
    (expected_grad,) = torch.autograd.grad(expected, exact, weights.double().cpu())
    assert out.dtype == torch.promote_types(logits.dtype, torch.float32)
    # a divergence is the difference of numbers as large as the logits, however small it is itself
    scale = expected.norm() + logits.detach().abs().max().double().cpu()
    assert (out.double().cpu() - expected).norm() <= tolerance(out.dtype, logits.shape[-1]) * scale
    assert grad.dtype == logits.dtype
    # and its gradient one of probabilities, up to 1 each
    scale = expected_grad.norm() + weights.double().cpu().norm()
    assert (grad.double().cpu() - expected_grad).norm() <= tolerance(logits.dtype, logits.shape[-1]) * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5, 37), (2, 1, 2), (1, 3, 1), (3, 2, 1024), (2, 40, 20_000)])
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.usefixtures("instructions")
def test_matches_the_reference(shape, dtype, backend):
    check(*case(*shape, dtype=dtype), backend=backend)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.usefixtures("instructions")
def test_views_and_integer_masks(backend):
    base, logits, mask = case(4, 6, 50)
    logits = logits.detach()
    check(base[:, :-1], logits[:, :-1].requires_grad_(), mask[:, 1:].long(), backend=backend)
    check(base[:1].expand(4, 6, 50), logits.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(), mask,
          backend=backend)  # fmt: skip
    check(base.mT.contiguous().mT, logits.mT.contiguous().mT.requires_grad_(), mask, backend=backend)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)])
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.usefixtures("instructions")
def test_models_of_two_dtypes(dtypes, backend):
    base, logits, mask = case(3, 5, 37)
    check(base.to(dtypes[0]), logits.detach().to(dtypes[1]).requires_grad_(), mask, backend=backend)


@pytest.mark.skipif(CPU != "cpu", reason="the extension is not there")
def test_the_kernel_reads_infinities_as_the_documentation_says():
    """Impossible in the base: no weight, whatever the other says. NaN in a kept row makes the loss NaN."""
    base = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf]] * 5)
    logits = torch.tensor([[1.0, 2.0, -1.0, -torch.inf]] * 5)
    base[2, 0], logits[3, 2], base[4, 2] = torch.nan, torch.nan, torch.inf
    out = ops.kl_divergence_rows(base, logits, backend="cpu")
    p, q = base[0, [0, 2]].log_softmax(0), logits[0].log_softmax(0)[[0, 2]]
    assert torch.allclose(out[:2], (p.exp() * (p - q)).sum()) and out[2:].isnan().all()


@pytest.mark.skipif(CPU != "cpu", reason="the extension is not there")
def test_the_kernel_at_any_number_of_threads():
    base, logits, mask = case(3, 40, 5000)
    results = at_threads(lambda: torch.autograd.grad(ops.kl_divergence(base, logits, mask).sum(), logits)[0])
    assert all(torch.equal(grad, results[0]) for grad in results)


@pytest.mark.parametrize("backend", ON_CPU)
def test_all_kept(backend):
    base, logits, mask = case()
    check(base, logits, torch.ones_like(mask), backend=backend)


def test_equal_models_do_not_diverge():
    base, _, mask = case()
    logits = (base + 7).requires_grad_()
    out = ops.kl_divergence(base, logits, mask)
    (grad,) = torch.autograd.grad(out.sum(), logits)
    assert out.abs().max() < 1e-6 and grad.abs().max() < 1e-6


def test_small_divergences_keep_their_digits():
    base, _, _ = case(1, 20, 20_000)
    logits = base + 0.02 * torch.randn_like(base)
    mask = torch.ones(1, 20)
    exact = reference.kl_divergence(base.double(), logits.double(), mask)
    assert 1e-4 < exact < 1e-3
    assert (ops.kl_divergence(base, logits, mask).double() - exact).abs() < 1e-6


def test_dropped_positions_may_hold_anything_and_teach_nothing():
    base, logits, mask = case()
    holes = logits.detach().clone()
    holes[~mask] = torch.nan
    holes.requires_grad_()
    out = ops.kl_divergence(base, holes, mask)
    assert torch.equal(out, ops.kl_divergence(base, logits, mask)) and out[0] == 0
    (grad,) = torch.autograd.grad(out.sum(), holes)
    assert (grad[~mask] == 0).all() and grad[mask].abs().sum() > 0


def test_no_gradient_reaches_the_base():
    base, logits, mask = case()
    base.requires_grad_()
    ops.kl_divergence(base, logits, mask).sum().backward()
    assert base.grad is None and logits.grad is not None


@pytest.mark.usefixtures("instructions")
def test_huge_logits():
    base = torch.tensor([[[1e4, 0.0, -1e4]]])
    logits = torch.tensor([[[1e4, 1e4, -1e4]]])
    assert ops.kl_divergence(base, logits, torch.ones(1, 1)).item() == pytest.approx(0.6931472, rel=1e-5)


@pytest.mark.parametrize("op", [ops, reference])
def test_gradcheck_in_float64(op):
    base, logits, mask = case(2, 3, 5, torch.float64)
    assert torch.autograd.gradcheck(lambda x: op.kl_divergence(base, x, mask), [logits])


def test_rows():
    base, logits, _ = case()
    base, logits = base.flatten(0, 1), logits.flatten(0, 1)
    rows = ops.kl_divergence_rows(base, logits)
    assert torch.allclose(rows, reference.kl_divergence_rows(base, logits), atol=1e-5)


@pytest.mark.parametrize(
    "base, logits, mask, kind, words",
    [
        (torch.randn(2, 3, 5), torch.randn(2, 3, 6), torch.ones(2, 3), ValueError, "one shape"),
        (torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.ones(2, 4), ValueError, "without the vocabulary"),
        (torch.ones(2, 3, 5, dtype=torch.int64), torch.randn(2, 3, 5), torch.ones(2, 3), TypeError, "int64"),
        (torch.randn(5), torch.randn(5), torch.ones(()), ValueError, r"\[B, S, V\]"),
    ],
)
def test_bad_input(base, logits, mask, kind, words):
    with pytest.raises(kind, match=words):
        ops.kl_divergence(base, logits, mask)


@pytest.mark.parametrize("backend", [*ON_CPU, "reference"])
def test_a_base_wider_than_the_logits(backend):
    """1e30 in float64 is 1e22 away from the nearest float32."""
    base = torch.tensor([[[1e30, 0.0, -1e30]]], dtype=torch.float64)
    logits = torch.tensor([[[1.0, 1.0, 0.0]]], requires_grad=True)
    out = ops.kl_divergence(base, logits, torch.ones(1, 1), backend=backend)
    (grad,) = torch.autograd.grad(out, logits)
    q = logits.detach().softmax(-1)
    assert torch.allclose(grad, q - torch.tensor([1.0, 0.0, 0.0]), atol=1e-6)
    assert torch.allclose(out.detach(), -q[..., 0].log().squeeze(1), rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3, 7), (2, 0, 7)])
def test_without_rows(shape):
    base, logits = torch.randn(shape), torch.randn(shape, requires_grad=True)
    out = ops.kl_divergence(base, logits, torch.ones(shape[:2]))
    out.sum().backward()
    assert out.shape == shape[:1] and (out == 0).all() and logits.grad.shape == shape
