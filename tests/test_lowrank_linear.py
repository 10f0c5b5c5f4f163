import pytest
import torch
from op_cases import ON_CPU, double, error, poisoned, tolerance  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

from mendfast import ops, reference
from mendfast.ops.lowrank_linear import fewer_through_weight

pytestmark = pytest.mark.usefixtures("poisoned")


def case(batched=True, shape=(3, 7, 4, 13, 9), y_dtype=torch.float32, x_dtype=torch.float32, device="cpu"):
    b, s, t, m, n = shape
    generator = torch.Generator().manual_seed(0)

    def rand(*size, dtype=torch.float32):
        return torch.randn(size, generator=generator).to(dtype).to(device).requires_grad_()

    lead = (b,) if batched else ()
    return [rand(b, s, n, dtype=y_dtype), rand(b, s, m, dtype=x_dtype), rand(*lead, t, m), rand(*lead, t, n), rand(1)]


def check(arguments, length, **kwargs):
    out = ops.lowrank_linear(*arguments, **kwargs)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    grads = torch.autograd.grad(out, arguments, grad_out)
    exact = [double(x) for x in arguments]
    expected = reference.lowrank_linear(*exact)
    assert out.dtype == arguments[0].dtype
    assert error(out, expected) <= tolerance(out.dtype, length)
    for g, x, ref in zip(grads, arguments, torch.autograd.grad(expected, exact, double(grad_out)), strict=True):
        # a 16-bit output's gradient comes in 16 bits, exactly; the products behind it are float32
        assert g.dtype == x.dtype
        if x is arguments[4]:  # one number, summed over everything: its size is no measure of its terms'
            update = ((exact[1] @ exact[2].mT) @ exact[3]).detach()
            terms = (double(grad_out) * update).abs().sum()
            assert (g.detach().double().cpu() - ref).abs() <= tolerance(g.dtype, length) * terms
        else:
            assert error(g, ref) <= tolerance(g.dtype, length)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    "shape", [(3, 7, 4, 13, 9), (1, 1, 1, 1, 1), (2, 33, 20, 96, 64), (2, 40, 60, 9, 7), (1, 5, 200, 13, 1)]
)
@pytest.mark.parametrize("backend", ON_CPU)
def test_matches_the_reference(batched, shape, backend):
    check(case(batched, shape), max(shape), backend=backend)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ON_CPU)
def test_half_precision_layers(batched, dtype, backend):
    check(case(batched, y_dtype=dtype, x_dtype=dtype), 13, backend=backend)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("backend", ON_CPU)
def test_strides(batched, backend):
    """Permuted outputs and inputs, an expanded output, transposed and 16-bit factors."""
    y, x, u, delta, alpha = (t.detach() for t in case(batched, (3, 7, 4, 13, 19)))
    y, x = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (y, x))
    u, delta = u.bfloat16(), delta.mT.contiguous().mT
    for out in (y, y[:, :1].expand(3, 7, 19), y.mT.contiguous().mT):
        arguments = [t.detach().requires_grad_() for t in (out, x, u, delta, alpha)]
        check(arguments, 19, backend=backend)


def test_shared_factors_take_any_leading_dimensions():
    y, x, u, delta, alpha = case(batched=False)
    flat = ops.lowrank_linear(y[0], x[0], u, delta, alpha)
    deep = ops.lowrank_linear(y[None], x[None], u, delta, alpha)
    assert torch.allclose(flat, deep[0, 0], atol=1e-6)


def test_a_plain_number_for_alpha():
    y, x, u, delta, _ = case()
    out = ops.lowrank_linear(y, x, u, delta, 0.3)
    assert torch.allclose(out, ops.lowrank_linear(y, x, u, delta, torch.tensor(0.3)), atol=1e-6)
    (grad,) = torch.autograd.grad(out.sum(), u)
    (expected,) = torch.autograd.grad(reference.lowrank_linear(y, x, u, delta, 0.3).sum(), u)
    assert error(grad, expected) < 1e-6


