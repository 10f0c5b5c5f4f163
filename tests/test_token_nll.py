import pytest
import torch
from op_cases import double, poisoned, tolerance  # noqa: F401

from mendfast import ops, reference

pytestmark = pytest.mark.usefixtures("poisoned")


def case(batch=3, length=5, vocabulary=37, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(batch, length, vocabulary, generator=generator) * 3).to(dtype)
    labels = torch.randint(vocabulary, (batch, length), generator=generator)
    labels[torch.rand(batch, length, generator=generator) < 0.3] = -100
    labels[0] = -100
    labels[-1, -1] = vocabulary - 1
    return logits.to(device).requires_grad_(), labels.to(device)


def check(logits, labels, **kwargs):
    out = ops.token_nll(logits, labels, **kwargs)
    weights = torch.arange(1, 1 + len(out), dtype=out.dtype, device=out.device)
    (grad,) = torch.autograd.grad(out, logits, weights)
    exact = double(logits)
    expected = reference.token_nll(exact, labels.cpu())
    (expected_grad,) = torch.autograd.grad(expected, exact, weights.double().cpu())
    assert out.dtype == torch.promote_types(logits.dtype, torch.float32)
    # a loss is the difference of numbers as large as the logits, however small it is itself
    scale = expected.norm() + logits.detach().abs().max().double().cpu()
    assert (out.double().cpu() - expected).norm() <= tolerance(out.dtype, logits.shape[-1]) * scale
    assert grad.dtype == logits.dtype
    # and its gradient one of probabilities, up to 1 each
    scale = expected_grad.norm() + weights.double().cpu().norm()
    assert (grad.double().cpu() - expected_grad).norm() <= tolerance(logits.dtype, logits.shape[-1]) * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5, 37), (2, 1, 2), (2, 40, 20_000)])
def test_matches_the_reference(shape, dtype):
    check(*case(*shape, dtype=dtype), backend="aten")


def test_a_causal_shift_needs_no_copy():
    logits, labels = case(4, 6, 50)
    check(logits.detach()[:, :-1].requires_grad_(), labels[:, 1:], backend="aten")


def test_every_token_labelled():
    logits, labels = case()
    check(logits, labels.abs() % 37, backend="aten")


def test_a_sample_without_labels_is_zero_and_teaches_nothing():
    logits, labels = case()
    out = ops.token_nll(logits, labels)
    (grad,) = torch.autograd.grad(out.sum(), logits)
    assert out[0] == 0 and (grad[labels == -100] == 0).all() and grad[labels != -100].abs().sum() > 0


def test_what_has_no_label_may_hold_anything():
    logits, labels = case()
    holes = logits.detach().clone()
    holes[labels == -100] = torch.nan
    holes.requires_grad_()
    out = ops.token_nll(holes, labels)
    assert torch.equal(out, ops.token_nll(logits, labels))
    (grad,) = torch.autograd.grad(out.sum(), holes)
    assert grad.isfinite().all()


def test_impossible_tokens_and_huge_logits():
    logits = torch.tensor([[[1e4, -torch.inf, 1e4 - 1, -1e30]]], requires_grad=True)
    out = ops.token_nll(logits, torch.tensor([[2]]))
    (grad,) = torch.autograd.grad(out, logits)
    assert out.item() == pytest.approx(1.3132616, rel=1e-6)
    assert torch.allclose(grad, torch.tensor([0.7310586, 0, -0.7310586, 0]), atol=1e-3)


@pytest.mark.parametrize("op", [ops, reference])
def test_gradcheck_in_float64(op):
    logits, labels = case(2, 3, 5, torch.float64)
    assert torch.autograd.gradcheck(lambda x: op.token_nll(x, labels), [logits])


def test_rows():
    logits, labels = case()
    rows = ops.token_nll_rows(logits.flatten(0, 1), labels.flatten())
    assert torch.allclose(rows, reference.token_nll_rows(logits.flatten(0, 1), labels.flatten()), atol=1e-5)


@pytest.mark.parametrize(
    "logits, labels, kind, words",
    [
        (torch.randn(2, 3, 5), torch.zeros(2, 4, dtype=torch.int64), ValueError, "without the vocabulary"),
        (torch.randn(2, 3, 5), torch.full((2, 3), 5), ValueError, "0 to 4"),
        (torch.randn(2, 3, 5), torch.full((2, 3), -1), ValueError, "-100"),
        (torch.randn(2, 3, 5), torch.zeros(2, 3), TypeError, "token ids"),
        (torch.zeros(2, 3, 5, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64), TypeError, "int64"),
        (torch.randn(5), torch.zeros((), dtype=torch.int64), ValueError, r"\[B, S, V\]"),
    ],
)
def test_bad_input(logits, labels, kind, words):
    with pytest.raises(kind, match=words):
        ops.token_nll(logits, labels)


@pytest.mark.parametrize("shape", [(0, 3, 7), (2, 0, 7)])
def test_without_rows(shape):
    logits = torch.randn(shape, requires_grad=True)
    out = ops.token_nll(logits, torch.zeros(shape[:2], dtype=torch.int64))
    out.sum().backward()
    assert out.shape == shape[:1] and (out == 0).all() and logits.grad.shape == shape


@pytest.mark.parametrize("at", [0, 3, 6])
def test_not_a_number_is_not_a_loss(at):
    logits = torch.randn(1, 2, 7)
    logits[0, 1, at] = torch.nan
    assert ops.token_nll(logits, torch.tensor([[2, 3]])).isnan().all()
    assert ops.token_nll_rows(logits[0], torch.tensor([2, 3])).isnan().tolist() == [False, True]