def test_it_is_the_layer_with_the_updated_weight():
    y, x, u, delta, alpha = case(batched=False)
    weight = torch.randn(9, 13)
    edited = x @ (weight - alpha * delta.T @ u).T
    assert torch.allclose(ops.lowrank_linear(x @ weight.T, x, u, delta, alpha), edited, atol=1e-5)


@pytest.mark.parametrize("op", [ops.lowrank_linear, reference.lowrank_linear])
@pytest.mark.parametrize("batched", [True, False])
def test_gradcheck_in_float64(op, batched):
    assert torch.autograd.gradcheck(op, [double(x) for x in case(batched, (2, 3, 2, 4, 3))])


@pytest.mark.parametrize("batched", [True, False])
def test_gradcheck_through_the_weight(batched):
    """So many rows that delta^T u is the smaller way."""
    arguments = [double(x) for x in case(batched, (2, 12, 30, 4, 3))]
    assert fewer_through_weight(arguments[1], arguments[2], 3)
    assert torch.autograd.gradcheck(lambda *x: ops.lowrank_linear(*x, backend="aten"), arguments)


def test_only_what_is_asked():
    y, x, u, delta, alpha = (t.detach() for t in case())
    out = ops.lowrank_linear(y, x, u.requires_grad_(), delta, alpha)
    out.sum().backward()
    assert u.grad is not None and all(t.grad is None for t in (y, x, delta, alpha))


class Sizes(TorchDispatchMode):
    """The largest tensor that any operation within makes."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("batched", [True, False])
def test_no_tensor_of_the_weight_s_size(batched, backend):
    b, s, t, m, n = 2, 5, 3, 700, 600
    arguments = case(batched, (b, s, t, m, n))
    with Sizes() as sizes:
        ops.lowrank_linear(*arguments, backend=backend).sum().backward()
    assert sizes.largest == b * s * m
    with Sizes() as full:
        arguments[3].mT @ arguments[2]
    assert full.largest >= m * n


def test_between_the_passes_x_is_kept_as_it_came():
    y, x, u, delta, alpha = case(y_dtype=torch.bfloat16, x_dtype=torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.lowrank_linear(y, x, u, delta, alpha, backend="aten")
    assert any(t.data_ptr() == x.data_ptr() for t in kept)
    assert not any(t.dtype == torch.float32 and t.numel() >= x.numel() for t in kept)


def test_autocast_does_not_reach_the_products():
    arguments = case()
    expected = ops.lowrank_linear(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.lowrank_linear(*arguments), expected)


@pytest.mark.parametrize(
    "changes, kind, words",
    [
        ({1: torch.randn(3, 7, 12)}, ValueError, "equally wide"),
        ({1: torch.randn(3, 6, 13)}, ValueError, "all but the last"),
        ({2: torch.randn(3, 5, 13)}, ValueError, r"\[T, m\]"),
        ({2: torch.randn(2, 4, 13), 3: torch.randn(2, 4, 9)}, ValueError, "same B"),
        ({0: torch.ones(3, 7, 9, dtype=torch.int64)}, TypeError, "int64"),
        ({4: torch.ones(2)}, ValueError, "one number"),
    ],
)
def test_bad_input(changes, kind, words):
    arguments = case()
    for i, value in changes.items():
        arguments[i] = value
    with pytest.raises(kind, match=words):
        ops.lowrank_linear(*arguments)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("backend", [*ON_CPU, "reference"])
@pytest.mark.parametrize("shape", [(3, 7, 0, 13, 9), (3, 0, 4, 13, 9), (0, 7, 4, 13, 9)])
def test_without_terms_or_rows(batched, backend, shape):
    """An edit has no rows where the model is sure of its target: the layer stays as it is, and passes gradients."""
    arguments = case(batched, shape)
    out = ops.lowrank_linear(*arguments, backend=backend)
    assert torch.equal(out, arguments[0])
    grads = torch.autograd.grad(out, arguments, torch.ones_like(out))
    assert (grads[0] == 1).all() and all((g == 0).all() for g in grads[1:])
    assert [g.shape for g in grads] == [a.shape for a in arguments]
